"""Write a checkpoint in a background thread of each rank, from copies in host memory, while training goes on.

snapshot.py starts and awaits it. Each rank writes and digests its files and reports to the attempt's
key-value store. Rank 0's thread collects the reports and commits. No collectives are used: training's own run
at the same time. A copy's memory is reused by the next copy under the same key, so nothing may still read it.
Copies of GPU tensors are pinned and run concurrently.
"""

import io
import json
import pickle
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from r1hpc.base.errors import R1hpcError
from r1hpc.checkpoint.manifest import FileRecord
from r1hpc.train.parallel.distributed import Group, connected_again
from r1hpc.train.parallel.errors import SaveError

Records = list[FileRecord]
Report = dict[str, Any]
"""One rank's report: {"records": [...]} or {"problem": "..."}."""
_POLL_S = 0.05
_LOOK_S = 1.0
_HEAD_START_S = 0.005
"""Head start for the training thread: Python takes the lock from a thread only after so long."""
_RESERVE = 0.8
"""Share of the free memory that copies may take; the rest is for the job."""


class Exchange:
    """Exchanges reports between the ranks' threads, on their own connection to the attempt's store."""

    def __init__(self, group: Group) -> None:
        assert group.world_size == 1 or group.store is not None, "several ranks need a store"
        self.rank = group.rank
        self.world_size = group.world_size
        self._store = None
        if group.store is not None and group.world_size > 1:
            self._store = connected_again(group.store)

    def report(self, number: int, part: Report) -> None:
        """Report to rank 0 how this rank's part of write `number` went."""
        if self._store is not None:
            self._store.set(_key(number, self.rank), json.dumps(part))

    def collect(self, number: int, own: Report) -> list[Report]:
        """Return all ranks' reports once they have arrived; on rank 0."""
        if self._store is None:
            return [own]
        keys = [_key(number, rank) for rank in range(self.world_size)]
        while not self._store.check(keys):
            time.sleep(_POLL_S)
        reports = [json.loads(self._store.get(key)) for key in keys]
        for key in keys:
            self._store.delete_key(key)
        return reports


class Write:
    """This rank's part of the write of one checkpoint, and on rank 0 its commit."""

    def __init__(
        self,
        step: int,
        number: int,
        exchange: Exchange,
        write_own: Callable[["Write"], Records],
        commit: Callable[[list[Report]], int],
        clean_up: Callable[[], None],
    ) -> None:
        """
        Args:
            number: of this write among those of the attempt, the same on all ranks.
            write_own: writes and seals this rank's files; gives up once `stop` is set, and calls `wrote`
                after each piece.
            commit: on rank 0, with all ranks' reports, good or bad; returns the bytes that it committed.
            clean_up: called on rank 0 after the commit; may take long.
        """
        self.step = step
        self.problem = ""
        """The error, here or (on rank 0) anywhere; empty if there is none."""
        self.error: BaseException | None = None
        """An exception that is not a failed save, such as lack of memory; this rank must raise it."""
        self.committed_bytes: int | None = None
        self.started_at = time.monotonic()
        self.seconds = 0.0
        """Seconds until the commit, on rank 0."""
        self._number = number
        self._exchange = exchange
        self.stop = threading.Event()
        self._pieces = 0
        self._own_done = threading.Event()
        self._decided = threading.Event()
        self._actions = write_own, commit, clean_up
        self._thread = threading.Thread(target=self._run, name=f"save step {step}", daemon=True)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        """True on rank 0 if committed or failed on any rank; on other ranks, if failed here."""
        return not self._thread.is_alive() and (self._exchange.rank == 0 or bool(self.problem))

    def abandon(self) -> None:
        """Give up the write unless it is too late. `wait` tells the outcome."""
        self.stop.set()

    def wrote(self) -> None:
        """Note progress: a piece is written, or a file is on disk and digested."""
        self._pieces += 1

    def wait_for_own(self, beat: Callable[[], object] = lambda: None) -> None:
        """Wait until this rank's files are written or have failed; `beat` as long as pieces are written."""
        seen = self._pieces
        while not self._own_done.wait(_LOOK_S):
            if self._pieces != seen:
                seen = self._pieces
                beat()

    def settle(self, patience_s: float, beat: Callable[[], object] = lambda: None) -> None:
        """Wait for commit or failure, with `beat` as long as this rank writes. Not collective. Abandon it
        `patience_s` after this rank's last piece: another rank may be dead."""
        seen, last = self._pieces, time.monotonic()
        while not self._decided.wait(min(_LOOK_S, patience_s)):
            if self._pieces != seen:
                seen, last = self._pieces, time.monotonic()
                beat()
            elif time.monotonic() - last >= patience_s:
                if not self._own_done.is_set():
                    self.abandon()
                    self._decided.wait(patience_s)
                return

    def wait(self, *, hurry: bool) -> None:
        """Wait until nothing is left to do; in a hurry, until it is committed or failed."""
        if hurry:
            self._decided.wait()
        else:
            self._thread.join()

    def _run(self) -> None:
        write_own, commit, clean_up = self._actions
        time.sleep(_HEAD_START_S)
        try:
            own = self._write(write_own)
            self._own_done.set()
            self._exchange.report(self._number, own)
            if self._exchange.rank == 0:
                self.committed_bytes = commit(self._exchange.collect(self._number, own))
                self.seconds = time.monotonic() - self.started_at
                self._decided.set()
                clean_up()
        except (R1hpcError, RuntimeError) as error:  # RuntimeError: the store is gone, with rank 0
            self.problem = str(error)
        except BaseException as error:
            self.error, self.problem = error, repr(error)
        finally:
            self._own_done.set()
            self._decided.set()

    def _write(self, write_own: Callable[["Write"], Records]) -> Report:
        try:
            return {"records": [asdict(record) for record in write_own(self)]}
        except R1hpcError as error:
            self.problem = str(error)
        except BaseException as error:
            self.error, self.problem = error, repr(error)
        return {"problem": self.problem}


