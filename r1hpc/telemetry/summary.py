"""A run in numbers, from its own folder: each attempt's time split into what was useful and what was not.

    summary = summarise_run(run, read_history(run), now=time.time(), running=False)
    summary.total.lost_s

An attempt that has not ended counts until `now` when it is known to run, and otherwise until its last sign
of life, which is a lower bound.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from r1hpc.base.rundir import RunDir
from r1hpc.telemetry.attempts import Attempt, Cause, History
from r1hpc.telemetry.hours import Allocation
from r1hpc.telemetry.metrics import Step, Steps, read_events, read_steps
from r1hpc.telemetry.timeline import Part, Span, Split, milliseconds, paint, spans_of

_WITHOUT_STEPS = ("traces", "generate", "evaluate")
"""Stages that keep what they have done part by part: nothing of it is done again."""


@dataclass(frozen=True)
class TimeSplit:
    """Wall seconds: `wall_s` is the sum of the others."""

    wall_s: float = 0.0
    startup_s: float = 0.0
    """From the attempt's begin until its first step."""
    useful_s: float = 0.0
    """In steps that lasted."""
    lost_s: float = 0.0
    """In steps that were taken again, or will be."""
    save_s: float = 0.0
    other_s: float = 0.0
    """The rest: leaving, waiting for a hang to be noticed, time without word."""

    def to_json(self) -> dict[str, float]:
        return dict(vars(self))


@dataclass(frozen=True)
class AttemptSummary:
    """One attempt: what it was, when it really ended, and where its time went."""

    attempt: Attempt
    end: float
    split: Split
    num_steps: int
    num_lost: int
    useful: tuple[Step, ...] = ()
    lost: tuple[Step, ...] = ()
    events: tuple[dict[str, Any], ...] = ()
    has_steps: bool = True
    """False: its stage takes none."""

    @property
    def time(self) -> TimeSplit:
        return _in_seconds(self.split)

    @property
    def gpu_hours(self) -> float:
        return self.attempt.gpus * self.split.allocated / 3_600_000

    def spans(self, began: float | None = None) -> Iterable[Span]:
        """See timeline.spans_of."""
        if not self.has_steps:
            return [Span(Part.useful, milliseconds(self.attempt.start), milliseconds(self.end))]
        return spans_of(self.attempt, self.end, self.useful, self.lost, self.events, began)


@dataclass(frozen=True)
class RunSummary:
    """All attempts."""

    attempts: tuple[AttemptSummary, ...]
    steps: Steps
    run_id: str = ""
    stage: str = ""

    @property
    def total(self) -> TimeSplit:
        return _in_seconds(sum((a.split for a in self.attempts), Split()))

    @property
    def gpu_hours(self) -> float:
        return sum(a.gpu_hours for a in self.attempts)

    @property
    def num_useful(self) -> int:
        return sum(a.num_steps - a.num_lost for a in self.attempts)

    @property
    def num_lost(self) -> int:
        return sum(a.num_lost for a in self.attempts)

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
                run=self.run_id,
                stage=self.stage,
            )
            for a in self.attempts
        ]


def summarise_run(run: RunDir, history: History, now: float, running: bool) -> RunSummary:
    """Fold attempts, steps and events of a run. `running`: its last attempt is known to be alive."""
    steps, stage = read_steps(run), stage_of(run)
    events: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for event in read_events(run):
        events[event.get("attempt", 0)].append(event)
    effective, lost = _by_attempt(steps.effective.values()), _by_attempt(steps.lost)
    attempts = []
    for attempt in history.attempts:
        k = attempt.attempt
        alive = running and attempt is history.last
        useful, undone = _kept(attempt, effective[k])
        attempts.append(
            _summarise(attempt, useful, lost[k] + undone, events[k], now if alive else None, stage)
        )
    return RunSummary(tuple(attempts), steps, run.run_id, stage)


def stage_of(run: RunDir) -> str:
    """The stage of the run's configuration.

    Read by its line: the file is resolved YAML that we wrote, and a YAML parser takes longer to import than
    a report may take. One that was spoilt since must not stop the report of the others.
    """
    text = run.config.read_text(errors="replace") if run.config.is_file() else ""
    found = re.search(r"^stage: *(\w+)", text, re.M)
    return found[1] if found else "pretrain"


def _kept(attempt: Attempt, steps: list[Step]) -> tuple[list[Step], list[Step]]:
    """Steps that are in a checkpoint or may still get there, and those that ended with their attempt."""
    if attempt.cause in (None, Cause.finished):
        return steps, []
    last = attempt.last_committed_step or 0
    return [s for s in steps if s.global_step <= last], [s for s in steps if s.global_step > last]


def _summarise(
    attempt: Attempt,
    useful: list[Step],
    lost: list[Step],
    events: list[dict[str, Any]],
    now: float | None,
    stage: str,
) -> AttemptSummary:
    taken = sorted([*useful, *lost], key=lambda step: step.global_step)
    end = attempt.end or now or _last_sign(attempt, taken, events)
    summary = AttemptSummary(
        attempt=attempt,
        end=end,
        split=Split(),
        num_steps=len(taken),
        num_lost=len(lost),
        useful=tuple(useful),
        lost=tuple(lost),
        events=tuple(events),
        has_steps=bool(taken) or stage not in _WITHOUT_STEPS,
    )
    begin = milliseconds(attempt.start)
    return replace(summary, split=paint(summary.spans(), begin, max(begin, milliseconds(end))))


def _last_sign(attempt: Attempt, taken: list[Step], events: list[dict[str, Any]]) -> float:
    times = [step.time for step in taken[-1:]] + [event.get("time") for event in events[-1:]]
    return max(attempt.start, *(float(time) for time in times if time is not None), 0.0)


def _by_attempt(steps: Iterable[Step]) -> defaultdict[int, list[Step]]:
    found: defaultdict[int, list[Step]] = defaultdict(list)
    for step in steps:
        found[step.attempt].append(step)
    return found


def _in_seconds(split: Split) -> TimeSplit:
    return TimeSplit(
        wall_s=split.allocated / 1000,
        startup_s=split.startup / 1000,
        useful_s=split.useful / 1000,
        lost_s=split.lost / 1000,
        save_s=split.save / 1000,
        other_s=split.idle / 1000,
    )
