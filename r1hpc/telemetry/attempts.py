"""attempts.jsonl: every submission and every attempt of a run, and how each attempt ended.

Events, one JSON line each, appended in order and never changed:

    submitted  time executor job_id script time_limit_s
    begin      time attempt token job_id executor host node_names gpus ranks resumed_from
    end        time attempt cause detail exit_status last_committed_step kept requeued inferred
    cancel_requested  time by

An attempt killed without a word has no `end`; the next `begin` writes it, marked `inferred`. An attempt whose
requeue was promised in its `end` and did not come about has a second `end`, without it: the later one counts.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from r1hpc.base.files import append_record, iter_records, read_records
from r1hpc.base.rundir import RunDir
from r1hpc.config.schema import LimitsConfig


class Cause(StrEnum):
    """Why an attempt ended."""

    finished = "finished"
    stopped = "stopped"
    """STOP was touched."""
    preempted = "preempted"
    timeout = "timeout"
    node_fail = "node_fail"
    oom = "oom"
    crash = "crash"
    hang = "hang"
    cancelled = "cancelled"
    refused = "refused"
    """The run refused to start: a bad dataset, no usable checkpoint, superseded. Trying again cannot help."""
    unknown = "unknown"


@dataclass(frozen=True)
class Attempt:
    """One attempt of a run. Times are Unix seconds; steps are None where none was taken."""

    attempt: int
    cause: Cause | None
    """None while it runs."""
    start: float
    end: float | None
    nodes: int
    gpus: int
    first_step: int | None
    last_step: int | None
    last_committed_step: int | None
    job_id: str | None = None
    node_names: tuple[str, ...] = ()
    ranks: int = 0
    detail: str = ""
    requeued: bool = False
    inferred: bool = False
    resumed_from: int | None = None
    kept: int = 0
    """Finished pieces of work beyond the last committed step that it left on disk."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Steps:
    first: int
    last: int


@dataclass(frozen=True)
class History:
    """The events of a run, folded."""

    attempts: tuple[Attempt, ...]
    submissions: tuple[dict[str, Any], ...] = field(default_factory=tuple)

    cancel_requested_at: float | None = None
    """When a person last asked for the run to be cancelled."""

    @property
    def last(self) -> Attempt | None:
        return self.attempts[-1] if self.attempts else None

    @property
    def is_cancelled(self) -> bool:
        """Whether a person has asked for the end of the newest submission: resuming takes that back."""
        return (self.cancel_requested_at or 0.0) > self._submitted_at

    @property
    def _submitted_at(self) -> float:
        return max((s["time"] for s in self.submissions), default=0.0)

    @property
    def since_submission(self) -> tuple[Attempt, ...]:
        """Attempts of the newest submission: asking for the run again is asking for fresh limits."""
        return tuple(a for a in self.attempts if a.start >= self._submitted_at)


def record(run: RunDir, event: str, **fields: Any) -> None:
    """Append one event, durably, with the time."""
    append_record(run.attempts, {"event": event, "time": time.time(), **fields})


def read_history(run: RunDir) -> History:
    """Fold attempts.jsonl and the steps found in metrics/train.jsonl into a History."""
    events = read_records(run.attempts)
    steps = steps_by_attempt(run.train_metrics)
    begins = [e for e in events if e.get("event") == "begin"]
    ends = {e["attempt"]: e for e in events if e.get("event") == "end"}
    attempts = tuple(_fold(b, ends.get(b["attempt"]), steps.get(b["attempt"])) for b in begins)
    submissions = tuple(e for e in events if e.get("event") == "submitted")
    cancels = [e["time"] for e in events if e.get("event") == "cancel_requested"]
    return History(attempts, submissions, max(cancels, default=None))


def steps_by_attempt(train_metrics: Path) -> dict[int, _Steps]:
    """First and last optimizer step that each attempt took."""
    found: dict[int, _Steps] = {}
    for line in iter_records(train_metrics):
        attempt, step = line.get("attempt"), line.get("global_step")
        if isinstance(attempt, int) and isinstance(step, int):
            found.setdefault(attempt, _Steps(step, step)).last = step
    return found


