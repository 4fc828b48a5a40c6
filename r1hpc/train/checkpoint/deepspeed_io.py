"""Save and load through DeepSpeed, which hands over each file's state and leaves the writing to r1hpc.

DeepSpeed's own writers do not fit: DecoupledCheckpointEngine commits a step late and never the last one, and
neither it nor FastCheckpointEngine can load what it wrote (DeepSpeed 0.19.8; issue 8500).

Below ZeRO 3 every rank holds all weights, and DeepSpeed has rank 0 write them alone: 14 GB for 7 B
parameters. Here they form one row of bytes in the order of their names. Each rank writes its piece,
`weights_rank_<n>.pt`, next to DeepSpeed's file, which keeps everything else; loading joins them. The
optimizer state without ZeRO stays there: for bf16 DeepSpeed keeps a part of it on each rank even then
(BF16_Optimizer), so pieces of several ranks would mix them.

`own_files` and `check_whole` tell by name which files a rank wrote, and whether any is missing. `convert`
rewrites a checkpoint for another number of ranks or ZeRO stage.
"""

import errno
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

from r1hpc.base.errors import R1hpcError
from r1hpc.base.units import format_bytes
from r1hpc.checkpoint.disk import CheckpointWriteError
from r1hpc.train.checkpoint.async_save import HostCopies, num_bytes, room_for_copies
from r1hpc.train.model.low_precision import holds_nf4, unsaved
from r1hpc.train.parallel.compression import PREFIX as COMPRESSION
from r1hpc.train.parallel.distributed import Group
from r1hpc.train.parallel.errors import ConversionError, ResumeError

PREFIX = "weights_rank_"
_RANK = re.compile(rf"(?:zero_pp_rank_|streams_rank_|stage_rank_|{PREFIX}|{COMPRESSION})(\d+)")
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
    found = _RANK.search(name)
    rank = int(found[1]) if found else 0
    return rank if rank < world_size else 0


_PIECE_BYTES = 64 << 20
"""Bytes per write; a write can be abandoned in between."""
_SYNC_BYTES = 4 << 30
"""Bytes between two waits for the disk. Otherwise the page cache takes a complete checkpoint, and the fsync
at its end gives no sign of life for too long."""
_POLL_S = 0.2
_NO_ROOM = ("MemoryError", *map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EIO)))
_PHASE = "converting the checkpoint for another number of ranks"
File = tuple[Path, Any]


class AbandonedError(R1hpcError):
    """The write was given up, because a newer state must be written in the time left."""


class CheckpointFiles(CheckpointEngine):  # type: ignore[misc]
    """DeepSpeed's checkpoint engine: one per rank, for saving and loading."""

    def __init__(self, group: Group, zero_stage: int, *, asynchronous: bool, ranks_per_node: int) -> None:
        """
        Args:
            asynchronous: keep copies in host memory, for the caller of `take` to write; else, or if
                the host has no room for them, write while DeepSpeed waits.
            ranks_per_node: ranks that share the host's memory.
        """
        super().__init__()
        self.name = type(self).__name__
        self._group = group
        self._zero_stage = zero_stage
        self.in_parts = zero_stage < 3 and group.world_size > 1
        self._copies = HostCopies() if asynchronous else None
        self._ranks_per_node = ranks_per_node
        self._waiting: list[File] = []
        self.leaves_frozen_out = False
        """True if the frozen weights are in four bits, which no checkpoint holds."""
        self._left_out: set[str] = set()

    def attach(self, engine: Any) -> None:
        """Make `engine` save and load through this."""
        if engine.checkpoint_engine is self:
            return
        engine.checkpoint_engine = self
        self.leaves_frozen_out = holds_nf4(engine.module)
        self._left_out = unsaved(engine.module) if self.leaves_frozen_out else set()
        if self._zero_stage == 2:
            # Under ZeRO 2 DeepSpeed (0.19.8) saves the frozen weights a second time and copies them to host
            # memory on every rank; its loader works with their names alone.
            attributes = engine._get_zero_frozen_param_attributes
            engine._get_zero_frozen_param_attributes = lambda of: (
                None if of == engine._get_param_fragment_func else attributes(of)
            )
        if self.in_parts:
            engine.save_non_zero_checkpoint = True  # every rank saves the model state

    def take(self) -> list[File]:
        """Return the files still to be written, once."""
        waiting, self._waiting = self._waiting, []
        return waiting

    def create(self, info: Any) -> None:
        """Do nothing: DeepSpeed announces a checkpoint."""

    def commit(self, info: Any) -> bool:
        """Do nothing: DeepSpeed believes the files are written."""
        return True

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        file = Path(path)
        for name in self._left_out & (state_dict.get("module") or {}).keys():
            del state_dict["module"][name]
        if self.in_parts and file.name.startswith("mp_rank_"):
            state_dict, weights = take_weights(state_dict)
            pieces = pieces_of(weights, self._group.rank, self._group.world_size)
            self.keep(file.with_name(part_name(self._group.rank)), pieces, are_views=True)
            if self._group.rank != 0:
                return
        self.keep(file, state_dict)

    def load(self, path: str, map_location: Any = None) -> Any:
        self._group.beat()
        return load_file(Path(path), map_location)

    def keep(self, path: Path, state: Any, *, are_views: bool = False) -> None:
        """Copy `state` for `take`, or write it at once. `are_views`: its tensors are views of larger ones."""
        if self._copies is not None and self._has_room(path.name, state):
            self._waiting.append((path, self._copies.copy(path.name, state)))
        else:
            # torch.save writes a view's complete storage: here, all weights on each rank.
            state = HostCopies().copy(path.name, state) if are_views else state
            write_file(path, state, wrote=self._group.beat)

    def _has_room(self, key: str, state: Any) -> bool:
        assert self._copies is not None
        if self._copies.holds(key):
            return True
        needed, room = num_bytes(state), room_for_copies() // self._ranks_per_node
        if needed > room:
            print(
                f"{key} is written while training waits: {format_bytes(needed)} of host memory for a copy, "
                f"{format_bytes(room)} free for each of {self._ranks_per_node} rank(s)",
                flush=True,
            )
        return needed <= room