def records_of(reports: list[Report]) -> Records:
    """Return all ranks' records; raise SaveError if a rank failed."""
    problems = dict.fromkeys(report["problem"] for report in reports if "problem" in report)
    if problems:
        raise SaveError("; ".join(problems))
    return [FileRecord(**record) for report in reports for record in report["records"]]


def _key(number: int, rank: int) -> str:
    return f"r1hpc/save/{number}/{rank}"


class HostCopies:
    """The copies of one rank, and their memory."""

    def __init__(self) -> None:
        self._buffers: dict[str, list[torch.Tensor]] = {}

    def holds(self, key: str) -> bool:
        """True if there is memory for this key already."""
        return key in self._buffers

    def copy(self, key: str, state: Any) -> Any:
        """Return `state` with every tensor copied; other objects are copied by pickle."""
        old, new = self._buffers.pop(key, []), list[torch.Tensor]()
        pickled = io.BytesIO()
        pickler = _Pickler(pickled, pickle.HIGHEST_PROTOCOL)
        pickler.dump(state)
        for source in pickler.tensors:
            spare = old[len(new)] if len(new) < len(old) else None
            new.append(_copied(source, spare))
        if any(source.is_cuda for source in pickler.tensors):
            torch.cuda.current_stream().synchronize()
        self._buffers[key] = new
        pickled.seek(0)
        return _Unpickler(pickled, new).load()


def num_bytes(state: Any) -> int:
    """Return the bytes a copy of a state takes. torch allocates pinned memory in powers of two."""
    pickler = _Pickler(io.BytesIO(), pickle.HIGHEST_PROTOCOL)
    pickler.dump(state)
    return sum(1 << (t.nbytes - 1).bit_length() if t.is_cuda else t.nbytes for t in pickler.tensors)


def room_for_copies(cgroup: Path = Path("/sys/fs/cgroup"), proc: Path = Path("/proc")) -> int:
    """Return the bytes that copies may take on this host: free memory within the job's cgroup limits."""
    lines = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
    free = [int(lines["MemAvailable"].split()[0]) * 1024]
    for line in (proc / "self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            root = cgroup / controllers
            folder = root / path.lstrip("/")
            free += _left_in(folder for folder in (folder, *folder.parents) if folder.is_relative_to(root))
    return int(_RESERVE * max(0, min(free)))


def _left_in(folders: Iterable[Path]) -> list[int]:
    """Return the free bytes of each cgroup with a limit; page cache counts as free, since it gives way."""
    left = []
    for folder in folders:
        for limit, usage in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            try:
                most, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except OSError:
                continue
            if most.isdigit():
                left.append(int(most) - used + int(stat.get("inactive_file", 0)))
    return left


class _Pickler(pickle.Pickler):
    """Pickle with a number in place of each tensor. A tensor under two names is stored once."""

    def __init__(self, file: Any, protocol: int) -> None:
        super().__init__(file, protocol)
        self.tensors: list[torch.Tensor] = []
        self._numbers: dict[Any, int] = {}

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, torch.Tensor):
            return None
        where: Any = id(obj)
        if obj.numel():
            where = (obj.data_ptr(), obj.device, obj.shape, obj.stride(), obj.dtype, type(obj))
        if where not in self._numbers:
            self._numbers[where] = len(self.tensors)
            self.tensors.append(obj)
        return self._numbers[where]


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, tensors: list[torch.Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, pid: int) -> torch.Tensor:
        return self._tensors[pid]


def _copied(source: torch.Tensor, spare: torch.Tensor | None) -> torch.Tensor:
    data = source.detach()
    if spare is None or spare.shape != data.shape or spare.dtype != data.dtype:
        if data.is_cuda or not data.numel():  # pinned for a GPU tensor
            spare = torch.empty(data.shape, dtype=data.dtype, pin_memory=data.is_cuda)
        else:  # unlike torch, numpy requests huge pages (madvise): copying takes 7 % less time
            raw = torch.from_numpy(np.empty(data.nbytes, dtype=np.uint8))
            spare = raw.view(data.dtype).view(data.shape)
    target = spare.detach()
    target.copy_(data, non_blocking=True)
    if isinstance(source, torch.nn.Parameter):
        return torch.nn.Parameter(target, requires_grad=source.requires_grad)
    return target