def _fold(begin: dict[str, Any], end: dict[str, Any] | None, steps: _Steps | None) -> Attempt:
    names = tuple(begin.get("node_names") or ())
    return Attempt(
        attempt=begin["attempt"],
        cause=Cause(end["cause"]) if end else None,
        start=begin["time"],
        end=(end.get("ended") or end["time"]) if end else None,
        nodes=len(names),
        gpus=begin.get("gpus", 0),
        first_step=steps.first if steps else None,
        last_step=steps.last if steps else None,
        last_committed_step=end.get("last_committed_step") if end else begin.get("resumed_from"),
        job_id=begin.get("job_id"),
        node_names=names,
        ranks=begin.get("ranks", 0),
        detail=end.get("detail", "") if end else "",
        requeued=bool(end and end.get("requeued")),
        inferred=bool(end and end.get("inferred")),
        resumed_from=begin.get("resumed_from"),
        kept=end.get("kept", 0) if end else 0,
    )


def reason_to_stop(attempts: Sequence[Attempt], limits: LimitsConfig) -> str | None:
    """Why the run must not be started again after its last attempt, or None when it may.

    A finished, stopped, cancelled or refused run is over; every other cause has a limit of its own; and
    whatever the causes, attempts in a row without a new checkpoint are a loop that only burns hours.
    """
    if not attempts:
        return None
    last = attempts[-1].cause
    if last in (Cause.finished, Cause.stopped, Cause.cancelled, Cause.refused):
        return f"the run is over: {last.value}"
    limit_of = {
        Cause.preempted: ("max_preemptions", limits.max_preemptions),
        Cause.timeout: ("max_timeouts", limits.max_timeouts),
        Cause.node_fail: ("max_node_failures", limits.max_node_failures),
        Cause.crash: ("max_crashes", limits.max_crashes),
        Cause.unknown: ("max_crashes", limits.max_crashes),
        Cause.oom: ("max_ooms", limits.max_ooms),
        Cause.hang: ("max_hangs", limits.max_hangs),
    }
    if last in limit_of:
        name, limit = limit_of[last]
        count = sum(a.cause is last for a in attempts)
        if 0 <= limit < count:
            return f"{count} attempts ended by {last.value}, and limits.{name} is {limit}"
    idle = attempts_without_checkpoint(attempts)
    if idle >= limits.max_attempts_without_checkpoint:
        return (
            f"no new checkpoint in the last {idle} attempts "
            f"(limits.max_attempts_without_checkpoint={limits.max_attempts_without_checkpoint}): "
            "read the log of the last attempt; save more often (checkpoint.save_every) or ask for more time"
        )
    return None


def seconds_left(history: History, max_gpu_hours: float | None, now: float) -> float | None:
    """Wall seconds the attempt under way may still take of the run's own allowance; None: no limit.

    A run without GPUs has none either.
    """
    this = history.last
    if max_gpu_hours is None or this is None or this.gpus == 0:
        return None
    return max(0.0, max_gpu_hours - gpu_hours_used(history, now)) * 3600 / this.gpus


def gpu_hours_used(history: History, now: float) -> float:
    """GPU-hours of all attempts by the run's own record; one that runs counts until now."""
    return sum(a.gpus * ((a.end or now) - a.start) for a in history.attempts) / 3600


def attempts_without_checkpoint(attempts: Iterable[Attempt]) -> int:
    """How many attempts at the end of the list left nothing that the one before them had not.

    That is a newer checkpoint, or more finished pieces (groups of a rollout, held-out answers) beyond the
    same one. Attempts that a scheduler ended before they could take a step count too: they burn hours all
    the same.
    """
    listed = list(attempts)
    kept_before = [0, *(attempt.kept for attempt in listed)]
    idle = 0
    for attempt, kept in reversed(list(zip(listed, kept_before, strict=False))):
        if (attempt.last_committed_step or 0, attempt.kept) > (attempt.resumed_from or 0, kept):
            break
        idle += 1
    return idle
