"""Export the model as a Hugging Face folder, written by all ranks together under any ZeRO stage.

The stages call it, and quantize/model_folders.py for a checkpoint. Rank 0 writes one file of weights at a
time and holds no more than that. Adapters are merged into the weights and also stored alone, in `adapter/`,
for peft. The folder appears by a rename once everything is on disk. A folder that names an attention of ours
(train/model/attention.py) needs r1hpc: transformers alone would compute something else.
"""

import copy
import json
import math
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from safetensors import SafetensorError
from safetensors.torch import save_file

from r1hpc.base.failpoints import failpoint
from r1hpc.base.files import fsync_dir, fsync_file, read_json, write_atomic, write_json
from r1hpc.tasks.text.tokenizer import TokenizerFiles
from r1hpc.train.model.attention import OURS, base_model
from r1hpc.train.model.low_precision import dequantized, is_nf4, is_turned, whole_size
from r1hpc.train.model.sequence import own_name
from r1hpc.train.parallel.distributed import Group, portions
from r1hpc.train.parallel.errors import SaveError

ADAPTER = "adapter"
"""Folder inside an export that holds the adapters alone."""
_OF_ADAPTER = re.compile(r"\.default(?=\.|$)")
MAX_FILE_SIZE = 4 * 2**30
"""Bytes of weights in one file, unless a single tensor is larger."""


@dataclass(frozen=True)
class Weight:
    """A tensor of the exported model: its name there, and its parts."""

    name: str
    tensor: torch.Tensor
    adapter: Any = None
    """peft's layer around it, whose matrices are merged into it."""
    is_turned: bool = False
    """True if it is transposed in four bits."""

    @property
    def num_bytes(self) -> int:
        if is_nf4(self.tensor):
            return math.prod(whole_size(self.tensor))
        # Under ZeRO 3 a rank's tensor is empty; DeepSpeed stores the full size beside it.
        numel: int = getattr(self.tensor, "ds_numel", self.tensor.numel())
        return numel * self.tensor.element_size()

    @contextmanager
    def whole(self) -> Iterator[torch.Tensor]:
        """Yield its value on every rank, on the device. Under ZeRO 3 collective: gathered, then released."""
        parts = [self.tensor]
        if self.adapter is not None:
            parts += [p for name, p in self.adapter.named_parameters() if name.startswith("lora_")]
        with GatheredParameters(parts), torch.no_grad():
            value = dequantized(self.tensor) if is_nf4(self.tensor) else self.tensor.detach()
            for name in self.adapter.active_adapters if self.adapter is not None else ():
                value = (value.float() + self.adapter.get_delta_weight(name).float()).to(value.dtype)
            yield value.T if self.is_turned else value


def export_model(network: Any, group: Group, folder: Path, tokenizer: TokenizerFiles | None) -> None:
    """Write config.json, safetensors, generation_config.json and the tokenizer into `folder`. Collective.

    The weights keep the module's precision: bf16 if DeepSpeed trains bf16. Adapters are merged. The
    tokenizer's files are those the run began with, and both configurations name every token that ends a
    completion, so a stage that starts from the folder prompts and stops like one that starts from the
    original. An earlier folder is moved aside, replaced and removed: between two renames there is no folder,
    but never a partial one. `network` is the transformers model in the engine's module, or a peft model
    around it. Raise SaveError on all ranks when rank 0 could not write; what was in `folder` is untouched.
    """
    staging = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
    parts = portions(weights_of(network), lambda weight: weight.num_bytes, MAX_FILE_SIZE)
    files = {"model.safetensors": parts[0]}
    if len(parts) > 1:
        files = {f"model-{n:05d}-of-{len(parts):05d}.safetensors": part for n, part in enumerate(parts, 1)}
    with _all_fail_with_rank_0(group, staging):
        if group.rank == 0:
            _prepare(folder, staging)
    for name, weights in files.items():
        tensors = {}
        for weight in weights:
            with weight.whole() as value:
                if group.rank == 0:  # a copy: the values of a rank can share one memory
                    tensors[weight.name] = value.cpu().clone().contiguous()
        with _all_fail_with_rank_0(group, staging):
            if group.rank == 0:
                save_file(tensors, staging / name, metadata={"format": "pt"})
                failpoint("export.file")
    adapters = {}
    for name, parameter in network.named_parameters():
        if ".lora_" in name:
            with GatheredParameters([parameter]):
                # peft's live names contain the adapter's name, its files do not.
                adapters[_OF_ADAPTER.sub("", name)] = parameter.detach().cpu().clone().contiguous()
    with _all_fail_with_rank_0(group, staging):
        if group.rank == 0:
            if adapters:
                _write_adapters(network, adapters, staging / ADAPTER)
            _write_small_files(network, tokenizer, staging, files)
            as_open_as_the_rest(staging)
            failpoint("export.small")
            _publish(staging, folder)


