"""Keep a server running for an attempt: until a stop request, its time limit, or too long idle or silent.

    outcome = serve(job)                    # the one rank of the job
    ended = Life(run, config, attempt=2, place=Place(host, port, node), ...).live(command, environment)
    ended.finished, ended.reason
    activity = Activity(MetricWriter(run, attempt), number=0)
    activity.hear(begun=3, ended=2)         # answers since the last call
    activity.idle_s()

It ends for good when it is idle or reaches the job's time limit. An earlier signal is a preemption: another
attempt serves on, perhaps elsewhere, with the same key.

Requests that follow each other within ten seconds are a spell. Each spell (or minute of it) is a line of
metrics/train.jsonl, so that the ledger separates used hours from hours in which the GPUs waited. The names
are those of every run: `global_step` is the line's number over all attempts, `step_time_s` its length,
`requests` the number answered since the run began. The first line of an attempt records when it was ready.
"""

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from r1hpc.attempt.begin import read_facts
from r1hpc.attempt.workload import Outcome, RankJob
from r1hpc.base.errors import R1hpcError, UsageError
from r1hpc.base.run_dir import RunDir
from r1hpc.base.units import format_duration, parse_time
from r1hpc.config.schema.run import RunConfig
from r1hpc.plan.save_time import EARLY_S
from r1hpc.serving.address import Address, Place, forget_address, make_key, read_key, write_address
from r1hpc.serving.process import Server, command_of, environment_of, started
from r1hpc.serving.vllm_server import NO_VLLM
from r1hpc.slurm.rank_env import RankContext, choose_port, own_address
from r1hpc.telemetry.records.metrics import MetricWriter, last_steps

_GAP_S = 10.0
"""Requests closer together than this are one spell: a client that asks, reads and asks again."""
_LONGEST_S = 60.0
"""A longer spell is written in parts, so that a kill loses no more of the record."""
STOOD_STILL_S = 60.0
"""A longer pause between checks was a suspension: a check and the wait after it take some 20 s at most."""
_POLL_S = 0.2
_ASK_EVERY_S = 10.0
_MOST_SILENCE_S = 120.0
"""For a server that answered before: a long prefill, or a node that swaps, takes seconds."""
_SIGNAL_PATIENCE_S = 2.0
"""Slurm signals every process of a step: the server may exit before this process gets the signal."""
TIME_LIMIT = "its time limit"
_LOOPBACK = "127.0.0.1"


class Activity:
    def __init__(
        self, writer: MetricWriter, number: int, requests: int = 0, clock: Callable[[], float] = time.time
    ) -> None:
        """Start counting: the server is ready now.

        Args:
            number: of the last recorded spell.
            requests: answered by earlier attempts.
        """
        self._writer, self._clock = writer, clock
        self._number, self._requests = number, requests
        self._in_flight = 0
        self._busy_since: float | None = None
        self._last_busy = self._last_look = clock()
        self._write(self._last_busy, self._last_busy)

    def hear(self, begun: int, ended: int) -> None:
        """Count the answers that began and ended since the last call."""
        now, before = self._clock(), self._last_look
        self._last_look = now
        if now - before > STOOD_STILL_S:  # suspended: nobody could ask, and nothing was answered
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
        """Return the seconds since the last answer; 0 while one is in progress."""
        return 0.0 if self._in_flight > 0 else self._clock() - self._last_busy

    def close(self) -> None:
        """Write the current spell, if any; it ended with its last answer."""
        if self._busy_since is not None:
            self._write(self._busy_since, self._last_busy)
            self._busy_since = None

    def _write(self, begin: float, end: float) -> None:
        self._number += 1
        self._writer.step(
            global_step=self._number, time=end, step_time_s=max(0.0, end - begin), requests=self._requests
        )


class ServerError(R1hpcError):
    """The server failed; its own messages are above, in the log of the rank."""


