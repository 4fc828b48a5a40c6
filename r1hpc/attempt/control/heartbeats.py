"""Exchange the ranks' signs of life through torch's TCPStore, so a waiting rank can tell slow from hung.

The watchdog (watchdog.py) uses it:

    prepare(store, world_size)                  # rank 0, before the others can connect
    peers = Peers(store, rank, world_size, timeout_s)
    peers.start(watchdog.sign)                  # a thread: reports this rank, reads about the others
    peers.problem()                             # None, or why waiting for the other ranks is useless
    peers.tell("rank 3 failed: ...")            # the others need not wait for this one
    peers.failure                               # on the others: that text

Only rank 0 looks at all ranks. It reports what it found to the others, so each rank asks once a second. Waits
count only time in which the waiting rank ran: a suspension (SIGSTOP, `scontrol suspend`, a frozen cgroup)
stops its thread too and is not silence.
"""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

_MOST_LATE_S = 5.0
"""More than a busy machine delays a thread."""
_VERDICT = "r1hpc/verdict"
_FAILED = "r1hpc/failed"
_LEFT = "left"
_PERIOD_S = 1.0
_UNSEEN = "0 0 0 start"


class RunningClock:
    """Count the seconds one thread ran: a period that took much longer than requested is a suspension."""

    def __init__(self, period_s: float, patience_s: float) -> None:
        self._period_s = period_s
        self._most_s = period_s + min(_MOST_LATE_S, patience_s / 4)
        self._asked_at = time.monotonic()
        self._ran_s = 0.0

    def now(self) -> float:
        """Return the seconds this process ran, without suspensions. Call it every `period_s`."""
        asked_at = time.monotonic()
        elapsed = asked_at - self._asked_at
        self._asked_at = asked_at
        self._ran_s += elapsed if elapsed <= self._most_s else self._period_s
        return self._ran_s


if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store


@dataclass(frozen=True)
class Sign:
    alive: int
    """Grows with each beat, and with each exchange while the rank waits; not while it is stopped."""
    beats: int
    """Grows with its own progress only."""
    phase: str
    sent: int = 0
    """Grows with each exchange, also while the rank is stuck in a collective; not while it is stopped."""

    def __str__(self) -> str:
        return f"{self.sent} {self.alive} {self.beats} {self.phase}"

    @staticmethod
    def parse(text: str) -> "Sign":
        sent, alive, beats, phase = text.split(" ", 3)
        return Sign(int(alive), int(beats), phase, int(sent))


class _Seen:
    """Signs of all ranks, and since when each has not changed by this rank's clock. Used on rank 0."""

    def __init__(self, world_size: int, now: float) -> None:
        self._signs = [Sign.parse(_UNSEEN)] * world_size
        self._alive_at = [now] * world_size
        self._sent_at = [now] * world_size
        self._left = [False] * world_size
        self._progress_at = now

    def hear(self, rank: int, text: str, now: float) -> None:
        if text == _LEFT:
            self._left[rank] = True
            return
        sign, old = Sign.parse(text), self._signs[rank]
        if sign.alive != old.alive:
            self._alive_at[rank] = now
        if sign.sent != old.sent:
            self._sent_at[rank] = now
        if sign.beats != old.beats:
            self._progress_at = now
        self._signs[rank] = sign

    def problem(self, now: float, timeout_s: float) -> str:
        """Name the ranks silent for `timeout_s`, or report that no rank makes progress; else empty.

        Ranks that wait in a collective for a stopped one are silent too; then only the stopped one is named.
        """
        here = [rank for rank, left in enumerate(self._left) if not left]
        silent = [rank for rank in here if now - self._alive_at[rank] > timeout_s]
        if silent:
            silent = [rank for rank in here if now - self._sent_at[rank] > timeout_s / 2] or silent
            idle_s = now - self._alive_at[silent[0]]
            who = ", ".join(map(str, silent[:8]))
            return (
                f"no sign of life from rank {who} for {idle_s:.0f} s, last in {self._signs[silent[0]].phase}"
            )
        idle_s = now - self._progress_at
        if here and idle_s > timeout_s:
            phases = sorted({self._signs[rank].phase for rank in here})
            return f"no rank makes progress for {idle_s:.0f} s: {', '.join(phases[:3])}"
        return ""


