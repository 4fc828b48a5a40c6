"""Find a rank that hangs: no progress for `timeout_s`, then every stack to the log and out.

Each rank watches itself. When one is stuck the others are stuck in a collective with it, so all of them
leave; the one that cannot even run its watchdog (stopped, or a lock held in C) is ended by
`srun --kill-on-bad-exit`, and named by being the only rank without an outcome file.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable

EXIT_HANG = 75
"""Exit status of a rank that found itself hanging."""
_LAST_WORDS_S = 3.0
_BACKSTOP_S = 15.0
"""How much later than the Python thread the C thread acts: after the last words."""


class Watchdog:
    """`beat(phase)` at least every `timeout_s`, or the process ends with EXIT_HANG.

    Two watchers: a Python thread, which can write why, and faulthandler's C thread a little later, which
    needs no interpreter lock.
    """

    def __init__(self, timeout_s: float, on_hang: Callable[[str, float], None]) -> None:
        self._timeout_s = timeout_s
        self._on_hang = on_hang
        self._phase = "start"
        self._last = time.monotonic()
        self._backstop_armed_at = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        self.beat("start")
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        faulthandler.cancel_dump_traceback_later()

    def beat(self, phase: str) -> None:
        """Progress was made; `phase` is what comes next and is named if it hangs."""
        self._phase, self._last = phase, time.monotonic()
        # Re-arming starts a thread each time, so the backstop moves only now and then.
        if self._last - self._backstop_armed_at > _BACKSTOP_S / 3:
            self._backstop_armed_at = self._last
            faulthandler.dump_traceback_later(self._timeout_s + _BACKSTOP_S, exit=True)

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, self._timeout_s / 4)):
            idle_s = time.monotonic() - self._last
            if idle_s > self._timeout_s:
                print(
                    f"no progress for {idle_s:.0f} s in phase '{self._phase}': stacks follow", file=sys.stderr
                )
                faulthandler.dump_traceback(all_threads=True)
                self._on_hang(self._phase, idle_s)
                # The first to exit gets the others killed; they too should have left word by then.
                time.sleep(_LAST_WORDS_S)
                os._exit(EXIT_HANG)
