"""Check a model folder's weights from file names and safetensors headers alone, without torch.

A safetensors file is 8 bytes of length (little-endian), a JSON header of that length, and the data
(huggingface.co/docs/safetensors). At submission train/checks/model.py asks for missing files (check_weights),
damaged ones and LoRA targets (check_tensors). On the ranks train/model/model.py refuses tensors that are
missing or have another shape than the config's.
"""

import json
import re
import struct
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from r1hpc.base.errors import ConfigError
from r1hpc.base.files import parse_json
from r1hpc.config.schema.run import ModelConfig
from r1hpc.plan.model.shape import resolve

# The names transformers looks for in a local folder (modeling_utils._get_resolved_checkpoint_files), in its
# order.
_FORMS = ("model.safetensors", "pytorch_model.bin")
_INDEX = ".index.json"
_OTHER_FORMS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.safetensors")
Shape = tuple[int, ...]
_POINTER = b"version https://git-lfs.github.com/"
_MOST_HEADER_BYTES = 100_000_000
"""safetensors' own limit."""
_OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""torch.serialization.MAGIC_NUMBER, pickled."""
_KNOWN = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gpt2")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.(.+)")
_OF_LLAMA = (
    *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    *("input_layernorm.weight", "post_attention_layernorm.weight"),
)
_OF_GPT2 = tuple(
    f"{name}.{kind}"
    for name in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    for kind in ("weight", "bias")
)
_TENSORS = {
    **dict.fromkeys(("llama", "mistral", "gemma"), _OF_LLAMA),
    "qwen2": (*_OF_LLAMA, *(f"self_attn.{name}_proj.bias" for name in "qkv")),
    "qwen3": (*_OF_LLAMA, "self_attn.q_norm.weight", "self_attn.k_norm.weight"),
    "gemma2": (*_OF_LLAMA, "pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight"),
    "gpt2": _OF_GPT2,
}
"""Tensors of each layer, of transformers' models (modeling_<type>.py)."""
_ENDS = ("lm_head", "embed_tokens", "wte")
"""Embeddings and output heads of the families."""


def check_weights(model: ModelConfig) -> None:
    """Raise ConfigError for a model.path without (all) weights under transformers' names, unless the model is
    trained from scratch. `load_model_config` refuses one without config.json."""
    if model.path is None or model.from_scratch or not Path(model.path, "config.json").is_file():
        return
    folder = Path(model.path)
    files = weight_files(folder)
    if not files:
        get = "copy them there"
        others = sorted({path.name for form in _OTHER_FORMS for path in folder.glob(form)})
        if others:
            get = (
                f"it holds {first_of(others, 3)}; transformers' AutoModelForCausalLM.from_pretrained(DIR)"
                ".save_pretrained(DIR) writes them as safetensors"
            )
        raise ConfigError(
            f"model.path {folder} has neither {' nor '.join(_FORMS)} (nor the {_INDEX} of one), the only "
            f"weights that are loaded: {get}, or set model.from_scratch=true to train its "
            "architecture from random weights"
        )
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise ConfigError(
            f"model.path {folder} lacks {len(missing)} of the files that its {_INDEX} names: "
            f"{first_of(missing, 3)}; copy them there"
        )


