"""The record of the one cluster of this host: what runs, who started it, and how to remove all of it."""

import contextlib
import fcntl
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from r1hpc.base.files import read_json, write_json
from tests.cluster import network
from tests.cluster.processes import Process, alive, end, until

STATE_FILE = Path("/run/r1hpc-cluster.json")
_LOCK_FILE = Path("/run/r1hpc-cluster.lock")


@dataclass
class State:
    """What runs, so that it can be ended by another process than the one that started it."""

    directory: str
    nodes: list[str]
    owner: Process | None  # the process whose end makes this a leftover; None: until `down`
    processes: dict[str, Process] = field(default_factory=dict)

    @classmethod
    def load(cls) -> "State | None":
        """The recorded cluster of this host, running or not; None when there is no record."""
        if not STATE_FILE.exists():
            return None
        raw: dict[str, Any] = read_json(STATE_FILE)
        raw["owner"] = tuple(raw["owner"]) if raw["owner"] else None
        raw["processes"] = {name: tuple(process) for name, process in raw["processes"].items()}
        return cls(**raw)

    def save(self) -> None:
        write_json(STATE_FILE, self.__dict__)

    def running(self) -> bool:
        """Whether the controller lives and so does whoever started the cluster."""
        controller = self.processes.get("slurmctld")
        return bool(controller and alive(controller) and (self.owner is None or alive(self.owner)))


@contextlib.contextmanager
def only_one() -> Iterator[None]:
    """Hold the host's lock for starting and stopping; ClusterError when another holds it for two minutes."""
    with _LOCK_FILE.open("w") as lock:

        def locked() -> bool:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

        until("the end of another start or stop of a test cluster", locked, 120)
        yield


def remove(state: State) -> None:
    """End and delete what a record names, as far as it exists. munged gets SIGTERM: it removes its socket."""
    network.remove_network(state.nodes)
    for name, process in reversed(state.processes.items()):
        end(process, signal.SIGTERM if name == "munged" else signal.SIGKILL)
    shutil.rmtree(state.directory, ignore_errors=True)
    STATE_FILE.unlink(missing_ok=True)
