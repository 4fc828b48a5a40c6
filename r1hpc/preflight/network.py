"""Collect what a node sees of the others: connections, clocks, shared files. nodes.py judges it.

nodes.py runs it once on each node, by srun. The first node listens, and the others ask it for the time: the
offset is known to half the round trip (Cristian, "Probabilistic clock synchronization", 1989).
"""

import contextlib
import fcntl
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from r1hpc.base.errors import R1hpcError
from r1hpc.slurm.rank_env import network_interface_to

_PATIENCE_S = 15.0


@dataclass(frozen=True)
class PeerFacts:
    """Facts that a node sees about the others. None: it was not tried."""

    interface: str | None = None
    """The one by which the routing table leads to the first node; on the first itself to the second."""
    unreachable: str | None = None
    """Why it was not reached; None if it was."""
    clock_offset_s: float | None = None
    """The first node's clock against this one's."""
    round_trip_s: float | None = None
    sees_file: bool | None = None
    """A file that the caller made under the run root."""
    lock_respected: bool | None = None
    """The caller holds a flock on it, and this node cannot take it."""


def collect_peers(rank: int, names: Sequence[str], ports: Sequence[int], shared: Path | None) -> PeerFacts:
    """Collect on node `rank` of `names`; all nodes do so at the same time, with the same `ports`.

    Args:
        ports: tried in this order by the first node, because some may be taken.
        shared: a folder with the file `held`, which the caller has locked; this node writes its own there.
    """
    sees, respected = _look_at_shared(shared, names[rank]) if shared is not None else (None, None)
    if len(names) < 2:
        return PeerFacts(sees_file=sees, lock_respected=respected)
    peer = names[1] if rank == 0 else names[0]
    interface = unreachable = offset = trip = None
    try:
        interface = network_interface_to(peer)
    except R1hpcError as error:
        unreachable = str(error)
    if rank == 0:
        _serve(ports, set(names[1:]))
    elif unreachable is None:
        offset, trip, unreachable = _ask_time(names[rank], peer, ports)
    return PeerFacts(interface, unreachable, offset, trip, sees, respected)


def _look_at_shared(shared: Path, name: str) -> tuple[bool, bool | None]:
    with contextlib.suppress(OSError):
        (shared / f"node-{name}").touch()
    try:
        with (shared / "held").open("r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True, True
            except OSError:
                return True, None
            return True, False
    except OSError:
        return False, None


def _serve(ports: Sequence[int], awaited: set[str]) -> None:
    """Answer each line with the time, until all awaited nodes have asked or time is up. A stranger may
    connect too: nodes are known by name."""
    listener = _listen(ports)
    if listener is None:
        return
    deadline = time.monotonic() + _PATIENCE_S
    with listener:
        listener.settimeout(0.1)
        while awaited and time.monotonic() < deadline:
            with contextlib.suppress(OSError, ValueError):  # nobody came, or says nothing or no text
                visitor, _ = listener.accept()
                visitor.settimeout(1.0)
                with visitor, visitor.makefile("rw") as lines:
                    name = lines.readline().strip()
                    lines.write(f"r1hpc {time.time()!r}\n")
                    lines.flush()
                awaited.discard(name)


def _listen(ports: Sequence[int]) -> socket.socket | None:
    for port in ports:
        with contextlib.suppress(OSError):
            return socket.create_server(("", port))
    return None


def _ask_time(name: str, host: str, ports: Sequence[int]) -> tuple[float | None, float | None, str | None]:
    """Return (offset, round trip, why not)."""
    deadline, why = time.monotonic() + _PATIENCE_S, "nobody listens"
    while time.monotonic() < deadline:
        for port in ports:
            try:
                with socket.create_connection((host, port), 5.0) as link, link.makefile("rw") as lines:
                    asked, began = time.time(), time.perf_counter()
                    lines.write(f"{name}\n")
                    lines.flush()
                    who, _, said = lines.readline().partition(" ")
                    trip = time.perf_counter() - began
                if who == "r1hpc":
                    return float(said) - (asked + trip / 2), trip, None
                why = "another program listens there"
            except OSError as error:
                why = error.strerror or str(error)
            except ValueError:  # no text
                why = "another program listens there"
        time.sleep(0.2)  # the first node may start later
    return None, None, f"no connection to {host}, ports {', '.join(map(str, ports))}: {why}"
