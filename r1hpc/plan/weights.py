"""Whether a model folder holds weights that can be loaded, from its file names alone.

check_weights(config.model)     # at submission, and again where the model is built
"""

import json
from pathlib import Path

from r1hpc.base.errors import ConfigError
from r1hpc.config.schema import ModelConfig

# The two names transformers looks for in a local folder (modeling_utils._get_resolved_checkpoint_files).
_ONE_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_OTHER_FORMS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.safetensors")


def check_weights(model: ModelConfig) -> None:
    """Refuse a model.path without weights, unless the model is to be trained from scratch.

    A folder without config.json is left to `load_model_config`, which refuses it.

    Raises:
        ConfigError: no safetensors weights under transformers' names, or files of them are missing.
    """
    if model.path is None or model.from_scratch:
        return
    folder = Path(model.path)
    if not (folder / "config.json").is_file() or (folder / _ONE_FILE).is_file():
        return
    if not (folder / _INDEX).is_file():
        raise ConfigError(
            f"model.path {folder} has no {_ONE_FILE} (nor {_INDEX}), the only weights that are loaded: "
            f"{_how_to_get(folder)}, or set model.from_scratch=true to train its architecture from random "
            "weights"
        )
    missing = [name for name in _indexed(folder / _INDEX) if not (folder / name).is_file()]
    if missing:
        raise ConfigError(
            f"model.path {folder} lacks {len(missing)} of the files that its {_INDEX} names: "
            f"{', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}; copy them there"
        )


def _how_to_get(folder: Path) -> str:
    others = sorted({path.name for form in _OTHER_FORMS for path in folder.glob(form)})
    if not others:
        return "copy them there"
    seen = f"{', '.join(others[:3])}{' ...' if len(others) > 3 else ''}"
    return (
        f"it holds {seen}; transformers' AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(DIR) "
        "writes them as safetensors"
    )


def _indexed(index: Path) -> list[str]:
    """The names of the files an index spreads the weights over."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f'{index} has no "weight_map" of file names: restore it') from None
    return [str(name) for name in names]
