"""Split the time of an attempt into useful, lost, saves, start-up and idle, adding up exactly to its length.

Each record is a span: a step or a save ends at its `time` and took its seconds, start-up ends where the first
step begins. If spans overlap (a save beside a step, clocks of two hosts) the first of Part's order gets the
time; uncovered time is idle.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any, NamedTuple

from r1hpc.telemetry.records.attempts import Attempt
from r1hpc.telemetry.records.metrics import Step


class Part(IntEnum):
    useful = 0
    """In lasting steps, and in evaluations between them."""
    lost = 1
    """In steps that were repeated, or will have to be."""
    save = 2
    startup = 3
    """Until the first step: imports, loading the checkpoint. All of an attempt without steps."""
    idle = 4
    """The rest: exiting, waiting for a hang to be noticed, after the last step, unrecorded time."""


class Span(NamedTuple):
    """Milliseconds since 1970."""

    part: Part
    begin: int
    end: int


@dataclass(frozen=True)
class Split:
    """Milliseconds by part; of an allocation, or multiplied by its GPUs."""

    useful: int = 0
    lost: int = 0
    startup: int = 0
    save: int = 0
    idle: int = 0

    @property
    def _parts(self) -> tuple[int, ...]:
        """Return all fields. dataclasses.astuple copies each one, and a history has thousands."""
        return self.useful, self.lost, self.startup, self.save, self.idle

    @property
    def allocated(self) -> int:
        return sum(self._parts)

    def __add__(self, other: "Split") -> "Split":
        return Split(*(a + b for a, b in zip(self._parts, other._parts, strict=True)))

    def __mul__(self, width: float) -> "Split":
        return Split(*(round(width * part) for part in self._parts))

    def in_hours(self) -> dict[str, float]:
        """Return each part and `allocated`, their sum."""
        parts = {each.name: getattr(self, each.name) / 3_600_000 for each in fields(self)}
        return {**parts, "allocated": self.allocated / 3_600_000}


def split_time(spans: Iterable[Span], begin: int, end: int) -> Split:
    """Split the time from `begin` to `end`, in milliseconds."""
    edges: list[tuple[int, int, int]] = []
    for part, start, stop in spans:
        start, stop = max(start, begin), min(stop, end)
        if start < stop:
            edges += [(start, int(part), 1), (stop, int(part), -1)]
    edges.sort()
    covered, active, at = [0] * len(Part), [0] * len(Part), begin
    for moment, which, change in edges:
        if moment > at:
            first = next((part for part, count in enumerate(active) if count), Part.idle)
            covered[first] += moment - at
            at = moment
        active[which] += change
    covered[Part.idle] += max(0, end - at)
    return Split(**{part.name: covered[part] for part in Part})


def spans_of(
    attempt: Attempt,
    end: float,
    useful: Sequence[Step],
    lost: Sequence[Step],
    events: Sequence[dict[str, Any]],
) -> Iterator[Span]:
    """Yield the spans of one attempt; it ended at `end`, Unix seconds."""
    for part, steps in ((Part.useful, useful), (Part.lost, lost)):
        for step in steps:
            if step.time is not None:
                yield _span(part, step.time - (step.step_time_s or 0.0), step.time)
    for event in events:
        if event["event"] == "save":
            # While its state was copied, and (all of it, formerly) at the end.
            seconds, waited_s = event.get("seconds", 0.0), event.get("waited_s")
            waited_s = seconds if waited_s is None else waited_s
            yield _span(Part.save, event["time"] - waited_s, event["time"])
            if event.get("copied_at") is not None:
                yield _span(Part.save, event["copied_at"] - (seconds - waited_s), event["copied_at"])
        if event["event"] == "evaluation":
            yield _span(Part.useful, event["time"] - event.get("seconds", 0.0), event["time"])
    begins = [s.time - (s.step_time_s or 0.0) for s in (*useful, *lost) if s.time is not None]
    yield _span(Part.startup, attempt.start, min(begins, default=end))


def milliseconds(seconds: float) -> int:
    return round(1000 * seconds)


def _span(part: Part, begin: float, end: float) -> Span:
    return Span(part, milliseconds(begin), milliseconds(end))
