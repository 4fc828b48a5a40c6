"""Whether a model folder holds weights that can be loaded, from its file names alone.

check_weights(config.model)     # at submission, and again where the model is built
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from r1hpc.base.errors import ConfigError
from r1hpc.base.files import parse_json
from r1hpc.config.schema import ModelConfig

# What transformers looks for in a local folder (modeling_utils._get_resolved_checkpoint_files), in its order.
_FORMS = ("model.safetensors", "pytorch_model.bin")
_INDEX = ".index.json"
_OTHER_FORMS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.safetensors")


def check_weights(model: ModelConfig) -> None:
    """Refuse a model.path without weights, unless the model is to be trained from scratch.

    A folder without config.json is left to `load_model_config`, which refuses it.

    Raises:
        ConfigError: no weights under transformers' names, or files of them are missing.
    """
    if model.path is None or model.from_scratch or not Path(model.path, "config.json").is_file():
        return
    folder = Path(model.path)
    files = weight_files(folder)
    if not files:
        raise ConfigError(
            f"model.path {folder} has neither {' nor '.join(_FORMS)} (nor the {_INDEX} of one), the only "
            f"weights that are loaded: {_how_to_get(folder)}, or set model.from_scratch=true to train its "
            "architecture from random weights"
        )
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise ConfigError(
            f"model.path {folder} lacks {len(missing)} of the files that its {_INDEX} names: "
            f"{', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}; copy them there"
        )


def weight_files(folder: Path) -> list[Path]:
    """The files that a folder's weights are loaded from, as its index names them; none: it has none."""
    for form in _FORMS:
        if (folder / form).is_file():
            return [folder / form]
        if (folder / f"{form}{_INDEX}").is_file():
            return [folder / name for name in _indexed(folder / f"{form}{_INDEX}")]
    return []


def refuse_misshapen(weights: str, mismatched: Iterable[tuple[str, Sequence[int], Sequence[int]]]) -> None:
    """Refuse weights whose tensors do not fit the config: transformers would start those at random.

    Args:
        weights: how the sentence begins.
        mismatched: name, shape in the weights, and shape by the config of each tensor where they differ.

    Raises:
        ConfigError: there is one.
    """
    shapes = [
        f"{name} is {tuple(theirs)} there and {tuple(ours)} in the config"
        for name, theirs, ours in sorted(mismatched)
    ]
    if shapes:
        raise ConfigError(
            f"{weights} do not fit its config: {first_of(shapes)}. Take what model.config changes out, or "
            "set model.from_scratch=true for random weights"
        )


def first_of(names: Sequence[str]) -> str:
    """Five names, and dots where there are more."""
    return f"{', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"


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
        names = sorted(set(parse_json(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f'{index} has no "weight_map" of file names: restore it') from None
    return [str(name) for name in names]
