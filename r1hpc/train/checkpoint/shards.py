"""Split a checkpoint's weights into equal parts, one written by each rank; join them when loading.

Below ZeRO 3 every rank holds all weights, and DeepSpeed has rank 0 write them alone: 14 GB for 7 B
parameters. Here they form one row of bytes in the order of their names. Each rank writes its piece,
`weights_rank_<n>.pt`, next to DeepSpeed's file, which keeps everything else. The optimizer state without ZeRO
stays there: for bf16 DeepSpeed keeps a part of it on each rank even then (BF16_Optimizer), so pieces of
several ranks would mix them.

`own_files` and `check_whole` tell by name which files a rank wrote, and whether any is missing.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from r1hpc.checkpoint.errors import CheckpointWriteError
from r1hpc.train.parallel.compression import PREFIX as COMPRESSION
from r1hpc.train.parallel.distributed import Group
from r1hpc.train.parallel.errors import ResumeError

PREFIX = "weights_rank_"
Weights = dict[str, torch.Tensor]
Piece = tuple[str, tuple[int, ...], int, torch.Tensor, tuple[str, ...]]
"""(name, shape, start, values, other names of a tied weight): elements [start, start + len(values)) of one
flattened weight."""


def part_name(rank: int) -> str:
    return f"{PREFIX}{rank}.pt"


def take_weights(state: dict[str, Any]) -> tuple[dict[str, Any], Weights]:
    """Return DeepSpeed's model state without weights (zero_to_fp32.py needs its buffers), and the weights."""
    module: Mapping[str, Any] = state["module"]
    names = {name for name, value in module.items() if isinstance(value, torch.Tensor)}
    names -= set(state["buffer_names"])
    rest = {name: value for name, value in module.items() if name not in names}
    return {**state, "module": rest}, {name: module[name] for name in module if name in names}


def pieces_of(weights: Weights, rank: int, world_size: int) -> list[Piece]:
    """Return rank `rank`'s pieces: its `world_size`-th of all bytes, as views if a weight is contiguous."""
    aliases = _aliases(weights)
    total = sum(weights[names[0]].nbytes for names in aliases)
    first, last = (total * edge // world_size for edge in (rank, rank + 1))
    pieces: list[Piece] = []
    offset = 0
    for name, *same in aliases:
        weight = weights[name].detach()
        # Both ranks at an edge compute the same element from the same byte.
        edges = ((edge - offset) // weight.itemsize for edge in (first, last))
        start, stop = (min(max(edge, 0), weight.numel()) for edge in edges)
        if start < stop or (weight.numel() == 0 and rank == 0):
            values = weight.reshape(-1)[start:stop]
            pieces.append((name, tuple(weight.shape), start, values, tuple(same)))
        offset += weight.nbytes
    return pieces


def join_weights(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Put the parts in `folder` into the model state read from there; raise ResumeError if one is missing."""
    module, filled = state["module"], Counter[str]()
    files = sorted(folder.glob(f"{PREFIX}*.pt"))
    pieces = (piece for path in files for piece in torch.load(path, weights_only=True, mmap=True))
    for name, shape, start, values, same in pieces:
        if name not in module:
            # A weight that lies in one file stays mapped there: copies of all weights on each rank would take
            # more host memory than the training.
            is_whole = values.numel() == math.prod(shape)
            module[name] = values.view(shape) if is_whole else torch.empty(shape, dtype=values.dtype)
            module.update(dict.fromkeys(same, module[name]))
            if is_whole:
                filled[name] = values.numel()
                continue
        module[name].view(-1)[start : start + values.numel()] = values
        filled[name] += values.numel()
    for name, count in filled.items():
        if count != module[name].numel():
            raise ResumeError(f"{folder} holds {count} of the {module[name].numel()} elements of {name}")
    return state


def _aliases(weights: Weights) -> list[list[str]]:
    """Return the names, sorted, grouped by tensor."""
    groups: dict[Any, list[str]] = {}
    for name in sorted(weights):
        weight = weights[name]
        where = (weight.data_ptr(), weight.shape, weight.dtype) if weight.numel() else name
        groups.setdefault(where, []).append(name)
    return list(groups.values())


def streams_name(rank: int) -> str:
    """Return the name of the file with a rank's random streams."""
    return f"streams_rank_{rank}.pt"


def own_files(staging: Path, group: Group) -> list[str]:
    """Return the files this rank wrote: those with its number, and for rank 0 those without any."""
    paths = (path for path in staging.rglob("*") if _owner(path.name, group.world_size) == group.rank)
    return sorted(path.relative_to(staging).as_posix() for path in paths if path.is_file())


def check_whole(staging: Path, names: list[str], endings: Iterable[str], rank: int) -> None:
    """Raise CheckpointWriteError unless `rank` wrote a file with each of these endings."""
    for ending in endings:
        if not any(name.endswith(ending) for name in names):
            raise CheckpointWriteError(f"rank {rank} finds no file *{ending} of its own in {staging}")


def _owner(name: str, world_size: int) -> int:
    """Return the rank that wrote a file, by DeepSpeed's naming (`zero_pp_rank_3_mp_rank_00…`) and ours."""
    for marker in ("zero_pp_rank_", "streams_rank_", "stage_rank_", PREFIX, COMPRESSION):
        _, found, tail = name.partition(marker)
        if found:
            rank = int(tail.replace(".", "_").split("_")[0])
            return rank if rank < world_size else 0
    return 0
