"""The folder of a chain: one run folder per stage, and what holds them together.

<run_root>/<chain>/
    chain.yaml          the definition, resolved; written once every stage was found sound
    chain.jsonl         which stage was submitted as which job
    chain.lock          held by the one process that submits, and by the local supervisor
    supervisor.out      what the local supervisor prints
    <stage>/            an ordinary run folder
    datasets/           built by the stages on first use
"""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from r1hpc.base.choose_run import list_runs, run_root_of
from r1hpc.base.errors import StateError, UsageError
from r1hpc.base.files import append_record, check_owned
from r1hpc.base.names import check_name
from r1hpc.base.rundir import RunDir

TAKEN_NAMES = ("chain.yaml", "chain.jsonl", "chain.lock", "supervisor.out", "datasets", "report")
"""Names in the folder that no stage may have."""


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
    """The chain a command is about: the one given, or the newest if newer than any run; None: it is a run."""
    if given is not None:
        return find_chain(given, run_root)
    root = run_root_of(run_root)
    chains, runs = list_chains(root), list_runs(root)
    if not chains or (runs and runs[0].config.stat().st_mtime > _last_touched(chains[0])):
        return None
    return find_chain(chains[0].path)


def list_chains(root: Path) -> list[ChainDir]:
    """The chains under a run root, the one submitted last first."""
    if not root.is_dir():
        return []
    chains = [ChainDir(path) for path in root.iterdir() if (path / "chain.yaml").is_file()]
    return sorted(chains, key=lambda chain: (_last_touched(chain), chain.name), reverse=True)


def _last_touched(chain: ChainDir) -> float:
    """When it was last begun or gone on with."""
    return max(path.stat().st_mtime for path in (chain.definition, chain.events) if path.is_file())


@contextlib.contextmanager
def held(chain: ChainDir, role: str) -> Iterator[int]:
    """Hold the chain's lock; the descriptor, which a child process may inherit and hold on.

    Raises:
        UsageError: another process holds it; the message says which.
    """
    fd = os.open(chain.lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{chain.name} is in other hands: {holder(chain)} holds {chain.lock}") from None
        say_holder(fd, role)
        yield fd
    finally:
        os.close(fd)  # the lock itself lives on where a child has inherited the descriptor


def say_holder(fd: int, role: str) -> None:
    """Write into the lock file who holds it."""
    record = json.dumps({"role": role, "pid": os.getpid(), "host": socket.gethostname()}).encode()
    os.pwrite(fd, record.ljust(256), 0)


def holder(chain: ChainDir) -> str:
    """Who holds the lock, as a message names it."""
    record = _read_holder(chain)
    if not {"role", "pid", "host"} <= record.keys():
        return "another process"
    return f"{record['role']}, process {record['pid']} on {record['host']},"


def supervisor_pid(chain: ChainDir) -> int | None:
    """The local supervisor that works on the chain at this moment, or None."""
    try:
        fd = os.open(chain.lock, os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        record = _read_holder(chain)
    finally:
        os.close(fd)
    if record.get("role") != SUPERVISOR:
        return None
    if record.get("host") != socket.gethostname():
        raise StateError(f"{chain.name} is supervised on {record.get('host')}: go there")
    return int(record["pid"])


SUPERVISOR = "the local supervisor"
SUBMISSION = "a submission"


def _read_holder(chain: ChainDir) -> dict[str, Any]:
    """What the lock file says; {} where it is torn."""
    try:
        value = json.loads(chain.lock.read_text())
    except (ValueError, OSError):
        return {}
    return value if isinstance(value, dict) else {}
