"""Hold the ledger of a run: its cost, attempt by attempt, and how that time was spent.

Times are integer milliseconds, so that useful + lost + startup + save + idle == allocated holds exactly.
Queue time costs no GPU-hours and is kept separately. open_ledger.py makes a ledger. The folder ledger/ of a
run is something else: the samples that each step read.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from r1hpc.accounting.hours import UNKNOWN, Allocation, own_allocations
from r1hpc.attempt.state.state import Situation, State
from r1hpc.base.choose_run import full_name
from r1hpc.base.names import is_among
from r1hpc.base.run_dir import RunDir
from r1hpc.plan.hours.spread import NOTHING, Spread, by_progress, remaining, until_limit
from r1hpc.telemetry.diagnosis.summary import AttemptSummary, RunSummary
from r1hpc.telemetry.diagnosis.timeline import Split, milliseconds

PARTS = {"useful": "useful", "lost": "lost", "start-up": "startup", "save": "save", "idle": "idle"}
"""Parts of an attempt's hours, and the field of Split; they add up to all it held."""
_HOUR_MS = 3_600_000
_LEAST_PROGRESS = 0.05
"""Below this share of its steps a run's own speed predicts less than its estimate."""
WAITING = (State.queued, State.requeued)


@dataclass(frozen=True)
class AttemptCost:
    """One allocation: its owner, what it held, and how its time was spent."""

    allocation: Allocation
    inside: tuple[AttemptSummary, ...]
    """The attempts that began in it: one; none if Slurm took it away before one could."""
    wall: Split
    by_slurm: bool
    width: float
    """GPUs, or nodes of a run without any: the factor on its wall time."""
    wait_s: float | None
    """Seconds in the queue before it."""

    @property
    def attempt(self) -> int:
        """Return the attempt's number; 0 if none began."""
        return self.inside[0].attempt.attempt if self.inside else 0

    @property
    def cause(self) -> str:
        """Return what ended it; `running` if nothing has."""
        if not self.inside:
            return self.allocation.state.lower()
        return self.inside[-1].cause

    @property
    def start(self) -> float:
        return self.allocation.start

    @property
    def end(self) -> float:
        return self.allocation.end

    @property
    def unused(self) -> float:
        """Return the GPUs that came with whole nodes but were not requested."""
        asked = max((each.attempt.gpus for each in self.inside), default=0)
        return max(0, self.allocation.gpus - asked) if asked else 0

    @property
    def hours(self) -> float:
        """Return GPU-hours, or node-hours of a run without GPUs."""
        return self.width * self.wall.allocated / _HOUR_MS

    @property
    def parts(self) -> dict[str, float]:
        """Return the hours by PARTS."""
        return _parts(self.split(self.width))

    def split(self, width: float) -> Split:
        """Return milliseconds of `width` GPUs or nodes; GPUs that nobody requested are idle."""
        return self.wall * (width - self.unused) + Split(idle=self.wall.allocated) * self.unused

    def to_json(self) -> dict[str, Any]:
        held = self.allocation
        return {
            **{name: getattr(held, name) for name in ("start", "end", "gpus", "nodes", "state")},
            "attempts": [each.attempt.attempt for each in self.inside],
            "split": self.split(held.gpus).in_hours(),
        }