@dataclass
class Life:
    run: RunDir
    config: RunConfig
    attempt: int
    place: Place
    model_name: str
    stop_reason: Callable[[], str]
    """Reason of a requested end; empty: none yet."""
    seconds_left: Callable[[], float | None]
    """To the job's time limit; None: it has none."""
    lead_s: float
    """Seconds before the limit at which it ends."""
    beat: Callable[[str], None]
    """Tell the watchdog."""

    def live(self, command: Sequence[str], environment: Mapping[str, str]) -> Outcome:
        """Start it, wait until it answers, and stay with it; its key file exists.

        Raise UsageError if the interpreter has no vLLM, ServerError if it died, never answered, stopped
        answering, or answers without the key.
        """
        forget_address(self.run)  # of an attempt that was killed
        with started(command, environment, self.place) as server:
            return self._wait_until_it_answers(server) or self._serve(server)

    def _wait_until_it_answers(self, server: Server) -> Outcome | None:
        key, began = read_key(self.run), time.monotonic()
        while not (known := server.is_ours(key)) or server.ask("/health", key) != 200:
            if known is False:
                raise ServerError(
                    f"the process at {server.url} does not have the server's key: its gate is missing, or "
                    "another process took the port"
                )
            self.beat("starting the server")
            if ended := self._end(server):
                return ended
            if time.monotonic() - began > self.config.serve.start_minutes * 60:
                most = f"serve.start_minutes={self.config.serve.start_minutes:g}"
                raise ServerError(f"the server did not answer within {most}")
            time.sleep(_POLL_S)
        return self._prove_closed(server)

    def _prove_closed(self, server: Server) -> Outcome | None:
        """Check at every start that it refuses requests without the key; return an end in between."""
        for path in ("/v1/models", "/metrics", "/pause"):
            while (said := server.ask(path, None)) is None:
                if ended := self._end(server):
                    return ended
                time.sleep(_POLL_S)
            if said != 401:
                raise ServerError(f"the server answers {path} without its key (HTTP {said}): it was ended")
        return None

    def _serve(self, server: Server) -> Outcome:
        number = requests = 0  # of the last spell of an earlier attempt
        if newest := last_steps(self.run, 1):
            number, requests = newest[-1].global_step, int(newest[-1].number("requests") or 0)
        activity = Activity(MetricWriter(self.run, self.attempt), number, requests)
        try:
            write_address(self.run, Address(self.place, self.model_name, self.attempt))
            print(f"serving {self.model_name} at {server.url}", flush=True)
            return self._until_the_end(server, activity)
        finally:
            forget_address(self.run)
            # Recorded before it ends, which takes up to ten seconds that may not be left.
            activity.hear(*server.news())
            activity.close()
            server.end()  # answers in progress end within its grace time, and count
            activity.hear(*server.news())
            activity.close()

    def _until_the_end(self, server: Server, activity: Activity) -> Outcome:
        health = _Health(server, read_key(self.run))
        while True:
            self.beat("serving")
            activity.hear(*server.news())
            if ended := self._end(server):
                return ended
            idle_s, most_s = activity.idle_s(), self.config.serve.idle_minutes * 60
            if most_s and idle_s >= most_s:
                return Outcome(True, reason=f"no request for {format_duration(idle_s)} (serve.idle_minutes)")
            health.look()
            time.sleep(_POLL_S)

    def _asked_end(self) -> Outcome | None:
        """Return the end if the clock or a request ends it now."""
        left, reason = self.seconds_left(), self.stop_reason()
        early_s = EARLY_S if reason == "SIGUSR2" else 0.0
        if left is not None and left <= self.lead_s + early_s:
            return Outcome(True, reason=TIME_LIMIT)
        return Outcome(False, reason=reason) if reason else None

    def _end(self, server: Server) -> Outcome | None:
        """Return the end if there is one now; raise UsageError or ServerError if the server died before."""
        status = server.status()
        if status is None:
            return self._asked_end()
        if status == NO_VLLM:
            raise UsageError("the interpreter has no vLLM: name one that has by serve.python=PYTHON")
        deadline = time.monotonic() + _SIGNAL_PATIENCE_S
        while time.monotonic() < deadline:
            if ended := self._asked_end():
                return ended
            time.sleep(_POLL_S / 4)
        how = f"by signal {-status}" if status < 0 else f"with exit status {status}"
        raise ServerError(f"the server ended by itself, {how}; see the messages above in this log")


@dataclass
class _Health:
    server: Server
    key: str
    asked: float = field(default_factory=time.monotonic)
    answered: float = field(default_factory=time.monotonic)

    def look(self) -> None:
        """Ask, at intervals; raise ServerError if it has been silent for too long."""
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


def serve(job: RankJob) -> Outcome:
    """Serve the model until a stop is requested, it is idle too long, or the time is up.

    Raise UsageError if the interpreter has no vLLM, R1hpcError if the server failed, or this node has no
    address.
    """
    run, config, context = job.run, job.config, job.context
    place = _place(config, context)
    name = config.serve.model_name or run.run_id
    ends_at = _ends_at(run, config, context)

    def stop_reason() -> str:
        stop, _ = job.requests.poll()
        return job.requests.reason if stop else ""

    life = Life(
        run,
        config,
        context.attempt,
        place,
        name,
        stop_reason=stop_reason,
        seconds_left=lambda: None if ends_at is None else ends_at - time.monotonic(),
        lead_s=0.0 if _is_local(context) else config.resources.signal_lead_s or 0.0,
        beat=job.watchdog.beat,
    )
    command = command_of(config, [sys.executable], place, name)
    return life.live(command, environment_of(os.environ, run.code, make_key(run)))


def _place(config: RunConfig, context: RankContext) -> Place:
    host = config.serve.host
    if not host:
        host = _LOOPBACK if _is_local(context) else own_address(os.environ, context.node_name)
    port = config.serve.port
    if not port:  # one that is free now; vLLM binds it before loading the model
        with choose_port() as listener:
            port = int(listener.getsockname()[1])
    return Place(host, port, context.node_name)


def _ends_at(run: RunDir, config: RunConfig, context: RankContext) -> float | None:
    """Return when the time limit ends the job, by time.monotonic(); without Slurm nobody else enforces it."""
    if not _is_local(context):
        return read_facts(run, context.attempt).ends_at
    limit_s = parse_time(config.resources.time or "0")  # 0 is no limit, as in Slurm
    return time.monotonic() + limit_s if limit_s else None


def _is_local(context: RankContext) -> bool:
    return context.master_host == _LOOPBACK
