"""The life of a server inside an attempt: until somebody ends it, nobody asks any more, or its time is up.

    ended = Life(run, config, attempt=2, place=Place(host, port, node), ...).live(command, environment)
    ended.is_finished, ended.reason

It ends for good when it is idle or at the job's time limit: that is a server's whole task. A signal ahead of
that is a preemption, after which another attempt serves on, perhaps elsewhere, with the same key.

Each time in which it answers is a line of metrics/train.jsonl, so that the ledger tells hours that somebody
used from hours in which the GPUs waited.

When a server answered and when it only waited, written as it happens.

    activity = Activity(MetricWriter(run, attempt), number=0)
    activity.hear(begun=3, ended=2)         # of answers, since the last call
    activity.idle_s(), activity.is_busy

Spells in which it answers become lines of metrics/train.jsonl, under the names that every reader of a run
knows: `global_step` is the spell's number over all attempts, `step_time_s` how long it lasted, `requests` how
many were answered since the run began. The first line of an attempt says when it was ready.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from r1hpc.base.errors import R1hpcError, UsageError
from r1hpc.base.run_dir import RunDir
from r1hpc.base.units import format_duration
from r1hpc.config.schema.run import RunConfig
from r1hpc.plan.save_time import EARLY_S
from r1hpc.serving.address import Address, Place, forget_address, read_key, write_address
from r1hpc.serving.process import Server, started
from r1hpc.serving.vllm_server import NO_VLLM
from r1hpc.telemetry.records.metrics import MetricWriter, last_steps

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


_POLL_S = 0.2
_ASK_EVERY_S = 10.0
_MOST_SILENCE_S = 120.0
"""Of a server that answered before: a long prefill, or a node that swaps, takes seconds."""
_SIGNAL_PATIENCE_S = 2.0
"""Slurm signals every process of a step: the server may be gone before this one has heard."""
TIME_LIMIT = "its time limit"


class ServerError(R1hpcError):
    """The server failed; its own words stand above, in the log of the rank."""


@dataclass(frozen=True)
class Ended:
    """How the server ended: for good, or (a preemption) to come back."""

    is_finished: bool
    reason: str


@dataclass
class Life:
    """One attempt's server."""

    run: RunDir
    config: RunConfig
    attempt: int
    place: Place
    model_name: str
    stop_reason: Callable[[], str]
    """What has asked for the end; empty: nothing yet."""
    seconds_left: Callable[[], float | None]
    """To the job's time limit; None: it has none."""
    lead_s: float
    """So long before the limit it ends."""
    beat: Callable[[str], None]
    """Tell the watchdog."""

    def live(self, command: Sequence[str], environment: Mapping[str, str]) -> Ended:
        """Start it, wait until it answers, and stay with it; its key is there.

        Raises:
            UsageError: the interpreter has no vLLM.
            ServerError: it died, did not begin to answer, stopped answering, or answers without the key.
        """
        forget_address(self.run)
        with started(command, environment, self.place) as server:
            try:
                return self._wait_until_it_answers(server) or self._serve(server)
            finally:
                forget_address(self.run)

    def _wait_until_it_answers(self, server: Server) -> Ended | None:
        key, began = read_key(self.run), time.monotonic()
        while not (known := server.is_ours(key)) or server.ask("/health", key) != 200:
            if known is False:
                raise ServerError(
                    f"who answers at {server.url} has not the server's key: its gate is not there, or "
                    "somebody else has taken the port"
                )
            self.beat("starting the server")
            self._refuse_dead(server)
            if ended := self._end():
                return ended
            if time.monotonic() - began > self.config.serve.start_minutes * 60:
                most = f"serve.start_minutes={self.config.serve.start_minutes:g}"
                raise ServerError(f"the server did not answer within {most}")
            time.sleep(_POLL_S)
        return self._prove_closed(server)

    def _prove_closed(self, server: Server) -> Ended | None:
        """At every start: without the key it must say nothing. The end, where that comes meanwhile."""
        for path in ("/v1/models", "/metrics", "/pause"):
            while (said := server.ask(path, None)) is None:
                self._refuse_dead(server)
                if ended := self._end():
                    return ended
                time.sleep(_POLL_S)
            if said != 401:
                raise ServerError(f"the server answers {path} without its key (HTTP {said}): it was ended")
        return None

    def _serve(self, server: Server) -> Ended:
        activity = Activity(MetricWriter(self.run, self.attempt), *_last_spell(self.run))
        write_address(self.run, Address(self.place, self.model_name, self.attempt))
        print(f"serving {self.model_name} at {server.url}", flush=True)
        try:
            return self._until_the_end(server, activity)
        finally:
            forget_address(self.run)
            # On record ahead of its end, which takes up to ten seconds that nobody may have left.
            activity.hear(*server.news())
            activity.close()
            server.end()  # answers under way end within its grace, and count
            activity.hear(*server.news())
            activity.close()

    def _until_the_end(self, server: Server, activity: Activity) -> Ended:
        health = _Health(server, read_key(self.run))
        while True:
            self.beat("serving")
            activity.hear(*server.news())
            self._refuse_dead(server)
            if ended := self._end():
                return ended
            idle_s, most_s = activity.idle_s(), self.config.serve.idle_minutes * 60
            if most_s and idle_s >= most_s:
                return Ended(True, f"no request for {format_duration(idle_s)} (serve.idle_minutes)")
            health.look()
            time.sleep(_POLL_S)

    def _end(self) -> Ended | None:
        """Whether the clock or somebody ends it now."""
        left, reason = self.seconds_left(), self.stop_reason()
        early_s = EARLY_S if reason == "SIGUSR2" else 0.0
        if left is not None and left <= self.lead_s + early_s:
            return Ended(True, TIME_LIMIT)
        return Ended(False, reason) if reason else None

    def _refuse_dead(self, server: Server) -> None:
        status = server.status()
        if status is None:
            return
        if status == NO_VLLM:
            raise UsageError("the interpreter has no vLLM: name one that has by serve.python=PYTHON")
        deadline = time.monotonic() + _SIGNAL_PATIENCE_S
        while time.monotonic() < deadline:
            if self._end():
                return
            time.sleep(_POLL_S / 4)
        how = f"by signal {-status}" if status < 0 else f"with exit status {status}"
        raise ServerError(f"the server ended by itself, {how}; why stands above in this log")


def _last_spell(run: RunDir) -> tuple[int, int]:
    """Its number, and the requests answered until then."""
    newest = last_steps(run, 1)
    return (newest[-1].global_step, int(newest[-1].number("requests") or 0)) if newest else (0, 0)


@dataclass
class _Health:
    """Whether it still answers."""

    server: Server
    key: str
    asked: float = 0.0
    answered: float = 0.0

    def __post_init__(self) -> None:
        self.asked = self.answered = time.monotonic()

    def look(self) -> None:
        """Ask, now and then.

        Raises:
            ServerError: it has been silent for too long.
        """
        now = time.monotonic()
        if now - self.asked < _ASK_EVERY_S:
            return
        if now - self.asked > STOOD_STILL_S:  # suspended, and the server with it
            self.answered = now
        self.asked = now
        if self.server.ask("/health", self.key) == 200:
            self.answered = time.monotonic()
        elif now - self.answered > _MOST_SILENCE_S:
            raise ServerError(f"the server has not answered for {now - self.answered:.0f} s: it was ended")
