"""Real saves in real processes, for the tests of the checkpoint package.

A `Kill` happens by failpoint in a forked child, so nothing of the child's Python cleans up after it.
"""

import hashlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from r1hpc.checkpoint import disk
from r1hpc.checkpoint.disk import CheckpointWriteError
from r1hpc.checkpoint.fence import SupersededError
from r1hpc.checkpoint.store import Checkpoint, CheckpointStore

# As a two-rank DeepSpeed save leaves them: model states, one optimizer shard a rank, small JSON, nothing.
FILES = {
    "mp_rank_00_model_states.pt": 12_000,
    "zero/rank_0_optim_states.pt": 9_000,
    "zero/rank_1_optim_states.pt": 9_000,
    "rng/rank_0.json": 300,
    "empty.lock": 0,
}
DONE, SUPERSEDED, WRITE_ERROR, KILLED = 0, 7, 8, -9


def content(step: int, name: str, size: int | None = None) -> bytes:
    """What the file `name` of `step` holds; nothing else holds the same."""
    return hashlib.shake_128(f"{step}/{name}".encode()).digest(FILES[name] if size is None else size)


def write_files(folder: Path, step: int) -> None:
    for name in FILES:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content(step, name))


def save(store: CheckpointStore, step: int, attempt: int, token: str = "t") -> Checkpoint:
    """One rank's whole save, as the trainer does it."""
    folder = store.open_staging(step, attempt, token)
    try:
        with store.writing(folder):
            write_files(folder, step)
        records = store.seal(folder, FILES)
    except CheckpointWriteError:
        store.abandon(step, attempt, token)
        raise
    return store.commit(step, attempt, token, records, {"global_step": step})


def history(root: Path, *steps: int, attempt: int = 0) -> CheckpointStore:
    """A store with these checkpoints, written by `attempt`."""
    store = CheckpointStore(root)
    store.begin(attempt, "t")
    for step in steps:
        save(store, step, attempt)
    return store


def holds_what_was_written(checkpoint: Checkpoint) -> bool:
    return all((checkpoint.path / name).read_bytes() == content(checkpoint.step, name) for name in FILES)


def verified_steps(store: CheckpointStore) -> list[int]:
    """Steps that verify, newest first, by a store object that remembers nothing."""
    fresh = CheckpointStore(store.root)
    return [found.step for found in fresh.list() if not fresh.verify(found)]


def start_child(act: Callable[[], object], failpoint: str = "") -> int:
    """Fork a process that runs `act` under R1HPC_FAILPOINT; return its id."""
    pid = os.fork()
    if pid:
        return pid
    status = 99
    try:
        os.environ["R1HPC_FAILPOINT"] = failpoint
        act()
        status = DONE
    except SupersededError:
        status = SUPERSEDED
    except CheckpointWriteError as error:
        status = WRITE_ERROR
        print(error, file=sys.stderr, flush=True)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def end_of(pid: int) -> int:
    """Exit status of a child, or the negative number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def in_child(act: Callable[[], object], failpoint: str = "") -> int:
    return end_of(start_child(act, failpoint))


def wait_until_stopped(pid: int) -> int | None:
    """None once the child has stopped itself; its exit status if it ended instead."""
    _, status = os.waitpid(pid, os.WUNTRACED)
    return None if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)


@contextmanager
def recorded_failpoints() -> Iterator[list[str]]:
    """Collect `name nth` of every failpoint passed, in order; see fault()."""
    passed: list[str] = []
    names: list[str] = []
    patch = pytest.MonkeyPatch()

    def record(name: str) -> None:
        names.append(name)
        passed.append(f"{name} {names.count(name)}")

    patch.setattr(disk, "failpoint", record)
    try:
        yield passed
    finally:
        patch.undo()


def fault(point: str, action: str) -> str:
    """R1HPC_FAILPOINT for `action` at a point that recorded_failpoints collected."""
    name, nth = point.split()
    return f"{name}:{action}:*:{nth}"
