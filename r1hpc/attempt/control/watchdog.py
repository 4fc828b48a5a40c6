"""Find a rank that hangs: after `timeout_s` without progress, log every stack and exit.

Each rank watches itself and gets the others' signs (heartbeats.py). While it waits for them, its own silence
does not count: it waits as long as some rank makes progress and none is silent. When one hangs, all leave. A
rank that cannot even run its watchdog (stopped, or a lock held in C) is ended by `srun --kill-on-bad-exit`.
The others name it, and it is the only rank without an outcome file. A suspension is not silence. Loading
libraries has a limit of its own: a busy file system can take far longer for it than a step.

A rank that fails reports it (`fail`), and the others leave at once. Otherwise they would wait in a collective
until srun kills them, after KillWait, because a SIGTERM asks them to save.
"""

import faulthandler
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from r1hpc.attempt.control import backstop
from r1hpc.attempt.control.heartbeats import Peers, RunningClock, Sign

EXIT_HANG = 75
"""Exit status of a rank that found itself hanging."""
WAITING = "waiting for the other ranks"
_REPORT_S = 5.0
"""Enough for the report to reach the others."""
EXIT_LEFT_ALONE = 1
"""Exit status of a rank that leaves because another one failed."""
_OWN_FAILURE_S = 1.0
"""Time for a rank that fails for the same reason to report it itself."""
_LOADING_S = 300.0
"""Limit for all loading together, beyond train.hang_timeout_s; counted while other threads can run."""
_PEERS_FIRST_S = 4.0
"""How much later a rank judges its own silence while it hears the others: the rank it waits for may have
stopped, and is then named."""
_BACKSTOP_S = 15.0
"""How much later than the Python thread the backstop process acts: after the others have heard."""


class Watchdog:
    """`beat(phase)` at least every `timeout_s` outside `waiting()`, or the process ends with EXIT_HANG.

    Two watchers: a Python thread, which can write why, and a little later a process (backstop.py),
    which needs no interpreter lock.
    """

    def __init__(
        self,
        timeout_s: float,
        on_hang: Callable[[str], None],
        on_left_alone: Callable[[str], None] = lambda failure: None,
    ) -> None:
        """`on_hang` gets a sentence that says what was found, `on_left_alone` who failed, and how."""
        self._timeout_s = timeout_s
        self._on_hang = on_hang
        self._on_left_alone = on_left_alone
        self.before_leaving: Callable[[], None] = lambda: None
        """Run before this rank leaves because another one failed, to finish its writes."""
        self._is_failing = False
        self._phase = "start"
        self._beats = 0
        self._period_s = min(1.0, timeout_s / 4)
        self._clock = RunningClock(self._period_s, timeout_s)
        self._seen_beats = 0
        self._seen_at = 0.0
        self._is_waiting = False
        self._is_loading = False
        self._loaded_s = 0.0
        self._looks = 0
        self._peers: Peers | None = None
        self._backstop: subprocess.Popen[bytes] | None = None
        self._backstop_armed_at = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        faulthandler.enable()
        self._backstop = subprocess.Popen(
            [sys.executable, "-I", "-S", backstop.__file__, str(self._timeout_s + _BACKSTOP_S)],
            stdin=subprocess.PIPE,
        )
        self.load("start")
        self._thread.start()

    def hear(self, peers: Peers) -> None:
        """Connect the ranks' signs: from now on they know about each other."""
        peers.start(self.sign)
        self._peers = peers

    def stop(self) -> None:
        self._done.set()
        if self._backstop is not None and self._backstop.stdin is not None:
            self._backstop.kill()  # closing the pipe is not enough if a forked process holds it too
            self._backstop.wait()
            self._backstop.stdin.close()
            self._backstop = None
        if self._peers is not None:
            self._peers.leave()

    def fail(self, failure: str) -> None:
        """Make the others leave: this rank exits with an error."""
        self._is_failing = True
        if self._peers is not None:
            self._peers.tell(failure)

    def beat(self, phase: str) -> None:
        """Record progress; `phase` is what comes next and is named if it hangs."""
        self._is_loading = False
        self._go_on(phase)

    def still(self) -> None:
        """Record progress within the phase."""
        self.beat(self._phase)

    def load(self, phase: str) -> None:
        """Beat, and let this rank load libraries in silence until the next beat: _LOADING_S for all loads."""
        self._go_on(phase)
        self._is_loading = True

    def _go_on(self, phase: str) -> None:
        self._phase = phase
        self._beats += 1
        self._arm_backstop()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Wait for the other ranks inside: their progress counts, not this rank's."""
        phase = self._phase
        self.beat(WAITING)
        self._is_waiting = True
        try:
            yield
        finally:
            self.beat(phase)  # before the flag: the watching thread may look in between
            self._is_waiting = False

    def sign(self) -> Sign:
        """Return what this rank reports to the others."""
        self._looks += self._is_waiting
        return Sign(self._beats + self._looks, self._beats, self._phase)

    def _arm_backstop(self) -> None:
        now = time.monotonic()
        process = self._backstop
        if process is None or process.stdin is None or now - self._backstop_armed_at < _BACKSTOP_S / 3:
            return
        self._backstop_armed_at = now
        with suppress(OSError, ValueError):  # it was killed, or `stop` is closing it
            os.write(process.stdin.fileno(), b".")

    def _watch(self) -> None:
        now = 0.0
        while not self._done.wait(self._period_s):
            before, now = now, self._clock.now()
            if self._is_loading and self._loaded_s < _LOADING_S:
                self._loaded_s += now - before
                self._beats += 1
                self._arm_backstop()
            if self._peers is not None and self._peers.failure:
                self._leave_alone(self._peers.failure)
            problem = self._problem(now)
            if problem is not None:
                print(f"hang: {problem}: stacks follow", file=sys.stderr)
                faulthandler.dump_traceback(all_threads=True)
                self._on_hang(problem)
                # The first rank to exit gets the others killed, so give them time to report too.
                time.sleep(_REPORT_S)
                os._exit(EXIT_HANG)

    def _leave_alone(self, failure: str) -> None:
        """Leave because another rank failed, unless this one does so by itself."""
        if self._done.wait(_OWN_FAILURE_S) or self._is_failing:
            return
        self.before_leaving()
        if self._done.is_set() or self._is_failing:
            return
        print(f"{failure}; this rank leaves too", file=sys.stderr, flush=True)
        self._on_left_alone(failure)
        os._exit(EXIT_LEFT_ALONE)

    def _problem(self, now: float) -> str | None:
        """Return what hangs, on this rank or another."""
        is_heard = self._peers is not None and self._peers.connected
        if self._is_waiting and is_heard:
            self._arm_backstop()
        else:  # read before the clock: a rank that stops waiting has just beaten
            if self._beats != self._seen_beats:
                self._seen_beats, self._seen_at = self._beats, now
            idle_s = now - self._seen_at
            if idle_s > self._timeout_s + (_PEERS_FIRST_S if is_heard else 0.0):
                other = self._peers.problem(self._timeout_s / 2) if self._peers is not None else None
                return other or f"no progress for {idle_s:.0f} s in {self._phase}"
        return self._peers.problem() if self._peers is not None else None
