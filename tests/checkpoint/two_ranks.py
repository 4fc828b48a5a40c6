"""A run of two ranks without DeepSpeed: real files, records gathered over a pipe, killed at random.

Rank 0 begins an incarnation; both choose the newest checkpoint that verifies, by the call that training
makes, and then save every step as fast as they can. Rank 0 notes each commit that returned in the file
`acknowledged`.
"""

import base64
import json
import os
import pickle
import random
import signal
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from r1hpc.checkpoint.manifest import FileRecord
from r1hpc.checkpoint.store import Checkpoint, CheckpointStore
from tests.checkpoint.harness import KILLED, SUPERSEDED, content, end_of, start_child, verified_steps

ALONE = 5
"""Exit status of a rank whose other rank is gone."""
SIZES = {"model.pt": 200_000, "optim.pt": 60_000, "rng.json": 200}


class Pair:
    """Two forked ranks. They run until something ends them."""

    def __init__(self, root: Path, attempt: int) -> None:
        to_1, from_0 = os.pipe()
        to_0, from_1 = os.pipe()
        self.rank_0 = start_child(lambda: rank_0(root, attempt, from_0, to_0, close=(to_1, from_1)))
        self.rank_1 = start_child(lambda: rank_1(root, attempt, from_1, to_1, close=(to_0, from_0)))
        for end in (to_1, from_0, to_0, from_1):
            os.close(end)
        self.pids = (self.rank_0, self.rank_1)

    def signal(self, number: signal.Signals, *pids: int) -> None:
        for pid in pids or self.pids:
            os.kill(pid, number)

    def wait(self) -> tuple[int, int]:
        return end_of(self.rank_0), end_of(self.rank_1)


class PipeRanks:
    """Two ranks that choose together over the pipes: r1hpc.checkpoint.store.Ranks."""

    world_size = 2

    def __init__(self, rank: int, to_other: int, from_other: TextIO) -> None:
        self.rank = rank
        self._to_other = to_other
        self._from_other = from_other

    def gather(self, value: Any) -> list[Any]:
        self._send(value)
        theirs = self._receive()
        return [value, theirs] if self.rank == 0 else [theirs, value]

    def broadcast(self, value: Any) -> Any:
        if self.rank:
            return self._receive()
        self._send(value)
        return value

    def beat(self) -> None:
        """Nobody watches."""

    def _send(self, value: Any) -> None:
        tell(self._to_other, base64.b64encode(pickle.dumps(value)).decode())

    def _receive(self) -> Any:
        line = self._from_other.readline()
        if not line:
            os._exit(ALONE)
        return pickle.loads(base64.b64decode(line))


def rank_0(root: Path, attempt: int, to_rank_1: int, from_rank_1: int, close: tuple[int, int]) -> None:
    for end in close:
        os.close(end)
    store = CheckpointStore(root)
    store.begin(attempt, "t")
    replies = os.fdopen(from_rank_1)
    newest = store.newest_verified(PipeRanks(0, to_rank_1, replies))
    step = newest.step if newest else 0
    while True:
        step += 1
        folder = store.open_staging(step, attempt, "t")
        tell(to_rank_1, str(step))
        records = write_share(store, folder, step, rank=0)
        reply = replies.readline()
        if not reply:
            os._exit(ALONE)
        records += [FileRecord(**record) for record in json.loads(reply)]
        store.commit(step, attempt, "t", records, {"global_step": step})
        acknowledge(root, step)
        store.prune([newest.step] if newest else [])


def rank_1(root: Path, attempt: int, to_rank_0: int, from_rank_0: int, close: tuple[int, int]) -> None:
    for end in close:
        os.close(end)
    store = CheckpointStore(root)
    orders = os.fdopen(from_rank_0)
    newest = store.newest_verified(PipeRanks(1, to_rank_0, orders))
    for expected_step, line in enumerate(orders, newest.step + 1 if newest else 1):
        step = int(line)
        assert step == expected_step, "the ranks resumed from different steps"
        records = write_share(store, store.staging(step, attempt, "t"), step, rank=1)
        tell(to_rank_0, json.dumps([asdict(record) for record in records]))
    os._exit(ALONE)


def tell(pipe: int, line: str) -> None:
    try:
        os.write(pipe, f"{line}\n".encode())
    except BrokenPipeError:
        os._exit(ALONE)


def write_share(store: CheckpointStore, folder: Path, step: int, rank: int) -> list[FileRecord]:
    names = [name for name in expected(step) if name.startswith(f"rank_{rank}/")]
    with store.writing(folder):
        (folder / f"rank_{rank}").mkdir()
        for name in names:
            (folder / name).write_bytes(expected(step)[name])
    return store.seal(folder, names)


