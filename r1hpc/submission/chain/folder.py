"""Lay out the folder of a chain: one run folder per stage, and the files they share.

<run_root>/<chain>/
    chain.yaml          the definition, resolved; written once every stage passed its checks
    chain.jsonl         which stage was submitted as which job
    chain.lock          held by the one process that submits, and by the local supervisor
    supervisor.out      output of the local supervisor
    <stage>/            an ordinary run folder
    datasets/           built by the stages on first use
"""

import socket
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NotRequired, Self, TypedDict

from r1hpc.base import lock
from r1hpc.base.choose_run import folders_with, is_yours, list_runs
from r1hpc.base.errors import StateError
from r1hpc.base.files import append_record, check_owned, read_records
from r1hpc.base.names import check_name
from r1hpc.base.records import Time
from r1hpc.base.run_dir import CHAIN, Inside, RunDir, places_of, run_root_of

TAKEN_NAMES = (CHAIN, "chain.jsonl", "chain.lock", "supervisor.out", "datasets", "report")
"""Names in the folder that no stage may have."""
SUPERVISOR = "the local supervisor"
SUBMISSION = "a submission"


class _ChainEvent(TypedDict):
    event: str
    time: Time
    executor: NotRequired[str]


class ChainDir:
    """Paths of one chain. Asking for a path creates nothing."""

    definition = Inside(CHAIN)
    events = Inside("chain.jsonl")
    lock = Inside("chain.lock")
    log = Inside("supervisor.out")

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).absolute()

    def __repr__(self) -> str:
        return f"ChainDir({str(self.path)!r})"

    @classmethod
    def find(cls, given: str | Path, run_root: str | Path | None = None) -> Self | None:
        """Return the chain at the path `given`, or of that name under the run root; None if there is none.

        Raise StateError if its folder or definition belongs to another user, or others may write it.
        """
        for path in places_of(given, run_root):
            found = cls(path)
            if found.definition.is_file():
                check_owned(found.path)
                check_owned(found.definition)
                return found
        return None

    @property
    def name(self) -> str:
        return self.path.name

    def stage(self, name: str) -> RunDir:
        return RunDir(self.path / check_name(name, "stage"))

    def record(self, event: str, **fields: Any) -> None:
        """Append one event with the time, durably."""
        append_record(self.events, {"event": event, "time": time.time(), **fields})

    def recorded(self, event: str) -> list[dict[str, Any]]:
        """Return the events of that name, oldest first, without torn lines."""
        return [each for each in read_records(self.events, _ChainEvent) if each["event"] == event]


def choose_chain(given: str | None, run_root: str | None) -> ChainDir | None:
    """Return the chain given, or your newest if newer than your runs; None if it is a run."""
    if given is not None:
        return ChainDir.find(given, run_root)
    root = run_root_of(run_root)
    chains, runs = list_chains(root), list_runs(root)
    if any(map(is_yours, (*(chain.path for chain in chains), *(run.path for run in runs)))):
        chains = [chain for chain in chains if is_yours(chain.path)]
        runs = [run for run in runs if is_yours(run.path)]
    if not chains or (runs and runs[0].config.stat().st_mtime > _last_touched(chains[0])):
        return None
    return ChainDir.find(chains[0].path)


def list_chains(root: Path) -> list[ChainDir]:
    """Return the readable chains under a run root, the one submitted last first."""
    chains = [ChainDir(path) for path in folders_with(root, CHAIN)]
    return sorted(chains, key=lambda chain: (_last_touched(chain), chain.name), reverse=True)


def _last_touched(chain: ChainDir) -> float:
    return max(path.stat().st_mtime for path in (chain.definition, chain.events) if path.is_file())


def held(chain: ChainDir, role: str) -> AbstractContextManager[int]:
    """Return the chain's lock, see `base.lock.held`."""
    return lock.held(chain.lock, chain.name, role)


def supervisor_pid(chain: ChainDir) -> int | None:
    """Return the local supervisor that runs the chain now, or None."""
    if lock.is_free(chain.lock):
        return None
    record = lock.read_holder(chain.lock)
    if record.get("role") != SUPERVISOR:
        return None
    if record.get("host") != socket.gethostname():
        raise StateError(f"{chain.name} is supervised on {record.get('host')}: go there")
    return int(record["pid"])
