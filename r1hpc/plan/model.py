"""The config.json a run's model has: from its folder, changed by model.config, completed by the dataset."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from r1hpc.base.errors import ConfigError
from r1hpc.config.schema import RunConfig


def load_model_config(
    config: RunConfig, vocab_size: int | None, expected: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """model.path/config.json, then model.config over it, then the dataset's vocabulary where none is given.

    Args:
        expected: stands for the config.json of a folder that another run has yet to write.

    Raises:
        ConfigError: no model at all, no readable config.json, or a vocabulary smaller than the dataset's.
    """
    model = config.model
    merged = {**_of_folder(model.path, expected), **model.config}
    if "model_type" not in merged:
        raise ConfigError("no model: give model.path=DIR, or include one such as model/tiny in the job file")
    own = merged.get("vocab_size")
    if own is None:
        return merged if vocab_size is None else {**merged, "vocab_size": vocab_size}
    if not isinstance(own, int) or own < 1:
        raise ConfigError(f"model.config.vocab_size is {own!r}: it must be a whole number above 0")
    if vocab_size is not None and own < vocab_size:
        raise ConfigError(
            f"the model's vocab_size is {own}, but the dataset's tokenizer has {vocab_size} tokens: "
            "use a dataset made with the model's own tokenizer, or raise model.config.vocab_size"
        )
    return merged


def _of_folder(path: str | None, expected: Mapping[str, Any] | None) -> dict[str, Any]:
    """The config.json of a model folder; nothing where there is none."""
    if path is None:
        return {}
    folder = Path(path)
    file = folder / "config.json"
    if expected is not None and not file.is_file():
        return dict(expected)
    if not folder.is_dir():
        raise ConfigError(f"model.path {path} is not a folder: give a local folder with config.json")
    if not file.is_file():
        raise ConfigError(f"{file} is missing: model.path must be a folder in Hugging Face format")
    try:
        content = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file} must hold one JSON object")
    return content
