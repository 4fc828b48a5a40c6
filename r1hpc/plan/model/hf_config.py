"""Build the config.json of a run's model from its folder, model.config and the dataset's vocabulary."""

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from r1hpc.base.errors import ConfigError
from r1hpc.base.files import parse_json
from r1hpc.base.names import nearest, printable
from r1hpc.config.hub import how_to_fetch, is_hub_name, local_folder
from r1hpc.config.schema.run import OWN_ATTENTIONS, ModelConfig, RunConfig


def load_model_config(
    config: RunConfig, vocab_size: int | None, expected: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return model.path/config.json with model.config over it, and the dataset's vocabulary if none is given.

    Args:
        expected: replaces the config.json of a folder that another run has yet to write.

    Raises:
        ConfigError: no model at all, no readable config.json, or a vocabulary smaller than the dataset's.
    """
    model = config.model
    merged = {**_of_folder(model.path, expected, "model.path"), **model.config}
    if "model_type" not in merged:
        raise ConfigError("no model: give model.path=DIR, or include one such as model/tiny in the job file")
    own = merged.get("vocab_size")
    if own is None:
        return merged if vocab_size is None else {**merged, "vocab_size": vocab_size}
    if not isinstance(own, int) or own < 1:
        raise ConfigError(f"model.config.vocab_size is {own!r}: it must be a whole number above 0")
    if vocab_size is not None and own < vocab_size:
        is_loaded = model.path is not None and not model.from_scratch
        other = "enlarge the model's embedding" if is_loaded else "raise model.config.vocab_size"
        raise ConfigError(
            f"the model's vocab_size is {own}, but the tokenizer has {vocab_size} tokens: use the model's "
            f"own tokenizer, for the dataset too, or {other}"
        )
    return merged


def load_teacher_config(
    config: RunConfig, expected: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """Return the config.json of rl.teacher; None: the run has no teacher.

    Args:
        expected: as for `load_model_config`.

    Raises:
        ConfigError: no readable config.json, or one without model_type.
    """
    if config.stage != "rl" or config.rl.teacher is None:
        return None
    found = _of_folder(config.rl.teacher, expected, "rl.teacher")
    if "model_type" not in found:
        raise ConfigError(f"the config.json of rl.teacher {config.rl.teacher} names no model_type")
    return found


def teacher_of(config: RunConfig, hf_config: Mapping[str, Any]) -> ModelConfig:
    """Return rl.teacher as a model to build, with its training attention, else the student's.

    Args:
        hf_config: the teacher's config.json.
    """
    student, trained = config.model.attn_implementation, hf_config.get("attn_implementation")
    if trained not in OWN_ATTENTIONS:
        trained = "sdpa" if student in OWN_ATTENTIONS else student
    return ModelConfig(path=config.rl.teacher, attn_implementation=trained)


def check_model_type(model_type: Any) -> None:
    """Refuse a model_type that the installed transformers has no causal language model for.

    Its table is read as text, since importing it takes seconds. If there is none, the ranks find out.

    Raises:
        ConfigError: names the nearest.
    """
    found = importlib.util.find_spec("transformers")
    file = Path(found.origin or "").parent / "models" / "auto" / "modeling_auto.py" if found else None
    if file is None or not file.is_file():
        return
    _, _, table = file.read_text(encoding="utf-8").partition("\nMODEL_FOR_CAUSAL_LM_MAPPING_NAMES = ")
    known = re.findall(r'^ +\("([^"]+)",', table.partition("\n)")[0], re.MULTILINE)
    if known and model_type not in known:
        raise ConfigError(
            f"model_type is {printable(str(model_type))!r}, which the installed transformers has no causal "
            f"language model for{nearest(str(model_type), known)}; there are {len(known)}, as qwen2"
        )


def _of_folder(path: str | None, expected: Mapping[str, Any] | None, setting: str) -> dict[str, Any]:
    """Return the config.json of a model folder; empty if there is none."""
    if path is None:
        return {}
    folder = Path(local_folder(path))
    file = folder / "config.json"
    if expected is not None and not file.is_file():
        return dict(expected)
    if is_hub_name(str(folder)):
        raise ConfigError(f"{setting} {path}: {how_to_fetch(path)}")
    if folder.suffix == ".gguf" or (not file.is_file() and (ggufs := sorted(folder.glob("*.gguf")))):
        gguf = folder if folder.suffix == ".gguf" else ggufs[0]
        raise ConfigError(
            f"{setting} {path} holds a model in GGUF: make a Hugging Face folder of it first, by "
            f"`python -m r1hpc.export {gguf} --out DIR`, and give {setting}=DIR"
        )
    if not folder.is_dir():
        raise ConfigError(f"{setting} {path} is not a folder: give a local folder with config.json")
    if not file.is_file():
        raise ConfigError(f"{file} is missing: {setting} must be a folder in Hugging Face format")
    try:
        content = parse_json(file.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file} must hold one JSON object")
    return content