def _write_adapters(network: Any, adapters: dict[str, torch.Tensor], folder: Path) -> None:
    folder.mkdir()
    save_file(adapters, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    said = network.peft_config["default"].to_dict()
    # Sort the sets, whose order differs by process: equal adapters must give equal files.
    said = {key: sorted(value) if isinstance(value, set) else value for key, value in said.items()}
    _write(folder / "adapter_config.json", {**said, "inference_mode": True})
    fsync_dir(folder)


def weights_of(network: Any, *, every_name: bool = False) -> list[Weight]:
    """Return every tensor of the folder in the order of the state, once: a tied one under its first name,
    with `every_name` under each of its names."""
    base = base_model(network)
    adapters = {name: module for name, module in base.named_modules() if hasattr(module, "get_delta_weight")}
    turned = {f"{name}.weight" for name, module in base.named_modules() if is_turned(module)}
    seen: set[int] = set()
    weights = []
    for key, tensor in base.state_dict(keep_vars=True).items():
        owner, wrapped, rest = key.partition(".base_layer.")
        if (id(tensor) in seen and not every_name) or any(
            part.startswith("lora_") for part in key.split(".")
        ):
            continue
        seen.add(id(tensor))
        adapter = adapters.get(owner) if wrapped and rest == "weight" else None
        weights.append(Weight(f"{owner}.{rest}" if wrapped else key, tensor, adapter, key in turned))
    return weights


def exported_config(network: Any) -> dict[str, Any]:
    """Return the folder's config.json. It names an attention of ours; transformers' own never does."""
    base = base_model(network)
    config = copy.deepcopy(base.config)
    config.use_cache = True  # build_model turns it off for training
    config.dtype = next(p.dtype for p in base.parameters() if p.is_floating_point())
    config.architectures = [type(base).__name__]
    values = readable_by_older(json.loads(config.to_json_string()))
    attention = own_name(config._attn_implementation)
    if attention in OURS:
        values["attn_implementation"] = attention
    return values


def readable_by_older(values: dict[str, Any]) -> dict[str, Any]:
    """Return a transformers 5 config.json that transformers 4, and vLLM on it, read correctly.

    They do not know rope_parameters, and would silently use their default rotary base. Written from the
    fields of transformers 4's configurations; none of its versions has loaded the result here.
    """
    found = dict(values)
    if "dtype" in values:
        found.setdefault("torch_dtype", values["dtype"])
    rope = values.get("rope_parameters") or {}
    local = rope.get("sliding_attention")
    if local and str(values.get("model_type")).startswith("gemma3"):
        found.setdefault("rope_local_base_freq", local["rope_theta"])
    rope = rope.get("full_attention", rope)  # with one for each kind of layer, the others have no scaling
    if "rope_theta" not in rope:
        return found
    found.setdefault("rope_theta", rope["rope_theta"])
    if "partial_rotary_factor" in rope:
        name = "rotary_pct" if values.get("model_type") == "gpt_neox" else "partial_rotary_factor"
        found.setdefault(name, rope["partial_rotary_factor"])
    if rope.get("rope_type", "default") != "default":
        found.setdefault("rope_scaling", _scaling(str(values.get("model_type")), rope))
    return found


def _scaling(model_type: str, rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return all of rope_scaling, which transformers 5 prefers to rope_parameters."""
    if model_type == "phi3" and rope["rope_type"] == "longrope" and "attention_factor" not in rope:
        # transformers 4 refuses any fourth key there.
        return {"type": "longrope", **{key: rope[key] for key in ("short_factor", "long_factor")}}
    return {key: rope[key] for key in rope if key not in ("rope_theta", "partial_rotary_factor")}


def open_to_others(folder: Path) -> None:
    """Rewrite config and tokenizer of a transformers folder for older versions; set modes by the umask."""
    config, tokenizer = folder / "config.json", folder / "tokenizer_config.json"
    write_json(config, readable_by_older(read_json(config, dict[str, Any])), mode=0o666)
    if tokenizer.is_file():
        values = read_json(tokenizer, dict[str, Any])
        if values.get("tokenizer_class") == "TokenizersBackend":  # transformers 5's name for it
            write_json(tokenizer, {**values, "tokenizer_class": "PreTrainedTokenizerFast"}, mode=0o666)
    as_open_as_the_rest(folder)


def as_open_as_the_rest(folder: Path) -> None:
    """Set the modes that the umask allows: safetensors makes files readable by their owner only."""
    mode = stat.S_IMODE((folder / "config.json").stat().st_mode)
    for file in folder.rglob("*.safetensors"):
        file.chmod(mode)


@contextmanager
def _all_fail_with_rank_0(group: Group, staging: Path) -> Iterator[None]:
    """Raise rank 0's error on all ranks, so that none waits in the next collective."""
    failure = None
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own
        failure = f"could not write the model into {staging.parent}: {error}"
        shutil.rmtree(staging, ignore_errors=True)  # room again on a full disk
    failure = group.broadcast(failure)
    if failure is not None:
        raise SaveError(failure)


def _write_small_files(
    network: Any, tokenizer: TokenizerFiles | None, staging: Path, files: dict[str, list[Weight]]
) -> None:
    values = exported_config(network)
    generation = copy.deepcopy(getattr(base_model(network), "generation_config", None))
    if generation is not None:
        generation.use_cache = True
        said = json.loads(generation.to_json_string())
        _write(staging / "generation_config.json", _with_ends(said, tokenizer))
    _write(staging / "config.json", _with_ends(values, tokenizer))
    if len(files) > 1:
        sizes = [weight.num_bytes for weights in files.values() for weight in weights]
        weight_map = {weight.name: name for name, weights in files.items() for weight in weights}
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        _write(staging / "model.safetensors.index.json", index)
    for name, content in (tokenizer.files if tokenizer is not None else {}).items():
        write_atomic(staging / name, content, mode=0o666)


def _with_ends(values: dict[str, Any], tokenizer: TokenizerFiles | None) -> dict[str, Any]:
    """Return a configuration that names the tokens that end a completion; unchanged if it does already."""
    named = values.get("eos_token_id")
    if tokenizer is None or {*(named if isinstance(named, list) else [named])} == {*tokenizer.stops}:
        return values
    stops = tokenizer.stops
    return {**values, "eos_token_id": stops[0] if len(stops) == 1 else list(stops)}


def _write(path: Path, value: Any) -> None:
    write_json(path, value, mode=0o666)  # as far as the umask allows, like the weights


def _prepare(folder: Path, staging: Path) -> None:
    """Create an empty staging folder, and remove leftovers of a killed export."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    moved_aside = _moved_aside(folder)
    if moved_aside.exists() and not folder.exists():
        moved_aside.rename(folder)
    for leftover in [moved_aside, *folder.parent.glob(f".{folder.name}.*.partial")]:
        shutil.rmtree(leftover, ignore_errors=True)
    staging.mkdir()


def _publish(staging: Path, folder: Path) -> None:
    for path in filter(Path.is_file, staging.rglob("*")):
        fsync_file(path)
    fsync_dir(staging)
    if folder.exists():
        folder.rename(_moved_aside(folder))
        failpoint("export.moved_aside")
    staging.rename(folder)
    fsync_dir(folder.parent)
    shutil.rmtree(_moved_aside(folder), ignore_errors=True)


def _moved_aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.replaced")
