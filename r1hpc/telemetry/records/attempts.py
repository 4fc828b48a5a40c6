"""Record and read attempts.jsonl: every submission and attempt of a run, and how each attempt ended.

Events are JSON lines, appended in order and never changed. Their order is their place in the file: each time
is by its writer's clock, and the clocks of hosts differ.

    submitted  time executor job_id script time_limit_s
    resubmitted  time executor job_id
    begin      time attempt token job_id job_start executor host cluster node_names gpus ranks resumed_from
               restarts
    end        time attempt cause detail exit_status last_committed_step kept requeued inferred resumed_from
               not_continued ended
    cancel_requested  time by
    excluded   time node reason job_id
    not_begun  time job_id cause detail

`resubmitted`: the cluster forbids requeueing, and the run continues in another job. `ended` is when the
attempt ended, where it was recorded later. `resumed_from` in `begin` is the newest checkpoint there is, in
`end` the one that could be loaded.

A killed attempt has no `end`; the next `begin` writes it, marked `inferred`. If the requeue promised in an
`end` did not happen, the attempt gets a second `end` without it, and the later one counts. So does the second
`end` of an attempt whose cause Slurm named later. `not_continued` is the limit that ended the run.
`not_begun` tells why no attempt follows: STOP exists, a limit is reached, the data cannot be used.
"""

import functools
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, NotRequired, TypedDict

from r1hpc.base.errors import StateError
from r1hpc.base.files import append_record, open_plain, parse_object
from r1hpc.base.records import Count, Time, mistake
from r1hpc.base.run_dir import RunDir
from r1hpc.telemetry.records.metrics import steps_from
from r1hpc.telemetry.records.summary_file import read_summary

NAMING = ("submitted", "resubmitted", "begin")
"""The events that name the newest job of a run."""
_MOST_LINES = 5
AGAIN_BY_ITSELF = "the script asked to be run again"
"""Reason of a script's end by its own exit status, which no cluster caused."""


class Cause(StrEnum):
    """Why an attempt ended."""

    finished = "finished"
    stopped = "stopped"
    """The user created STOP."""
    preempted = "preempted"
    timeout = "timeout"
    node_fail = "node_fail"
    oom = "oom"
    crash = "crash"
    hang = "hang"
    cancelled = "cancelled"
    refused = "refused"
    """The run refused to start: a bad dataset, no usable checkpoint, superseded. Trying again cannot help."""
    cluster = "cluster"
    """Neither the run nor a node: srun started no rank, Slurm lost the job, or the run's disk failed."""
    unknown = "unknown"

    @property
    def is_final(self) -> bool:
        """True if the run is over after it, whatever its limits."""
        return self in (Cause.finished, Cause.stopped, Cause.cancelled, Cause.refused)


class _Event(TypedDict):
    """The fields of any event not defined below."""

    event: str
    time: Time
    job_id: NotRequired[str | int | None]
    executor: NotRequired[str | None]
    host: NotRequired[str | None]


class _Begin(_Event):
    attempt: Count
    node_names: NotRequired[list[str] | None]
    gpus: NotRequired[Count]
    ranks: NotRequired[Count]
    resumed_from: NotRequired[Count | None]
    restarts: NotRequired[Count]
    job_start: NotRequired[Time | None]


class _End(_Event):
    attempt: Count
    cause: Cause
    ended: NotRequired[Time | None]
    detail: NotRequired[str]
    last_committed_step: NotRequired[Count | None]
    resumed_from: NotRequired[Count | None]
    kept: NotRequired[Count]
    not_continued: NotRequired[str]


class _NotBegun(_Event):
    cause: Cause


class _Excluded(_Event):
    node: str


_SHAPES = {"begin": _Begin, "end": _End, "not_begun": _NotBegun, "excluded": _Excluded}


@dataclass(frozen=True)
class Attempt:
    """One attempt of a run. Times are Unix seconds; steps are None if none was taken."""

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
    not_continued: str = ""
    """The limit after which no attempt follows; empty if none was reached."""
    job_start: float | None = None
    """Start of its job by slurmctld's clock: Start in its accounting record."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class NotBegun:
    """The reason that a job of the run began no attempt, and none follows."""

    cause: Cause
    detail: str


@dataclass(frozen=True)
class History:
    """The events of a run, folded."""

    attempts: tuple[Attempt, ...]
    submissions: tuple[dict[str, Any], ...] = ()
    places: Mapping[str, int] = field(default_factory=dict)
    """The place of the newest event of each kind."""
    notes: tuple[str, ...] = ()
    """Sentences on unreadable parts of attempts.jsonl."""
    not_begun: NotBegun | None = None
    num_earlier: int = 0
    """Attempts of earlier submissions."""

    @property
    def last(self) -> Attempt | None:
        return self.attempts[-1] if self.attempts else None

    def is_newer(self, event: str, *others: str) -> bool:
        """True if the newest `event` came after the newest of all `others`."""
        return self.places.get(event, -1) > max(self.places.get(other, -1) for other in others)

    @property
    def is_cancelled(self) -> bool:
        """True if a user cancelled the newest submission; resuming revokes that."""
        return self.is_newer("cancel_requested", "submitted")

    @property
    def since_submission(self) -> tuple[Attempt, ...]:
        """Return the attempts of the newest submission: a new submission gets fresh limits."""
        return self.attempts[self.num_earlier :]


def record(run: RunDir, event: str, **fields: Any) -> None:
    """Append one event, durably, with the time."""
    append_record(run.attempts, {"event": event, "time": time.time(), **fields})


def read_history(run: RunDir) -> History:
    """Fold attempts.jsonl, and the steps of each attempt from metrics/train.jsonl, into a History.

    Raise StateError if no line of attempts.jsonl can be read.
    """
    events, notes = read_run_events(run)
    steps = _steps_by_attempt(run)
    ends = {e["attempt"]: e for e in events if e.get("event") == "end"}
    attempts = tuple(
        _fold(e, ends.get(e["attempt"]), steps.get(e["attempt"])) for e in events if e.get("event") == "begin"
    )
    submissions = tuple(e for e in events if e.get("event") == "submitted")
    places = {e["event"]: place for place, e in enumerate(events)}
    earlier = events[: places.get("submitted", 0)]
    not_begun = None
    if "not_begun" in places:
        event = events[places["not_begun"]]
        not_begun = NotBegun(Cause(event["cause"]), str(event.get("detail", "")))
    num_earlier = sum(e["event"] == "begin" for e in earlier)
    return History(attempts, submissions, places, notes, not_begun, num_earlier)


def in_order(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sort events read from the file into the order in which they happened.

    That is their order in the file, except for a submission: it is written after sbatch answered, when its
    job may have begun already. It goes before the first event of its job.
    """
    placed: list[tuple[float, dict[str, Any]]] = []
    first: dict[str, int] = {}
    submitted: set[str] = set()
    for place, event in enumerate(events):
        job_id, key = str(event.get("job_id")), float(place)
        if event["event"] in ("submitted", "resubmitted"):
            key = first.pop(job_id, place) - 0.5
            submitted.add(job_id)
        elif event.get("job_id") and job_id not in submitted:
            first.setdefault(job_id, place)
        placed.append((key, event))
    return [event for _, event in sorted(placed, key=lambda each: each[0])]


