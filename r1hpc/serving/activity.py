"""When a server answered and when it only waited, written as it happens.

    activity = Activity(MetricWriter(run, attempt), number=0)
    activity.hear(begun=3, ended=2)         # of answers, since the last call
    activity.idle_s(), activity.is_busy

Spells in which it answers become lines of metrics/train.jsonl, under the names that every reader of a run
knows: `global_step` is the spell's number over all attempts, `step_time_s` how long it lasted, `requests` how
many were answered since the run began. The first line of an attempt says when it was ready.
"""

import time
from collections.abc import Callable

from r1hpc.telemetry.metrics import MetricWriter

_GAP_S = 10.0
"""Requests that follow each other sooner are one spell: a client that asks, reads and asks again."""
_LONGEST_S = 60.0
"""A longer spell is written in parts, so that a kill costs no more of the record."""
STOOD_STILL_S = 60.0
"""Who has not looked for so long was suspended: a look and what lies between two take some 20 s at most."""


class Activity:
    """The spells of one attempt."""

    def __init__(
        self, writer: MetricWriter, number: int, requests: int = 0, clock: Callable[[], float] = time.time
    ) -> None:
        """The server is ready now.

        Args:
            number: of the last spell on record.
            requests: answered by earlier attempts.
        """
        self._writer, self._clock = writer, clock
        self._number, self._requests = number, requests
        self._in_flight = 0
        self._busy_since: float | None = None
        self._last_busy = self._last_look = clock()
        self._write(self._last_busy, self._last_busy)

    @property
    def is_busy(self) -> bool:
        """An answer is under way."""
        return self._in_flight > 0

    def hear(self, begun: int, ended: int) -> None:
        """So many answers began and ended since the last call, from when on they count."""
        now, before = self._clock(), self._last_look
        self._last_look = now
        if now - before > STOOD_STILL_S:  # nobody could ask, and nothing was answered
            self.close()
            self._last_busy += now - before
            before = now
        if (begun or self._in_flight) and self._busy_since is None:
            self._busy_since = before
        if begun or self._in_flight:
            self._last_busy = now
        self._in_flight += begun - ended
        self._requests += ended
        if self._busy_since is None:
            return
        if now - self._last_busy > _GAP_S:
            self.close()
        elif now - self._busy_since > _LONGEST_S:
            self._write(self._busy_since, now)
            self._busy_since = now

    def idle_s(self) -> float:
        """Seconds since the last answer; 0 while one is under way."""
        return 0.0 if self.is_busy else self._clock() - self._last_busy

    def close(self) -> None:
        """The spell, if there is one, ended with its last answer."""
        if self._busy_since is not None:
            self._write(self._busy_since, self._last_busy)
            self._busy_since = None

    def _write(self, begin: float, end: float) -> None:
        self._number += 1
        self._writer.step(
            global_step=self._number, time=end, step_time_s=max(0.0, end - begin), requests=self._requests
        )