def write_file(
    path: Path, state: Any, stop: threading.Event | None = None, wrote: Callable[[], object] = lambda: None
) -> None:
    """Write with torch.save, and call `wrote` after each piece of at most 64 MiB. Raise AbandonedError soon
    after `stop` is set, and OSError if a write fails."""
    # Given a Python file instead of a path, torch releases the interpreter lock while it writes.
    with open(path, "wb") as file:
        pieces = _Pieces(file, stop or threading.Event(), wrote)
        try:
            torch.save(state, pieces)  # type: ignore[arg-type]
        except RuntimeError:
            if pieces.failure is not None:  # torch then fails on the file's end; raise the cause
                raise pieces.failure from None
            raise


def load_file(path: Path, map_location: Any = "cpu") -> Any:
    """Load the file at `path`; weights saved in parts are joined."""
    # DeepSpeed writes pickles. The folder is the user's own, and each byte was verified.
    state = torch.load(path, map_location=map_location, weights_only=False)
    return join_weights(state, path.parent) if path.name.startswith("mp_rank_") else state


class _Pieces:
    def __init__(self, file: BinaryIO, stop: threading.Event, wrote: Callable[[], object]) -> None:
        self._file = file
        self._stop = stop
        self._wrote = wrote
        self._since_sync = 0
        self.failure: AbandonedError | OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            for start in range(0, len(view), _PIECE_BYTES):
                if self._stop.is_set():
                    raise AbandonedError("abandoned")
                self._since_sync += self._file.write(view[start : start + _PIECE_BYTES])
                if self._since_sync >= _SYNC_BYTES:
                    self._file.flush()
                    os.fsync(self._file.fileno())
                    self._since_sync = 0
                self._wrote()
        except (AbandonedError, OSError) as error:
            self.failure = self.failure or error
            raise
        return len(view)

    def flush(self) -> None:
        self._file.flush()


def convert(source: Path, target: Path, zero_stage: int, beat: Callable[[str], None]) -> None:
    """Write the universal form of DeepSpeed's files in `source`; replaces an unfinished one.

    A large model takes longer than a rank may be silent, so `beat` is called all the while. Raise
    ConversionError if DeepSpeed was killed, or had no room or memory, ResumeError if it could not read the
    checkpoint.
    """
    for leftover in target.parent.parent.glob("universal-*"):  # of a killed conversion
        shutil.rmtree(leftover, ignore_errors=True)
    target.parent.mkdir(mode=0o700)
    try:
        _convert(source, target, zero_stage, beat)
    except BaseException:
        shutil.rmtree(target.parent, ignore_errors=True)
        raise


def _convert(source: Path, target: Path, zero_stage: int, beat: Callable[[str], None]) -> None:
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(_joined(source, target.parent, beat)), "--output_folder", str(target)]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    if zero_stage < 3:
        command += ["--inject_missing_state"]
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    log = target.parent / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file, env=clean)
    try:
        while process.poll() is None:
            beat(_PHASE)
            time.sleep(_POLL_S)
    finally:
        process.kill()  # it must not write on into a folder that is removed
        process.wait()
    if process.returncode:
        said = log.read_text(errors="replace")
        print(said, file=sys.stderr, flush=True)
        how = f"status {process.returncode}" if process.returncode > 0 else f"signal {-process.returncode}"
        is_of_the_machine = process.returncode < 0 or any(words in said for words in _NO_ROOM)
        kind = ConversionError if is_of_the_machine else ResumeError
        raise kind(f"DeepSpeed could not convert {source.parent} ({how}):\n{said[-2000:]}")


def _joined(folder: Path, scratch: Path, beat: Callable[[str], None]) -> Path:
    """Return `folder` as DeepSpeed's converter reads it: a copy with joined weights if they are in parts."""
    if not (folder / part_name(0)).exists():
        return folder
    joined = scratch / "joined"
    joined.mkdir(mode=0o700)
    for path in folder.iterdir():
        beat(_PHASE)
        if path.name.startswith("mp_rank_"):
            write_file(joined / path.name, load_file(path))
        elif not path.name.startswith(PREFIX):
            (joined / path.name).symlink_to(path.resolve())
    return joined