def read_run_events(run: RunDir) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """Return the events of attempts.jsonl, oldest first, and a sentence on unreadable lines, if any; raise
    StateError if none can be read."""
    try:
        with open_plain(run.attempts) as file:
            events, bad = _parse_events(file.read())
    except FileNotFoundError:
        return [], ()
    if not bad:
        return list(events), ()
    some = ", ".join(bad[:_MOST_LINES]) + (" ..." if len(bad) > _MOST_LINES else "")
    unreadable = f"{run.attempts}: line {some} cannot be read"
    if not events:
        raise StateError(f"{unreadable}, and there is no other: restore it or remove the run")
    return list(events), (f"{unreadable} and is left out: what it said of an attempt is missing",)


@functools.lru_cache(maxsize=1)
def _parse_events(content: bytes) -> tuple[Sequence[dict[str, Any]], Sequence[str]]:
    """Return the events in order, and the numbers of lines that cannot be read.

    One command reads the same file several times, one run after the other.
    """
    lines = content.split(b"\n")
    torn = lines.pop()  # a line being written, or torn by a kill, has no end
    events, bad = [], []
    for number, line in enumerate(lines, start=1):
        event = parse_event(line)
        if event is not None:
            events.append(event)
        elif line.strip():
            bad.append(str(number))
    last = parse_event(torn)
    if last is not None:
        events.append(last)
    elif b"\0" in torn:  # left by a power cut, never by a kill
        bad.append(str(len(lines) + 1))
    return in_order(events), bad


def parse_event(line: bytes) -> dict[str, Any] | None:
    """Parse an event written by `record`; None: the line is torn, or not ours."""
    event = parse_object(line)
    if event is None or mistake(event, _SHAPES.get(str(event.get("event")), _Event)) is not None:
        return None
    return event


def _steps_by_attempt(run: RunDir) -> dict[int, tuple[int, int]]:
    """Return the first and last step of each attempt; of ended ones from the summary."""
    stored = read_summary(run)
    offset = stored.train.offset(run.train_metrics) if stored else None
    found: dict[int, tuple[int, int]] = {}
    if stored is not None and offset is not None:
        for each in stored.attempts:
            if each.first_step is not None and each.last_step is not None:
                found[each.attempt] = (each.first_step, each.last_step)
    for _, step in steps_from(run, offset or 0):
        if step is not None:
            first, _ = found.get(step.attempt, (step.global_step, 0))
            found[step.attempt] = (first, step.global_step)
    return found


def _fold(begin: dict[str, Any], end: dict[str, Any] | None, steps: tuple[int, int] | None) -> Attempt:
    first_step, last_step = steps or (None, None)
    names = tuple(begin.get("node_names") or ())
    return Attempt(
        attempt=begin["attempt"],
        cause=Cause(end["cause"]) if end else None,
        start=begin["time"],
        # Inferred from accounting, whose clock differs and counts whole seconds.
        end=max(begin["time"], end.get("ended") or end["time"]) if end else None,
        nodes=len(names),
        gpus=begin.get("gpus", 0),
        first_step=first_step,
        last_step=last_step,
        last_committed_step=end.get("last_committed_step") if end else begin.get("resumed_from"),
        job_id=begin.get("job_id"),
        node_names=names,
        ranks=begin.get("ranks", 0),
        detail=end.get("detail", "") if end else "",
        requeued=bool(end and end.get("requeued")),
        inferred=bool(end and end.get("inferred")),
        resumed_from=(end or {}).get("resumed_from", begin.get("resumed_from")),
        kept=end.get("kept", 0) if end else 0,
        not_continued=end.get("not_continued", "") if end else "",
        job_start=begin.get("job_start"),
    )


def gpu_hours_used(history: History, now: float) -> float:
    """Return the GPU-hours of all attempts by the run's own record; a running one counts until now."""
    return sum(a.gpus * max(0.0, (a.end or now) - a.start) for a in history.attempts) / 3600