@dataclass(frozen=True)
class RunLedger:
    """One run: planned, used, how, and still to come."""

    run: RunDir
    situation: Situation
    summary: RunSummary
    attempts: tuple[AttemptCost, ...]
    """Oldest first."""
    user: str
    unit: str
    """GPU-hours or node-hours."""
    source: str
    """`sacct`, `run` for the run's own record, or `sacct and run`."""
    queue_s: float
    """Seconds in the queue, of all attempts and of what waits now."""
    planned: Spread | None = None
    """The estimate stored at submission, in hours of the unit; None: there is none, or only a part of the
    run's time is selected."""
    num_steps: int | None = None
    ceiling: float | None = None
    """GPUs x time limit of one attempt, in hours of the unit."""
    waiting_since: float | None = None
    jobs: tuple[str, ...] = ()
    """Every Slurm job ID it has had."""
    note: str = ""
    """Why sacct gave nothing, or not all."""
    spoilt: tuple[str, ...] = ()
    """Sentences about a plan or estimate that cannot be read."""
    asked_account: str | None = None
    """The account it was submitted to; None: the user's default one."""
    window: tuple[float, float] = (-math.inf, math.inf)
    """Unix seconds: only what was held in between counts."""
    to_come_of_whole: Spread | None = None
    """Hours the complete run will still use, if this is a part of its time or attempts."""

    @property
    def run_id(self) -> str:
        """Return the run's name; CHAIN/STAGE for a stage of a chain."""
        return full_name(self.run)

    @property
    def stage(self) -> str:
        return self.summary.stage

    @property
    def state(self) -> str:
        return self.situation.state.value

    @property
    def account(self) -> str | None:
        """Return the charged account: by Slurm's last record, else as submitted; None if unknown."""
        charged = [each.allocation.account for each in self.attempts if each.allocation.account != UNKNOWN]
        return charged[-1] if charged else self.asked_account

    @property
    def is_live(self) -> bool:
        return self.situation.state in (State.running, *WAITING)

    @property
    def start(self) -> float:
        """Return when its first attempt began; else when it was submitted or its folder was made."""
        if self.attempts:
            return self.attempts[0].start
        return self.waiting_since or self.run.path.stat().st_mtime

    @property
    def end(self) -> float:
        return self.attempts[-1].end if self.attempts else self.start

    def split(self) -> Split:
        """Return the GPU-milliseconds."""
        return sum((each.split(each.allocation.gpus) for each in self.attempts), Split())

    def node_split(self) -> Split:
        """Return the node-milliseconds: the cost of a CPU run."""
        return sum((each.wall * each.allocation.nodes for each in self.attempts), Split())

    def wall(self) -> Split:
        """Return the wall milliseconds of all attempts."""
        return sum((each.wall for each in self.attempts), Split())

    @property
    def gpu_hours(self) -> float:
        return self.split().allocated / _HOUR_MS

    @property
    def used(self) -> float:
        """Return the hours of the unit."""
        return self._held.allocated / _HOUR_MS

    @property
    def unused(self) -> float:
        """Return the GPU-hours of GPUs that came with whole nodes but were not requested."""
        return sum(each.unused * each.wall.allocated for each in self.attempts) / _HOUR_MS

    @property
    def parts(self) -> dict[str, float]:
        """Return the hours of the unit by PARTS."""
        return _parts(self._held)

    @cached_property
    def _held(self) -> Split:
        return self.split() if self.unit == "GPU-hours" else self.node_split()

    @property
    def is_cut(self) -> bool:
        """True if only what was held within a window counts."""
        return self.window != (-math.inf, math.inf)

    @property
    def allocations(self) -> list[Allocation]:
        return [each.allocation for each in self.attempts]

    @property
    def own(self) -> list[Allocation]:
        """Return what the run held by its own record, within the window."""
        first, last = self.window
        held = own_allocations(self.summary, self.user)
        parts = [replace(each, start=max(first, each.start), end=min(last, each.end)) for each in held]
        return [part for part, whole in zip(parts, held, strict=True) if part.seconds or part == whole]

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what could not be read in its folder."""
        bad = self.summary.num_bad_lines
        lines = (f"{self.run_id}: {bad} lines of {self.run.train_metrics} hold no step",) if bad else ()
        return (*self.summary.history.notes, *lines, *self.spoilt)

    @property
    def share_done(self) -> float | None:
        last = self.summary.last_step
        return last / self.num_steps if last and self.num_steps else None

    @property
    def to_come(self) -> Spread:
        """Return the hours that the run will still use."""
        if not self.is_live:
            return NOTHING
        if self.to_come_of_whole is not None:
            return self.to_come_of_whole
        if self.share_done is not None and self.used > 0 and self.share_done >= _LEAST_PROGRESS:
            return by_progress(self.used, min(1.0, self.share_done))
        if self.planned is not None:
            return remaining(self.planned, self.used)
        if self.ceiling is None:
            return NOTHING
        is_running = self.situation.state is State.running and self.attempts
        used_now = self.attempts[-1].hours if is_running else 0.0  # the time limit is for one attempt
        return until_limit(max(0.0, self.ceiling - used_now))

    @property
    def ratio(self) -> float | None:
        """Return used over planned (P50), once the run finished."""
        if self.situation.state is not State.finished or self.planned is None:
            return None
        return self.used / self.planned.p50 if self.planned.p50 > 0 and self.used > 0 else None

    def gpus_of(self, each: AttemptSummary) -> float:
        """Return the GPUs of its allocation, which may be more than requested if it had whole nodes."""
        held = (cost.allocation.gpus for cost in self.attempts if each in cost.inside)
        return next(held, each.attempt.gpus) if each.attempt.gpus else 0

    def split_of(self, each: AttemptSummary) -> Split:
        """Return the wall milliseconds of one attempt; nothing if its time is not selected.

        They are its allocation's, or its own record's if several attempts shared one allocation.
        """
        cost = next((cost for cost in self.attempts if each in cost.inside), None)
        if cost is None:
            return Split()
        return cost.wall if len(cost.inside) == 1 else each.split

    def selected(
        self, start: float | None, end: float | None, user: str | None = None, account: str | None = None
    ) -> "RunLedger":
        """Return what was held between two times (Unix seconds), by this user and for this account."""
        chosen = [
            a
            for a in self.attempts
            if is_among(a.allocation.user, user) and is_among(a.allocation.account, account)
        ]
        if start is None and end is None:
            return replace(self, attempts=tuple(chosen), to_come_of_whole=self.to_come)
        window = (-math.inf if start is None else start, math.inf if end is None else end)
        parts = []
        for each in chosen:
            held = each.allocation
            first, last = max(held.start, window[0]), min(held.end, window[1])
            if last <= first:
                continue
            if (first, last) != (held.start, held.end):
                wall = self.summary.split_between(
                    each.inside, held.start, milliseconds(first), milliseconds(last)
                )
                each = replace(each, allocation=replace(held, start=first, end=last), wall=wall)
            parts.append(each)
        begun = [each for each in chosen if window[0] <= each.start < window[1]]
        still_waits_s = self.queue_s - sum(each.wait_s or 0.0 for each in self.attempts)
        queue_s = sum(each.wait_s or 0.0 for each in begun) + (still_waits_s if end is None else 0.0)
        return replace(
            self,
            attempts=tuple(parts),
            queue_s=queue_s,
            planned=None,
            window=window,
            to_come_of_whole=self.to_come,
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "planned": None if self.planned is None else self.planned.to_json(),
            "split": {**self.split().in_hours(), "queue_s": self.queue_s},
            "node_split": self.node_split().in_hours(),
            "allocations": [each.to_json() for each in self.attempts],
        }


def _parts(held: Split) -> dict[str, float]:
    return {part: getattr(held, name) / _HOUR_MS for part, name in PARTS.items()}


def clip(ledgers: Sequence[RunLedger], start: float | None, end: float | None) -> list[RunLedger]:
    """Return what was held between two times; runs that held nothing then are left out."""
    parts = [ledger.selected(start, end) for ledger in ledgers]
    return [part for part in parts if part.attempts]
