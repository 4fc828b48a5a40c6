"""The folder of a chain: one run folder per stage, and what holds them together.

<run_root>/<chain>/
    chain.yaml          the definition, resolved; written once every stage was found sound
    chain.jsonl         which stage was submitted as which job
    chain.lock          held by the one process that submits, and by the local supervisor
    supervisor.out      what the local supervisor prints
    <stage>/            an ordinary run folder
    datasets/           built by the stages on first use
"""

import socket
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from r1hpc.base import lock
from r1hpc.base.errors import StateError
from r1hpc.base.files import append_record, check_owned, read_records
from r1hpc.base.find_run import folders_with, is_yours, list_runs, run_root_of
from r1hpc.base.names import check_name
from r1hpc.base.records import Time
from r1hpc.base.run_dir import RunDir

TAKEN_NAMES = ("chain.yaml", "chain.jsonl", "chain.lock", "supervisor.out", "datasets", "report")
"""Names in the folder that no stage may have."""


class _ChainEvent(TypedDict):
    event: str
    time: Time
    executor: NotRequired[str]


class ChainDir:
    """Paths of one chain. Nothing is created by asking for a path."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).absolute()

    def __repr__(self) -> str:
        return f"ChainDir({str(self.path)!r})"

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def definition(self) -> Path:
        return self.path / "chain.yaml"

    @property
    def events(self) -> Path:
        return self.path / "chain.jsonl"

    @property
    def lock(self) -> Path:
        return self.path / "chain.lock"

    @property
    def log(self) -> Path:
        return self.path / "supervisor.out"

    def stage(self, name: str) -> RunDir:
        return RunDir(self.path / check_name(name, "stage"))

    def record(self, event: str, **fields: Any) -> None:
        """Append one event, durably, with the time."""
        append_record(self.events, {"event": event, "time": time.time(), **fields})

    def recorded(self, event: str) -> list[dict[str, Any]]:
        """The events of that name, oldest first; torn lines are left out."""
        return [each for each in read_records(self.events, _ChainEvent) if each["event"] == event]


def find_chain(given: str | Path, run_root: str | None = None) -> ChainDir | None:
    """The chain at the path `given`, or of that name under the run root; None where there is none.

    Raises:
        StateError: its folder or its definition is somebody else's, or others may write it.
    """
    root = run_root_of(run_root)
    candidates = (root / given, Path(given)) if run_root else (Path(given), root / given)
    for path in candidates:
        chain = ChainDir(path)
        if chain.definition.is_file():
            check_owned(chain.path)
            check_owned(chain.definition)
            return chain
    return None


def choose_chain(given: str | None, run_root: str | None) -> ChainDir | None:
    """The chain a command is about: the one given, or your newest if newer than your runs; None: a run."""
    if given is not None:
        return find_chain(given, run_root)
    root = run_root_of(run_root)
    chains, runs = list_chains(root), list_runs(root)
    if any(map(is_yours, (*(chain.path for chain in chains), *(run.path for run in runs)))):
        chains = [chain for chain in chains if is_yours(chain.path)]
        runs = [run for run in runs if is_yours(run.path)]
    if not chains or (runs and runs[0].config.stat().st_mtime > _last_touched(chains[0])):
        return None
    return find_chain(chains[0].path)


def list_chains(root: Path) -> list[ChainDir]:
    """The chains under a run root, the one submitted last first; what cannot be read is not among them."""
    chains = [ChainDir(path) for path in folders_with(root, "chain.yaml")]
    return sorted(chains, key=lambda chain: (_last_touched(chain), chain.name), reverse=True)


def _last_touched(chain: ChainDir) -> float:
    """When it was last begun or gone on with."""
    return max(path.stat().st_mtime for path in (chain.definition, chain.events) if path.is_file())


def held(chain: ChainDir, role: str) -> AbstractContextManager[int]:
    """The chain's lock, see `base.lock.held`."""
    return lock.held(chain.lock, chain.name, role)


def supervisor_pid(chain: ChainDir) -> int | None:
    """The local supervisor that works on the chain at this moment, or None."""
    if lock.is_free(chain.lock):
        return None
    record = lock.read_holder(chain.lock)
    if record.get("role") != SUPERVISOR:
        return None
    if record.get("host") != socket.gethostname():
        raise StateError(f"{chain.name} is supervised on {record.get('host')}: go there")
    return int(record["pid"])


SUPERVISOR = "the local supervisor"
SUBMISSION = "a submission"