def weight_files(folder: Path) -> list[Path]:
    """Return the files of a folder's weights, as named by its index; empty if there are none."""
    for form in _FORMS:
        if (folder / form).is_file():
            return [folder / form]
        index = folder / f"{form}{_INDEX}"
        if index.is_file():
            try:
                names = sorted(set(parse_json(index.read_bytes())["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ConfigError(f'{index} has no "weight_map" of file names: restore it') from None
            return [folder / str(name) for name in names]
    return []


def refuse_misshapen(weights: str, mismatched: Iterable[tuple[str, Sequence[int], Sequence[int]]]) -> None:
    """Raise ConfigError, beginning with `weights`, for tensors that do not fit the config, which transformers
    would initialise at random. `mismatched` are name, shape in the weights, and shape by the config."""
    shapes = [
        f"{name} is {tuple(theirs)} there and {tuple(ours)} in the config"
        for name, theirs, ours in sorted(mismatched)
    ]
    if shapes:
        raise ConfigError(
            f"{weights} do not fit its config: {first_of(shapes)}. Take what model.config changes out, or "
            "set model.from_scratch=true for random weights"
        )


def first_of(names: Sequence[str], most: int = 5) -> str:
    """Return the first names, and dots if there are more."""
    return f"{', '.join(names[:most])}{' ...' if len(names) > most else ''}"


def check_tensors(model: ModelConfig, hf_config: Mapping[str, Any]) -> None:
    """Raise ConfigError for weights that would not load (a git-lfs pointer, a file cut off, no weights file),
    or lora_targets that match no module of the families in _KNOWN. `hf_config` has model.config's changes."""
    if model.path is None or model.from_scratch:
        return
    tensors = read_tensors(Path(model.path))
    is_known = hf_config.get("model_type") in _KNOWN and not hf_config.get("quantization_config")
    if tensors and model.lora_rank and is_known:
        _check_lora_targets(model, tensors)


def check_headers(folder: Path, hf_config: Mapping[str, Any]) -> None:
    """Raise ConfigError for weights that are not those of config.json: another number of layers, another
    vocabulary, a tensor that is missing or has another name."""
    tensors, family = read_tensors(folder), str(hf_config.get("model_type"))
    needed = _TENSORS.get(family)
    is_readable = all(path.suffix == ".safetensors" for path in weight_files(folder))
    if not is_readable or needed is None or hf_config.get("quantization_config"):
        return  # other families name and nest their layers in other ways
    weights, values = f"the weights in {folder}", resolve(hf_config)[1]
    layers: dict[int, set[str]] = {}
    for name in tensors:
        if match := _LAYER.search(name):
            layers.setdefault(int(match[1]), set()).add(match[2])
    depth = values["num_hidden_layers"]
    if layers.keys() != set(range(depth)):
        raise ConfigError(
            f"{weights} have {len(layers)} layers, config.json says num_hidden_layers={depth}: take the "
            "config.json that belongs to them, or set model.from_scratch=true"
        )
    lost = [
        f"layers.{n}.{name}" for n, found in sorted(layers.items()) for name in needed if name not in found
    ]
    ends = [name for name in tensors if name.endswith(("embed_tokens.weight", "wte.weight"))]
    lost += [] if ends else ["the embedding"]
    if lost:
        raise ConfigError(
            f"{weights} lack {first_of(lost, 3)} of a {family} model, which config.json names: restore the "
            "files, or set model.from_scratch=true"
        )
    size = values["vocab_size"], values["hidden_size"]
    refuse_misshapen(weights, ((name, tensors[name], size) for name in ends if tensors[name] != size))


def read_tensors(folder: Path) -> dict[str, Shape]:
    """Return the name and shape of every tensor in a folder's safetensors files, none of older formats. Raise
    ConfigError for a file that cannot be read."""
    tensors: dict[str, Shape] = {}
    for path in weight_files(folder):
        with path.open("rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                raise ConfigError(
                    f"{path} is a pointer of git-lfs, not the weights: fetch them by `git lfs pull` in "
                    f"{path.parent}"
                )
        if path.suffix == ".safetensors":
            tensors |= _read_header(path)
        elif not _is_torch_file(path):
            raise ConfigError(f"{path} is no weights file of PyTorch, or is cut off: copy it again")
    return tensors


def _is_torch_file(path: Path) -> bool:
    """True for files of torch.save: a zip archive, or before PyTorch 1.6 a pickled number first."""
    with path.open("rb") as file:
        return zipfile.is_zipfile(file) or (file.seek(0) == 0 and file.read(len(_OLD_TORCH)) == _OLD_TORCH)


def _read_header(path: Path) -> dict[str, Shape]:
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, _MOST_HEADER_BYTES):
                raise ValueError(f"its header is {length:,} bytes, the file {size:,}")
            header = json.loads(file.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        found = {name: tuple(map(int, entry["shape"])) for name, entry in entries.items()}
        end = 8 + length + max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise ConfigError(f"{path} is no safetensors file ({error}): copy it again") from None
    if size < end:
        raise ConfigError(f"{path} is cut off: it has {size:,} of {end:,} bytes; copy it again")
    return found


def _check_lora_targets(model: ModelConfig, tensors: Mapping[str, Shape]) -> None:
    """Match like peft: a module is a target if its name is one, or ends in one after a dot."""
    matrices = (name for name, shape in tensors.items() if len(shape) == 2)
    modules = [name.removesuffix(".weight") for name in matrices]
    is_tied = not any(module.endswith("lm_head") for module in modules)
    if is_tied and (hit := [target for target in model.lora_targets if target in _ENDS]):
        raise ConfigError(
            f"model.lora_targets names {', '.join(hit)}, and the embedding and output head of {model.path} "
            "share their weights: leave it out, for an export cannot hold an adapter on one of them"
        )
    if not model.lora_targets or any(f".{m}".endswith(f".{t}") for m in modules for t in model.lora_targets):
        return
    raise ConfigError(
        f"model.lora_targets={model.lora_targets}: no module in the weights of {model.path} is called so; "
        f"there are {', '.join(sorted({module.rpartition('.')[2] for module in modules}))}"
    )
