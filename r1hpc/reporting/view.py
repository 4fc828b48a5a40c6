"""What a page of the report is about: runs, the budget they are counted against, and where it stands."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from r1hpc.accounting.budget import Budget, find_budget, load_budget
from r1hpc.accounting.budget_status import BudgetStatus, read_budget_status
from r1hpc.accounting.campaign import CampaignProgress, follow, load_campaign
from r1hpc.accounting.forecast import Spread, total
from r1hpc.accounting.ledger import PARTS, RunLedger, clip
from r1hpc.telemetry.hours import split_days


@dataclass(frozen=True)
class View:
    """Everything on the page."""

    run_root: Path
    runs: tuple[RunLedger, ...]
    """Newest first."""
    standing: BudgetStatus
    now: float
    budget: Budget | None = None
    progress: CampaignProgress | None = None
    groups: dict[str, dict[str, float]] | None = None
    """Hours by user, account, partition ... as fold_hours gives them; None: from the runs."""
    notes: tuple[str, ...] = ()
    is_whole: bool = True
    """All runs under a run root, of all time: a budget is counted against all or none."""
    pictures: tuple[str, ...] = ()
    """PNG files beside the page, relative to it."""

    @property
    def title(self) -> str:
        if len(self.runs) == 1 and not self.is_whole:
            return f"{self.runs[0].run_id}: {self.unit}"
        account = self.budget.account if self.budget else None
        whose = f"account {account}" if account else "all runs" if self.is_whole else "what was selected"
        return f"{self.unit[:1].upper()}{self.unit[1:]} of {whose}"

    @property
    def unit(self) -> str:
        held = any(run.unit == "GPU-hours" and run.used > 0 for run in self.runs)
        return "GPU-hours" if held or self.standing.spent > 0 or not self.runs else "node-hours"

    @property
    def spent(self) -> float:
        """Hours of the page's unit."""
        return self.standing.spent if self.unit == "GPU-hours" else sum(self.parts.values())

    @property
    def committed(self) -> Spread:
        """Still to come of what runs or waits, in the page's unit."""
        if self.unit == "GPU-hours":
            return self.standing.committed
        return total([run.to_come for run in self.counted])

    @property
    def counted(self) -> list[RunLedger]:
        """Runs whose hours are of the page's unit."""
        return [run for run in self.runs if run.unit == self.unit or not run.attempts]

    @property
    def parts(self) -> dict[str, float]:
        return {part: sum(run.parts[part] for run in self.counted) for part in PARTS}

    @property
    def curve(self) -> list[tuple[float, float]]:
        """(time, hours spent until then), rising."""
        if self.standing.source != "run folders":
            return _daily(self.standing.by_day, self.now)
        start, end = (self.budget.start, self.budget.end) if self.budget else (None, None)
        return _exactly(clip(self.counted, start, end))

    @property
    def days(self) -> dict[str, float]:
        """Hours by day, of the page's unit."""
        return self.standing.by_day if self.unit == "GPU-hours" else _by_day(self.counted)


def _exactly(runs: Sequence[RunLedger]) -> list[tuple[float, float]]:
    """(time, hours so far) at each begin and end of an attempt."""
    attempts = [a for run in runs for a in run.attempts]
    edges = [(a.start, a.width) for a in attempts] + [(a.end, -a.width) for a in attempts]
    points: list[tuple[float, float]] = []
    spent, width, before = 0.0, 0, 0.0
    for moment, change in sorted(edges):
        spent += width * (moment - before) / 3600
        points.append((moment, spent))
        width, before = width + change, moment
    return points


def _daily(by_day: dict[str, float], now: float) -> list[tuple[float, float]]:
    """The same from hours by day, as if each day's were spent evenly."""
    points: list[tuple[float, float]] = []
    spent = 0.0
    for day, hours in by_day.items():
        midnight = datetime.fromisoformat(day).timestamp()
        points += [(midnight, spent), (max(midnight, min(midnight + 86400, now)), spent + hours)]
        spent += hours
    return points


def make_view(
    runs: Sequence[RunLedger],
    run_root: Path,
    now: float,
    *,
    notes: Sequence[str] = (),
    whole: bool = True,
) -> View:
    """A view of some runs; of all (`whole`) with the budget and the campaign that apply to the run root."""
    budget = load_budget(find_budget(run_root)) if whole else None
    name = budget.campaign if budget else None
    plan = load_campaign(name, budget.gpu_hours if budget else None) if name else None
    on_gpus = [run for run in runs if run.unit == "GPU-hours"]
    return View(
        run_root=run_root,
        runs=tuple(runs),
        standing=read_budget_status(budget, runs, now, ask_slurm=whole),
        now=now,
        budget=budget,
        progress=follow(plan, on_gpus, now) if plan else None,
        notes=tuple(notes),
        is_whole=whole,
    )


def _by_day(runs: Sequence[RunLedger]) -> dict[str, float]:
    days: dict[str, float] = defaultdict(float)
    for each in (attempt for run in runs for attempt in run.attempts):
        for day, seconds in split_days(each.start, each.end):
            days[day] += each.width * seconds / 3600
    return dict(sorted(days.items()))
