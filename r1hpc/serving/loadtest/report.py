"""Report a load test as text and as JSON, and read a server's host memory while it is under load.

    report = LoadReport(about, test.levels, test.ended)
    report.lines(), report.as_json(), report.is_good
    source = memory_source(Client(url), key)            # None: not on this node, and not given by the server
    with watching(source, readings):                    # a thread reads once a second or so
        ...                                             # readings: (seconds, bytes)

On the server's node memory is the resident memory of its process group, shared pages counted in each process.
From elsewhere it is the value in vLLM's /metrics for the process that answers.
"""

import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from r1hpc.base.tables import format_table
from r1hpc.base.units import format_bytes, format_duration
from r1hpc.serving.client import Client
from r1hpc.serving.loadtest.load import (
    KEEPS_UP,
    PERCENTILES,
    Distribution,
    Level,
    failed_below,
    saturation,
    slope_per_hour,
)

_FORMAT = 1
_LATE_S = 0.01
_LATE_SHARE = 0.2
_MOST_NAMED = 3
_TABLE_WIDTH = 200
_NONE = "-"
_TIMES = [f"p{p}" for p in PERCENTILES]
HEADINGS = (
    *("load", "offered/s", "finished/s", "tokens/s"),
    *(f"TTFT {p}" for p in _TIMES),
    *(f"gap {p}" for p in _TIMES),
    *("failed", "unfinished"),
)
"""Headings of `rows`. TTFT is the time to the first token, gap that between two tokens, in milliseconds."""
_METRIC = re.compile(rb"^process_resident_memory_bytes(?:\{[^}]*\})? ([0-9.eE+]+)", re.MULTILINE)
_LISTENS = "0A"
_PAGE = os.sysconf("SC_PAGE_SIZE")
_PROC = Path("/proc")


@dataclass(frozen=True)
class About:
    """Subject and settings of a test."""

    name: str
    """The run's name, else the URL."""
    url: str
    model: str
    begun: str
    """Local time, ISO 8601."""
    prompts: str
    """Origin of the prompts, for a person."""
    max_tokens: int
    seconds: float
    drain_s: float
    seed: int
    memory: str
    """Source of its memory readings; empty: none."""


@dataclass(frozen=True)
class LoadReport:
    """The levels, and the conclusions from them."""

    about: About
    levels: Sequence[Level]
    ended: str
    """Why it ended before its plan did; empty: it did not."""

    @property
    def best(self) -> Level | None:
        """Return the level at which it is saturated; None if no level was answered completely."""
        return saturation(self.levels)

    @property
    def bad(self) -> list[Level]:
        """Return levels with failures though they ask no more than the server can do."""
        return failed_below(self.levels, self.best)

    @property
    def is_good(self) -> bool:
        """True if it was measured as planned, and nothing failed below saturation."""
        return not self.ended and self.best is not None and not self.bad

    def lines(self) -> list[str]:
        about = self.about
        head = [
            f"{about.model} at {about.url}",
            f"{about.prompts}{self._counted()}, {about.max_tokens} tokens an answer, "
            f"{format_duration(about.seconds)} a level",
            "TTFT: time to the first token, gap: between two tokens, both in ms",
            "",
        ]
        rows = [row(level) for level in self.levels]
        table = format_table(HEADINGS, rows, right=range(1, len(HEADINGS)), width=_TABLE_WIDTH)
        return [*head, table, "", *self.findings()]

    def findings(self) -> list[str]:
        """Return sentences on saturation, failures, memory, and doubtful figures."""
        bad = self.bad
        said = [self._saturation()]
        said += [_failures(level, level in bad) for level in self.levels if not level.is_clean]
        said += [self._memory(level) for level in self.levels if level.kind == "soak"]
        said += self._doubts()
        return [*said, f"ended ahead of its plan: {self.ended}"] if self.ended else said

    def _counted(self) -> str:
        """Return the length of the prompts, if the server gives it."""
        tokens, finished = (
            sum(getattr(each, name) for each in self.levels) for name in ("prompt_tokens", "finished")
        )
        return f" ({tokens / finished:.0f} as the server counts)" if tokens else ""

    def _saturation(self) -> str:
        best = self.best
        if best is None:
            return "saturation: not found, at no load was everything answered"
        return (
            f"saturation: {best.finished_per_s:.3g} requests/s, {best.tokens_per_s:.4g} tokens/s "
            f"({name_of(best)}): the most that is finished as it comes (>= {KEEPS_UP:.0%}) without a failure"
        )

    def _memory(self, level: Level) -> str:
        if len(level.memory) < 2:
            return "memory over the soak: unknown; it is read on the server's node, or by its /metrics"
        first, last, most = level.memory[0][1], level.memory[-1][1], max(value for _, value in level.memory)
        slope = slope_per_hour(level.memory)
        grown = "" if slope is None else f", {slope / 2**20:+.1f} MiB an hour"
        return (
            f"memory over the soak ({self.about.memory}): {format_bytes(first)} to {format_bytes(last)}, "
            f"at most {format_bytes(most)}{grown}"
        )

    def _doubts(self) -> list[str]:
        said = []
        late = [level for level in self.levels if _is_late(level)]
        if late:
            most = max(level.late_s.percentile(99) or 0.0 for level in late)
            said.append(
                f"in doubt: the generator itself was late by up to {1000 * most:.0f} ms (p99; "
                f"{self._names(late)}), and its times are as much too long: run it where CPUs are idle"
            )
        tokens, events = (
            sum(getattr(each, name) for each in self.levels) for name in ("num_tokens", "num_events")
        )
        if tokens > 1.05 * events:
            said.append(f"{tokens / events:.1f} tokens came in one event: the gaps are those between events")
        few = [level for level in self.levels if 0 < level.finished < 100]
        if few:
            said.append(f"fewer than 100 answers ({self._names(few)}): p99 is the largest there")
        return said

    def _names(self, some: Sequence[Level]) -> str:
        if len(some) > _MOST_NAMED:
            return f"{len(some)} of {len(self.levels)} levels"
        return ", ".join(map(name_of, some))

    def as_json(self) -> dict[str, Any]:
        best = self.best
        found = None
        if best is not None:
            found = {
                "at": name_of(best),
                "requests_per_s": best.finished_per_s,
                "tokens_per_s": best.tokens_per_s,
            }
        return {
            "format": _FORMAT,
            **asdict(self.about),
            "good": self.is_good,
            "ended_early": self.ended or None,
            "saturation": found,
            "failed_below_saturation": [name_of(level) for level in self.bad],
            "levels": [
                {
                    "name": name_of(level),
                    **level.as_json(),
                    "memory_slope_bytes_per_hour": slope_per_hour(level.memory),
                }
                for level in self.levels
            ],
        }


