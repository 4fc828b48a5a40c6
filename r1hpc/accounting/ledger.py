"""The ledger of a run: each allocation it held, and where those GPU-hours went.

    ledger = open_ledger(review_run(run, now), now)
    ledger.split().in_hours()     # {useful, lost, startup, save, idle, allocated}, GPU-hours
    ledger.queue_s

The allocations are Slurm's, one for each attempt (`sacct -D`); what happened in them is the run's own
record. Of an attempt that the accounting does not know the run's record is all there is, and `source` says
so: it begins when the attempt does, some seconds after the allocation. In integer milliseconds, so that

    useful + lost + startup + save + idle == allocated

to the last one. Waiting in the queue is no GPU-hour and stands beside them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from r1hpc.accounting.forecast import Spread
from r1hpc.accounting.review import Review
from r1hpc.accounting.runs import read_estimate
from r1hpc.accounting.selection import Selection
from r1hpc.attempt.state import State
from r1hpc.base.tables import bar, format_table, share
from r1hpc.base.units import format_duration
from r1hpc.slurm.sacct import JobRecord
from r1hpc.telemetry.attempts import History
from r1hpc.telemetry.hours import Allocation
from r1hpc.telemetry.summary import AttemptSummary, RunSummary
from r1hpc.telemetry.timeline import Span, Split, milliseconds, paint

_WAITING = (State.queued, State.requeued)
_WHOSE = {
    "sacct": "sacct -D",
    "run": "the run's own record, for want of sacct",
    "sacct and run": "sacct -D and, for attempts it does not know, the run's own record",
}
_PARTS = (
    ("useful", "steps that lasted"),
    ("lost", "steps done again, or lost"),
    ("startup", "start-up"),
    ("save", "saves"),
    ("idle", "idle, no step"),
)


@dataclass(frozen=True)
class Entry:
    """One allocation."""

    allocation: Allocation
    attempts: tuple[int, ...]
    """Numbers of those that began in it; none: it ended before one could."""
    wall: Split

    def to_json(self) -> dict[str, Any]:
        held = self.allocation
        return {
            "start": held.start,
            "end": held.end,
            "gpus": held.gpus,
            "nodes": held.nodes,
            "state": held.state,
            "attempts": list(self.attempts),
            "split": (self.wall * held.gpus).in_hours(),
        }


@dataclass(frozen=True)
class RunLedger:
    """What one run held and waited for."""

    run_id: str
    stage: str
    source: str
    """`sacct`, `run`, or `sacct and run`."""
    entries: tuple[Entry, ...]
    queue_s: float
    """Seconds in the queue, of all attempts and of what waits now."""
    planned: Spread | None = None
    """The estimate stored at submission, in GPU-hours, of a CPU run in node-hours; None: there is none, or
    only a part of the run's time is selected."""

    def split(self) -> Split:
        """GPU-milliseconds."""
        return sum((entry.wall * entry.allocation.gpus for entry in self.entries), Split())

    def node_split(self) -> Split:
        """Node-milliseconds: what a CPU run costs."""
        return sum((entry.wall * entry.allocation.nodes for entry in self.entries), Split())

    def to_json(self) -> dict[str, Any]:
        return {
            "planned": None if self.planned is None else self.planned.to_json(),
            "split": {**self.split().in_hours(), "queue_s": self.queue_s},
            "node_split": self.node_split().in_hours(),
            "allocations": [entry.to_json() for entry in self.entries],
        }


def open_ledger(review: Review, now: float, selection: Selection | None = None) -> RunLedger:
    """Join the two accounts of a run; of a selection its time counts."""
    whole = selection is None or (selection.start is None and selection.end is None)
    entries = [_entry(allocation, attempts, selection) for allocation, attempts in review.held]
    return RunLedger(
        run_id=review.run.run_id,
        stage=review.summary.stage,
        source=review.source,
        entries=tuple(entry for entry in entries if entry is not None),
        queue_s=_waited(review, now),
        planned=_planned(review) if whole else None,
    )


def ledger_text(ledger: RunLedger) -> str:
    """A table for a terminal: where the GPU-hours went, or the node-hours of a run without GPUs."""
    split, unit = ledger.split(), "GPU-hours"
    if not split.allocated:
        split, unit = ledger.node_split(), "node-hours"
    if not split.allocated:
        return "\n".join(_against_plan(ledger.planned, 0.0, "hours"))
    rows = [
        (words, f"{getattr(split, part) / 3_600_000:,.3f}", *_shares(getattr(split, part), split.allocated))
        for part, words in _PARTS
    ]
    table = format_table(("spent on", unit, "share", ""), rows, right={1, 2}, indent="  ")
    heading = f"{split.allocated / 3_600_000:,.3f} {unit} by {_WHOSE[ledger.source]}"
    heading += f"; {format_duration(ledger.queue_s)} in the queue"
    return "\n".join([heading, *_against_plan(ledger.planned, split.allocated / 3_600_000, unit), table])


def _against_plan(planned: Spread | None, used: float, unit: str) -> list[str]:
    """A line, where something was planned."""
    if planned is None or planned.p50 <= 0:
        return []
    hours, low, high = (f"{value:,.4g}" for value in (planned.p50, planned.p10, planned.p90))
    return [f"planned {hours} {unit} (P10 {low}, P90 {high}); {100 * used / planned.p50:.0f} % of that used"]


def _planned(review: Review) -> Spread | None:
    path = review.run.path / "estimate.json"
    return read_estimate(path) or read_estimate(path, "node_hours")


def _shares(part: int, whole: int) -> tuple[str, str]:
    return share(part, whole), bar(part, whole)


def _entry(
    allocation: Allocation, inside: Sequence[AttemptSummary], selection: Selection | None
) -> Entry | None:
    """Start-up of the first attempt counts from the begin of the allocation."""
    spans: list[Span] = []
    for i, each in enumerate(inside):
        spans += each.spans(None if i else allocation.start)
    clipped = [allocation] if selection is None else selection.clip([allocation])
    if not clipped:
        return None
    begin = milliseconds(clipped[0].start)
    wall = paint(spans, begin, max(begin, milliseconds(clipped[0].end)))
    return Entry(clipped[0], tuple(each.attempt.attempt for each in inside), wall)


def _waited(review: Review, now: float) -> float:
    """By sacct's Eligible and Start where they are known of every attempt, else by the run folder."""
    records = [] if review.unrecorded else [*(review.records or ()), *review.waiting]
    if records and all(record.eligible is not None for record in records if record.start is not None):
        return sum(_wait_of(record, now) for record in records)
    waiting = now if review.situation.state in _WAITING else None
    return sum(own_waits(review.situation.history, review.summary, waiting))


def _wait_of(record: JobRecord, now: float) -> float:
    over = record.start if record.start is not None else record.end or now
    return max(0.0, over - record.eligible) if record.eligible is not None else 0.0


def own_waits(history: History, summary: RunSummary, now: float | None = None) -> list[float]:
    """Seconds before each attempt since it was asked for: by its submission, or by the end of the one before.

    Args:
        now: where the run still waits; adds the wait so far.
    """
    asked = sorted(float(s["time"]) for s in history.submissions if "time" in s)
    begins = [each.attempt.start for each in summary.attempts] + ([now] if now is not None else [])
    ends = [0.0, *(each.end for each in summary.attempts)]
    waits = []
    for begin, before in zip(begins, ends, strict=False):
        since = max([before, *(time for time in asked if time <= begin)])
        waits.append(max(0.0, begin - since) if since else 0.0)
    return waits
