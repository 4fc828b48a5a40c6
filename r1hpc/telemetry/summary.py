"""A run in numbers, from its own folder: each attempt's time split into what was useful and what was not.

    summary = summarise_run(run, read_history(run), now=time.time(), running=False)
    summary.total.lost_s

An attempt that has not ended counts until `now` when it is known to run, and otherwise until its last sign
of life, which is a lower bound.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from r1hpc.base.rundir import RunDir
from r1hpc.telemetry.attempts import Attempt, History
from r1hpc.telemetry.hours import Allocation
from r1hpc.telemetry.metrics import Step, Steps, read_events, read_steps


@dataclass(frozen=True)
class TimeSplit:
    """Wall seconds. `other_s` is the rest: leaving, waiting for a hang to be noticed, time without word."""

    wall_s: float = 0.0
    startup_s: float = 0.0
    """From the attempt's begin until its first step."""
    useful_s: float = 0.0
    """In steps that lasted."""
    lost_s: float = 0.0
    """In steps that were taken again, or will be."""
    save_s: float = 0.0

    @property
    def other_s(self) -> float:
        return max(0.0, self.wall_s - self.startup_s - self.useful_s - self.lost_s - self.save_s)

    def to_json(self) -> dict[str, float]:
        return {**asdict(self), "other_s": self.other_s}

    def __add__(self, other: "TimeSplit") -> "TimeSplit":
        return TimeSplit(*(a + b for a, b in zip(_seconds(self), _seconds(other), strict=True)))


@dataclass(frozen=True)
class AttemptSummary:
    """One attempt: what it was, when it really ended, and where its time went."""

    attempt: Attempt
    end: float
    time: TimeSplit
    num_steps: int
    num_lost: int

    @property
    def gpu_hours(self) -> float:
        return self.attempt.gpus * self.time.wall_s / 3600


@dataclass(frozen=True)
class RunSummary:
    """All attempts."""

    attempts: tuple[AttemptSummary, ...]
    steps: Steps

    @property
    def total(self) -> TimeSplit:
        return sum((a.time for a in self.attempts), TimeSplit())

    @property
    def gpu_hours(self) -> float:
        return sum(a.gpu_hours for a in self.attempts)

    def allocations(self, user: str) -> list[Allocation]:
        """The run's own account of what it held. Slurm's view is longer: see `sacct -D`."""
        return [
            Allocation(
                start=a.attempt.start,
                end=a.end,
                gpus=a.attempt.gpus,
                nodes=a.attempt.nodes,
                user=user,
                state=a.attempt.cause.value if a.attempt.cause else "running",
            )
            for a in self.attempts
        ]


def summarise_run(run: RunDir, history: History, now: float, running: bool) -> RunSummary:
    """Fold attempts, steps and events of a run. `running`: its last attempt is known to be alive."""
    steps = read_steps(run)
    events: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for event in read_events(run):
        events[event.get("attempt", 0)].append(event)
    effective, lost = _by_attempt(steps.effective.values()), _by_attempt(steps.lost)
    attempts = []
    for attempt in history.attempts:
        k = attempt.attempt
        alive = running and attempt is history.last
        attempts.append(_summarise(attempt, effective[k], lost[k], events[k], now if alive else None))
    return RunSummary(tuple(attempts), steps)


def _summarise(
    attempt: Attempt, effective: list[Step], lost: list[Step], events: list[dict[str, Any]], now: float | None
) -> AttemptSummary:
    taken = sorted([*effective, *lost], key=lambda step: step.global_step)
    end = attempt.end or now or _last_sign(attempt, taken, events)
    return AttemptSummary(
        attempt=attempt,
        end=end,
        time=TimeSplit(
            wall_s=max(0.0, end - attempt.start),
            startup_s=max(0.0, min(end, _first_step_begins(attempt, taken, events, end)) - attempt.start),
            useful_s=sum(step.step_time_s or 0.0 for step in effective),
            lost_s=sum(step.step_time_s or 0.0 for step in lost),
            save_s=sum(event.get("seconds", 0.0) for event in events if event.get("event") == "save"),
        ),
        num_steps=len(taken),
        num_lost=len(lost),
    )


def _first_step_begins(
    attempt: Attempt, taken: list[Step], events: list[dict[str, Any]], end: float
) -> float:
    """When the first step began; `end` when there was none: then all of the attempt was start-up."""
    for event in events:
        if event.get("event") == "start" and "seconds_to_first_step" in event:
            return attempt.start + float(event["seconds_to_first_step"])
    if not taken or taken[0].time is None:
        return end
    return taken[0].time - (taken[0].step_time_s or 0.0)


def _last_sign(attempt: Attempt, taken: list[Step], events: list[dict[str, Any]]) -> float:
    times = [step.time for step in taken[-1:]] + [event.get("time") for event in events[-1:]]
    return max(attempt.start, *(float(time) for time in times if time is not None), 0.0)


def _by_attempt(steps: Iterable[Step]) -> defaultdict[int, list[Step]]:
    found: defaultdict[int, list[Step]] = defaultdict(list)
    for step in steps:
        found[step.attempt].append(step)
    return found


def _seconds(split: TimeSplit) -> tuple[float, ...]:
    return (split.wall_s, split.startup_s, split.useful_s, split.lost_s, split.save_s)
