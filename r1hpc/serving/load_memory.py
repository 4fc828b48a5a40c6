"""The host memory of a server while it is under load, read once a second or so by a thread of its own.

source = memory_source(Client(url), key)            # None: neither on this node nor told by the server
with watching(source, readings):
    ...                                             # readings: (seconds, bytes)

On the server's node it is the resident memory of its process group, shared pages counted in each process;
from elsewhere what vLLM's /metrics says of the process that answers.
"""

import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from r1hpc.serving.client import Client

_METRIC = re.compile(rb"^process_resident_memory_bytes(?:\{[^}]*\})? ([0-9.eE+]+)", re.MULTILINE)
_LISTENS = "0A"
_PAGE = os.sysconf("SC_PAGE_SIZE")
_PROC = Path("/proc")


@dataclass(frozen=True)
class MemorySource:
    """Where readings come from."""

    words: str
    every_s: float
    read: Callable[[], int | None]
    """Bytes; None: not now."""


def memory_source(client: Client, key: str | None) -> MemorySource | None:
    """What can be read of this server; the key has been proven."""
    where = urlsplit(client.url)
    group = _group_of_listener(where.hostname or "", where.port or 80)
    if group is not None:
        return MemorySource(f"process group {group} on this node", 1.0, lambda: _resident_bytes(group))
    if _told(client, key) is not None:
        return MemorySource("/metrics, the process that answers", 5.0, lambda: _told(client, key))
    return None


@contextmanager
def watching(source: MemorySource | None, readings: list[tuple[float, int]]) -> Iterator[None]:
    """Read now, and then every few seconds."""
    over, began = threading.Event(), time.monotonic()

    def read(source: MemorySource) -> None:
        while True:
            now, value = time.monotonic() - began, source.read()
            if value is not None and not over.is_set():
                readings.append((now, value))
            if over.wait(source.every_s):
                return

    if source is not None:
        threading.Thread(target=read, args=(source,), daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _told(client: Client, key: str | None) -> int | None:
    found = _METRIC.search(client.read("/metrics", key)[1])
    return int(float(found[1])) if found else None


def _group_of_listener(host: str, port: int) -> int | None:
    """The process group that listens at this address; None: not on this node, or not ours to see."""
    if not _is_here(host):
        return None
    inodes = {inode for name in ("tcp", "tcp6") for inode in _listening(_PROC / "net" / name, port)}
    for process in _PROC.iterdir():
        with suppress(OSError):
            if process.name.isdigit() and inodes & _open_files(process):
                # Who listens at the end of a tunnel is not the server.
                is_tunnel = (process / "comm").read_text().strip() == "ssh"
                return None if is_tunnel else os.getpgid(int(process.name))
    return None


def _open_files(process: Path) -> set[str]:
    return {str(each.readlink()) for each in (process / "fd").iterdir()}


def _is_here(host: str) -> bool:
    """An address of this node is one that a socket can be bound to."""
    with suppress(OSError):
        for family, kind, protocol, _, address in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
            with suppress(OSError), socket.socket(family, kind, protocol) as there:
                there.bind(address)
                return True
    return False


def _listening(table: Path, port: int) -> Iterator[str]:
    """The sockets that listen at this port, as /proc/PID/fd names them (proc_net_tcp.rst of the kernel)."""
    with suppress(OSError):
        for line in table.read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == _LISTENS and int(words[1].rpartition(":")[2], 16) == port:
                yield f"socket:[{words[9]}]"


def _resident_bytes(group: int) -> int | None:
    """Of all processes of the group; None: it has ended."""
    total = 0
    for process in _PROC.iterdir():
        with suppress(OSError, ValueError):
            if process.name.isdigit() and os.getpgid(int(process.name)) == group:
                total += int((process / "statm").read_text().split()[1]) * _PAGE
    return total or None
