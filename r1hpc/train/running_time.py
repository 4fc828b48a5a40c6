"""Seconds in which this process itself ran: a suspended process has not waited for anybody.

    clock = RunningClock(period_s=1.0, patience_s=600)
    while True:
        sleep(1.0)
        now = clock.now()           # asked every period; one that comes much later was a suspension

For SIGSTOP, `scontrol suspend` and a frozen cgroup alike: in all of them the thread that asks does not run.
"""

import time

_MOST_LATE_S = 5.0
"""More than a busy machine delays a thread by."""


class RunningClock:
    """One thread's clock. A period that took much longer than asked for counts as if it had not."""

    def __init__(self, period_s: float, patience_s: float) -> None:
        self._period_s = period_s
        self._most_s = period_s + min(_MOST_LATE_S, patience_s / 4)
        self._asked_at = time.monotonic()
        self._ran_s = 0.0

    def now(self) -> float:
        """Seconds run since the clock was made. To be called every `period_s`."""
        asked_at = time.monotonic()
        elapsed = asked_at - self._asked_at
        self._asked_at = asked_at
        self._ran_s += elapsed if elapsed <= self._most_s else self._period_s
        return self._ran_s
