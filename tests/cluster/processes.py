"""Daemons and their end: started detached, remembered by pid and start time, ended by nothing else.

A pid alone may belong to somebody else after a crash; with its start time (proc(5), stat field 22) it cannot.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from r1hpc.base.errors import R1hpcError

Process = tuple[int, int]  # pid, start time in clock ticks since boot


class ClusterError(R1hpcError):
    """The test cluster could not do what was asked; the message ends with the log that explains it."""


class ClusterBusyError(ClusterError):
    """Another process has the one cluster that a host can hold."""


def call(argv: Sequence[str], *, timeout: float = 60, text: str | None = None) -> str:
    """Run a set-up command and return its stdout; ClusterError with its output when it fails."""
    try:
        done = subprocess.run(argv, input=text, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise ClusterError(f"no end after {timeout:.0f} s: {' '.join(argv)}") from None
    if done.returncode:
        raise ClusterError(
            f"{' '.join(argv)} exited {done.returncode}: {done.stderr or done.stdout}".rstrip()
        )
    return done.stdout


def spawn(argv: Sequence[str], log: Path, env: Mapping[str, str]) -> Process:
    """Start a daemon in a session of its own, output appended to `log`."""
    with log.open("ab") as output:
        child = subprocess.Popen(
            argv,
            env=env,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    # We reap it ourselves in `alive`; without this the destructor warns that it still runs.
    child.returncode = 0
    return child.pid, _start_time(child.pid) or 0


def this_process() -> Process:
    return os.getpid(), _start_time(os.getpid()) or 0


def alive(process: Process) -> bool:
    """Whether that very process still runs (a zombie does not)."""
    pid, started = process
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    return _start_time(pid) == started


def end(process: Process, first: signal.Signals = signal.SIGKILL, patience: float = 10) -> None:
    """Send `first`, after `patience` seconds SIGKILL, and return once it is gone."""
    deadline = time.monotonic() + patience
    sent = None
    while alive(process):
        wanted = first if time.monotonic() < deadline else signal.SIGKILL
        if sent != wanted:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process[0], wanted)
            sent = wanted
        if time.monotonic() > deadline + 10:
            raise ClusterError(f"process {process[0]} survives SIGKILL")
        time.sleep(0.02)


def until(what: str, ready: Callable[[], bool], timeout: float, log: Path | None = None) -> float:
    """Poll `ready` and return the seconds it took; ClusterError with the tail of `log` after `timeout`."""
    begin = time.monotonic()
    pause = 0.05
    while not ready():
        if time.monotonic() - begin > timeout:
            raise ClusterError(f"{what}: not within {timeout:.0f} s" + (f"\n{tail(log)}" if log else ""))
        time.sleep(pause)
        pause = min(0.5, pause * 1.3)
    return time.monotonic() - begin


def tail(log: Path, lines: int = 25) -> str:
    """The last lines of a log under its name."""
    text = log.read_text(errors="replace").splitlines() if log.exists() else ["(no such file)"]
    return "\n".join([f"--- last lines of {log}", *text[-lines:]])


def _start_time(pid: int) -> int | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()  # the name before it may hold spaces
    return None if fields[0] in "ZX" else int(fields[19])