def name_of(level: Level) -> str:
    """Return a level's name: 1 client, 4 clients, 12.5/s, soak 8.4/s."""
    if level.kind == "closed":
        return f"{level.asked:.0f} client{'s' * (level.asked != 1)}"
    return f"{'soak ' * (level.kind == 'soak')}{level.asked:.3g}/s"


def row(level: Level) -> tuple[str, ...]:
    """Return its cells, under HEADINGS."""
    return (
        name_of(level),
        _NONE if level.kind == "closed" else f"{level.offered_per_s:.2f}",
        f"{level.finished_per_s:.2f}",
        f"{level.tokens_per_s:.1f}",
        *_ms(level.first_s),
        *_ms(level.gap_s),
        str(level.failed),
        str(level.unfinished),
    )


def _ms(times: Distribution) -> list[str]:
    values = [times.percentile(each) for each in PERCENTILES]
    return [_NONE if value is None else f"{1000 * value:.{1 if value < 0.1 else 0}f}" for value in values]


def _failures(level: Level, is_below: bool) -> str:
    told = [f"{count} {kind}{_said(level.said.get(kind))}" for kind, count in level.failures.most_common()]
    told += [f"{level.unfinished} unfinished"] if level.unfinished else []
    if not level.begun:
        return f"{name_of(level)}: no request was sent, the level is too short for this rate"
    though = ", at a load that it should bear" if is_below else ""
    return f"{name_of(level)}: of {level.begun} requests {', '.join(told)}{though}"


def _said(detail: str | None) -> str:
    return f" ({detail})" if detail else ""


def _is_late(level: Level) -> bool:
    late, gap = level.late_s.percentile(99) or 0.0, level.gap_s.percentile(50) or 0.0
    return late > max(_LATE_S, _LATE_SHARE * gap)


@dataclass(frozen=True)
class MemorySource:
    """Source of memory readings."""

    words: str
    every_s: float
    read: Callable[[], int | None]
    """Bytes; None: not now."""


def memory_source(client: Client, key: str | None) -> MemorySource | None:
    """Return what can be read about this server; it has proven the key."""
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
    """Return the process group that listens at this address; None if not here, or not visible to us."""
    if not _is_here(host):
        return None
    inodes = {inode for name in ("tcp", "tcp6") for inode in _listening(_PROC / "net" / name, port)}
    for process in _PROC.iterdir():
        with suppress(OSError):
            if process.name.isdigit() and inodes & _open_files(process):
                # The listener at the end of a tunnel is not the server.
                is_tunnel = (process / "comm").read_text().strip() == "ssh"
                return None if is_tunnel else os.getpgid(int(process.name))
    return None


def _open_files(process: Path) -> set[str]:
    return {str(each.readlink()) for each in (process / "fd").iterdir()}


def _is_here(host: str) -> bool:
    """True if a socket can be bound to the address: then it is of this node."""
    with suppress(OSError):
        for family, kind, protocol, _, address in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
            with suppress(OSError), socket.socket(family, kind, protocol) as there:
                there.bind(address)
                return True
    return False


def _listening(table: Path, port: int) -> Iterator[str]:
    """Yield the sockets that listen at this port, as /proc/PID/fd names them (kernel's proc_net_tcp.rst)."""
    with suppress(OSError):
        for line in table.read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == _LISTENS and int(words[1].rpartition(":")[2], 16) == port:
                yield f"socket:[{words[9]}]"


def _resident_bytes(group: int) -> int | None:
    """Return the sum over the processes of the group; None if it has ended."""
    total = 0
    for process in _PROC.iterdir():
        with suppress(OSError, ValueError):
            if process.name.isdigit() and os.getpgid(int(process.name)) == group:
                total += int((process / "statm").read_text().split()[1]) * _PAGE
    return total or None