def prepare(store: "Store", world_size: int) -> None:
    """Write the keys, so that no rank waits for a missing one."""
    for rank in range(world_size):
        store.set(_key(rank), _UNSEEN)
    store.set(_VERDICT, "0 ")
    store.set(_FAILED, "")


class Peers:
    """One rank's part in the exchange."""

    def __init__(self, store: "Store", rank: int, world_size: int, timeout_s: float) -> None:
        """`store` needs its own connection: a stopped server blocks every caller."""
        self._store = store
        self._rank = rank
        self._timeout_s = timeout_s
        self._keys = [_key(other) for other in range(world_size)]
        self._period_s = min(_PERIOD_S, timeout_s / 8)
        self._seen = _Seen(world_size, 0.0)
        self._verdict = ""
        self._round = "0"
        self.failure = ""
        """The failure another rank reported; empty if none did."""
        # Used by the thread that calls `problem`: a stopped server blocks the exchange itself.
        self._asking = RunningClock(_PERIOD_S, timeout_s)
        self._known_round = self._round
        self._heard_at = 0.0
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, sign: Callable[[], Sign]) -> None:
        self._thread = threading.Thread(target=self._exchange, args=(sign,), name="peers", daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """Report that this rank is done, so that its silence is ignored."""
        self._done.set()
        if self._thread is not None:
            self._thread.join(2 * _PERIOD_S)  # bounded: the store's server may have exited

    def tell(self, failure: str) -> None:
        """Report that this rank fails. The others see it within two seconds; rank 0, their server, waits."""
        teller = threading.Thread(target=self._tell, args=(failure,), daemon=True)
        teller.start()
        teller.join(_PERIOD_S)  # bounded: the server may be stopped
        if self._rank == 0:
            time.sleep(2 * self._period_s)

    def _tell(self, failure: str) -> None:
        with suppress(RuntimeError):  # the server has exited
            self._store.set(_FAILED, failure)

    @property
    def connected(self) -> bool:
        """True while the others can be heard; False once rank 0, which serves the store, has left."""
        return not self._done.is_set()

    def problem(self, patience_s: float | None = None) -> str | None:
        """Return why this rank need not wait any longer; None if the others make progress. Call every second.

        Args:
            patience_s: for rank 0, which passes on the ranks' signs; None: the usual time.
        """
        if self._verdict:
            return self._verdict
        now = self._asking.now()
        if self._round != self._known_round:
            self._known_round, self._heard_at = self._round, now
        idle_s = now - self._heard_at
        if self.connected and idle_s > (patience_s or self._timeout_s):
            return f"no sign of life from rank 0 for {idle_s:.0f} s; it passes the ranks' signs on"
        return None

    def _exchange(self, sign: Callable[[], Sign]) -> None:
        clock = RunningClock(self._period_s, self._timeout_s)
        sent = 0
        try:
            while not self._done.wait(self._period_s):
                sent += 1
                self._store.set(self._keys[self._rank], str(replace(sign(), sent=sent)))
                if self._rank == 0:
                    self._judge(clock.now())
                else:
                    told, failed = (each.decode() for each in self._store.multi_get([_VERDICT, _FAILED]))
                    self._round, _, self._verdict = told.partition(" ")
                    self.failure = failed
            self._store.set(self._keys[self._rank], _LEFT)
        except RuntimeError:  # includes torch's DistStoreError: the server left, with rank 0
            self._done.set()

    def _judge(self, now: float) -> None:
        *signs, failed = (value.decode() for value in self._store.multi_get([*self._keys, _FAILED]))
        for rank, sign in enumerate(signs):
            self._seen.hear(rank, sign, now)
        self.failure = failed
        self._verdict = self._seen.problem(now, self._timeout_s)
        self._round = str(int(self._round) + 1)
        self._store.set(_VERDICT, f"{self._round} {self._verdict}")


def _key(rank: int) -> str:
    return f"r1hpc/sign/{rank}"