def expected(step: int) -> dict[str, bytes]:
    return {
        f"rank_{rank}/{name}": content(step, f"rank_{rank}/{name}", size)
        for rank in (0, 1)
        for name, size in SIZES.items()
    }


def acknowledge(root: Path, step: int) -> None:
    fd = os.open(root.parent / "acknowledged", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(fd, f"{step}\n".encode())
    os.close(fd)


def acknowledged(root: Path) -> list[int]:
    """Sorted: an attempt that was frozen after a commit notes it after its successor noted newer ones."""
    path = root.parent / "acknowledged"
    return sorted(map(int, path.read_text().split())) if path.exists() else []


def check(root: Path, note: str) -> Checkpoint | None:
    """What has to hold after any kill; `note` says which one in the failure."""
    store = CheckpointStore(root)
    newest = store.newest_verified()
    steps = acknowledged(root)
    if newest is None:
        assert not steps, note
        return None
    # One more than acknowledged: the kill came between the commit and the note of it.
    assert newest.step in ((steps or [0])[-1], (steps or [0])[-1] + 1), note
    assert newest.manifest.meta == {"global_step": newest.step}, note
    for name, raw in expected(newest.step).items():
        assert (newest.path / name).read_bytes() == raw, f"{note}: {name}"
    good = verified_steps(store)
    assert set(steps[-2:]) <= set(good), note
    assert len(good) >= min(2, len(steps)), note
    return newest


def time_of_commits(root: Path, attempt: int, num_commits: int) -> float:
    """Seconds from the start of a pair to its `num_commits`-th commit, on this machine as it is now."""
    started = time.monotonic()
    pair = Pair(root, attempt)
    while len(acknowledged(root)) < num_commits:
        time.sleep(0.002)
    elapsed = time.monotonic() - started
    pair.signal(signal.SIGKILL)
    pair.wait()
    newest = check(root, f"attempt {attempt}")
    assert newest
    if newest.step not in acknowledged(root):
        acknowledge(root, newest.step)
    return elapsed


def kill_and_check(root: Path, attempt: int, seed: int, longest_s: float) -> Counter[str]:
    """Start attempt `attempt`, kill one rank or both at a random moment, check; returns what was seen."""
    rng = random.Random(f"{seed}/{attempt}")
    before = len(acknowledged(root))
    pair = Pair(root, attempt)
    time.sleep(rng.uniform(0, longest_s))
    victims = rng.choice([pair.pids, pair.pids, (pair.rank_0,), (pair.rank_1,)])
    pair.signal(signal.SIGKILL, *victims)
    ends = pair.wait()
    note = f"seed {seed}, attempt {attempt}, killed {len(victims)}, ends {ends}"
    assert set(ends) <= {KILLED, ALONE}, note
    newest = check(root, note)
    unacknowledged = newest is not None and newest.step not in acknowledged(root)
    if unacknowledged and newest:
        acknowledge(root, newest.step)
    return Counter(
        kills=1,
        commits=len(acknowledged(root)) - before,
        commits_not_acknowledged=int(unacknowledged),
        half_written=len(list(root.glob(".incarnation-*/step-*"))),
        half_removed=len(list(root.glob("**/.trash-*"))),
        before_begin_ended=int(not (root / f".incarnation-{attempt}-t").is_dir()),
    )


def supersede_and_check(root: Path, attempt: int, seed: int, longest_s: float) -> Counter[str]:
    """Freeze attempt `attempt` anywhere, start the next, thaw the first: it must stop, losing nothing."""
    rng = random.Random(f"{seed}/{attempt}")
    older = Pair(root, attempt)
    time.sleep(rng.uniform(0, longest_s))
    older.signal(signal.SIGSTOP)
    CheckpointStore(root).begin(attempt + 1, "t")
    newer = Pair(root, attempt + 1)
    time.sleep(rng.uniform(0, longest_s))
    older.signal(signal.SIGCONT)
    ends = older.wait()
    newer.signal(signal.SIGKILL)
    newer.wait()
    note = f"seed {seed}, attempt {attempt} superseded, ends {ends}"
    assert SUPERSEDED in ends, note
    assert set(ends) <= {SUPERSEDED, ALONE}, note
    newest = check(root, note)
    if newest and newest.step not in acknowledged(root):
        acknowledge(root, newest.step)
    return Counter(superseded=1)
