"""Keep an attempt's trackers fed: one feeder each, restarted when it dies or hangs.

`launch track` (attempt/trackers.py) calls it on the batch host. No tracker's failure raises an error here,
and after the attempt none gets longer than `_FINISH_S`.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_POLL_S = 1.0
_PATIENCE_S = 150.0
"""Seconds without a sign of life before a feeder is killed. W&B waits 90 s for a missing server (seen)."""
_FINISH_S = 60.0
"""Seconds for the last steps after an attempt; if Slurm ends the job earlier, it ends them too."""
_NICE = 5
"""Enough to yield to the ranks, little enough to make progress beside them on a full machine."""
_PAUSES_S = (2.0, 10.0, 60.0, 300.0)
"""Seconds before each restart of a feeder; the last one repeats."""


def keep_feeders(commands: Mapping[str, Sequence[str]], is_over: Callable[[], bool]) -> None:
    """Keep the feeders of an attempt running until it is over."""
    feeders = [_Feeder(name, command) for name, command in commands.items()]
    while not is_over():
        for feeder in feeders:
            feeder.look_after()
        pipes = {feeder.pipe: feeder for feeder in feeders if feeder.pipe is not None}
        for pipe in select.select(pipes, [], [], _POLL_S)[0]:
            pipes[pipe].hear()
        if not pipes:
            time.sleep(_POLL_S)
    for feeder in feeders:
        feeder.ask_to_finish()
    deadline = time.monotonic() + _FINISH_S
    while time.monotonic() < deadline and any(feeder.is_alive for feeder in feeders):
        time.sleep(0.1)
    for feeder in feeders:
        if feeder.is_alive:
            feeder.kill(f"did not finish in {_FINISH_S:.0f} s")


class _Feeder:
    """One feeder, over all its restarts."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name, self._command = name, command
        self._process: subprocess.Popen[bytes] | None = None
        self._num_starts = 0
        self._start_at = 0.0
        self._heard_at = 0.0

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pipe(self) -> int | None:
        """The pipe of its signs of life; None if it does not run, or has closed it."""
        found = self._process.stdout if self._process is not None else None
        return None if found is None or found.closed else found.fileno()

    def look_after(self) -> None:
        """Start it when due, and kill it if it hangs."""
        now = time.monotonic()
        if self._process is None:
            if now >= self._start_at:
                self._start()
        elif not self.is_alive:
            self._bury(f"ended with status {self._process.returncode}")
        elif now - self._heard_at > _PATIENCE_S:
            self.kill(f"gave no sign of life for {_PATIENCE_S:.0f} s")

    def hear(self) -> None:
        """Read its pipe, which it has written to or closed."""
        assert self._process is not None
        assert self._process.stdout is not None
        if os.read(self._process.stdout.fileno(), 65536):
            self._heard_at = time.monotonic()
        else:
            self._process.stdout.close()

    def ask_to_finish(self) -> None:
        """Ask it to finish. A dead one is started a last time, since it is fed from the first step on."""
        if not self.is_alive:
            self._start()
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

    def kill(self, why: str) -> None:
        """Kill it with all its processes: W&B's own process has a separate session."""
        assert self._process is not None
        for pid in [self._process.pid, *_descendants(self._process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        self._bury(why)

    def _start(self) -> None:
        self._num_starts += 1
        self._heard_at = time.monotonic()
        try:
            self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        except OSError as error:  # no memory, no process left
            self._bury(f"could not be started: {error.strerror}")

    def _bury(self, why: str) -> None:
        pause_s = _PAUSES_S[min(self._num_starts, len(_PAUSES_S)) - 1]
        with contextlib.suppress(OSError):  # the disk is full
            when = time.strftime("%Y-%m-%d %H:%M:%S")
            print(f"{when} {self.name} {why}", file=sys.stderr, flush=True)
        if self._process is not None:
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
        self._process, self._start_at = None, time.monotonic() + pause_s


def step_back() -> None:
    """Yield processor and memory to others, for this process and its children."""
    os.nice(_NICE)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = list(children.get(pid, []))
    for each in found:  # grows while it is read
        found += children.get(each, [])
    return found
