"""Collect what a report page shows: runs, the budget they count against, and its state.

reporting.page makes a View and hands its numbers to its sections and to hours_charts.py, which imports no
ledger.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from r1hpc.accounting.budget import Budget, find_budget, load_budget
from r1hpc.accounting.budget_status import BudgetStatus, read_budget_status
from r1hpc.accounting.campaign import CampaignProgress, follow_campaign
from r1hpc.accounting.hours import split_days
from r1hpc.accounting.ledger import RunLedger, clip
from r1hpc.base.choose_run import full_name
from r1hpc.base.units import format_hours
from r1hpc.plan.hours.spread import Spread, total
from r1hpc.reporting.hours_charts import PARTS, BurnDown, EstimatedRun
from r1hpc.reporting.style import NONE

_HELD = PARTS[:-1]
"""Parts of the hours that a run folder explains."""
_MOST_GROUPS = 40
RUN_HEADINGS = (
    *("run", "state", "stage", "user", "attempts"),
    *("planned", "used", "used / planned", "useful", "MFU"),
)


@dataclass(frozen=True)
class View:
    run_root: Path
    runs: tuple[RunLedger, ...]
    """Newest first."""
    status: BudgetStatus
    now: float
    budget: Budget | None = None
    progress: CampaignProgress | None = None
    groups: dict[str, dict[str, float]] | None = None
    """Hours by user, account, partition ... as fold_hours gives them; None: from the runs."""
    notes: tuple[str, ...] = ()
    is_whole: bool = True
    """All runs under a run root, of all time; only then a budget applies."""

    @property
    def title(self) -> str:
        if len(self.runs) == 1 and not self.is_whole:
            return full_name(self.runs[0].run)
        chains = {full_name(run.run).rpartition("/")[0] for run in self.runs}
        if len(chains) == 1 and (name := chains.pop()) and not self.is_whole:
            return name
        account = self.budget.account if self.budget else None
        whose = f"account {account}" if account else "all runs" if self.is_whole else "the selection"
        return f"{whose[:1].upper()}{whose[1:]}"

    @property
    def unit(self) -> str:
        if self.budget is not None and self.budget.gpu_hours is not None:
            return "GPU-hours"
        on_gpus = any(run.unit == "GPU-hours" and (run.used > 0 or run.is_live) for run in self.runs)
        return "GPU-hours" if on_gpus or self.status.spent > 0 or not self.runs else "node-hours"

    @property
    def spent(self) -> float:
        """Return the spent hours of the page's unit."""
        return self.status.spent if self.unit == "GPU-hours" else sum(self.parts.values())

    @property
    def committed(self) -> Spread:
        """Return the hours still to come of what runs or waits, in the page's unit."""
        if self.unit == "GPU-hours":
            return self.status.committed
        return total([run.to_come for run in self.counted])

    @property
    def planned(self) -> Spread:
        """Return the estimates of all runs together."""
        return total([run.planned for run in self.counted if run.planned])

    @property
    def counted(self) -> list[RunLedger]:
        """Return the runs whose hours are in the page's unit."""
        return [run for run in self.runs if run.unit == self.unit]

    @property
    def parts(self) -> dict[str, float]:
        return {part: sum(run.parts[part] for run in self.counted) for part in _HELD}

    @property
    def parts_by_run(self) -> dict[str, dict[str, float]]:
        """Return the parts by name; runs that share a name, such as a copy elsewhere, by folder."""
        names = [run.run_id for run in self.counted]
        return {
            run.run_id if names.count(run.run_id) == 1 else str(run.run.path): run.parts
            for run in self.counted
        }

    @property
    def wasted_by_cause(self) -> dict[str, float]:
        found: dict[str, float] = defaultdict(float)
        for each in (attempt for run in self.counted for attempt in run.attempts):
            found[each.cause] += each.parts["lost"] + each.parts["idle"]
        return dict(found)

    @property
    def curve(self) -> list[tuple[float, float]]:
        """Return (time, hours spent until then), rising."""
        if self.status.source != "run folders":
            return self._daily_curve()
        start, end = (self.budget.start, self.budget.end) if self.budget else (None, None)
        attempts = [each for run in clip(self.counted, start, end) for each in run.attempts]
        edges = [(a.start, a.width) for a in attempts] + [(a.end, -a.width) for a in attempts]
        points: list[tuple[float, float]] = []
        spent, width, before = 0.0, 0.0, 0.0
        for moment, change in sorted(edges):
            spent += width * (moment - before) / 3600
            points.append((moment, spent))
            width, before = width + change, moment
        return points

    def _daily_curve(self) -> list[tuple[float, float]]:
        """Return the same from Slurm's hours by day, as if each day's were spent evenly."""
        points: list[tuple[float, float]] = []
        spent = 0.0
        for day, hours in self.status.by_day.items():
            midnight = datetime.fromisoformat(day).timestamp()
            points += [(midnight, spent), (max(midnight, min(midnight + 86400, self.now)), spent + hours)]
            spent += hours
        return points

    @property
    def days(self) -> dict[str, dict[str, float]]:
        """Return hours by day (YYYY-MM-DD) and part; `other` is known only to Slurm."""
        days: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(PARTS, 0.0))
        for each in (attempt for run in self.counted for attempt in run.attempts):
            held = max(each.end - each.start, 1e-9)
            for day, seconds in split_days(each.start, each.end):
                for part in _HELD:
                    days[day][part] += each.parts[part] * seconds / held
        for day, hours in (self.status.by_day if self.unit == "GPU-hours" else {}).items():
            days[day]["other"] = max(0.0, hours - sum(days[day].values()))
        return dict(sorted(days.items()))

    @property
    def planned_runs(self) -> list[EstimatedRun]:
        return [
            EstimatedRun(run.run_id, run.planned, run.used, run.is_live, run.ratio is not None)
            for run in self.counted
            if run.planned is not None and run.planned.p90 > 0
        ]

    @property
    def burn_down(self) -> BurnDown | None:
        """Return the burn-down; None if no budget is set."""
        budget = self.budget
        if budget is None or budget.gpu_hours is None:
            return None
        curve, day = self.curve, 86400.0
        begin = budget.start or (curve[0][0] if curve else self.now - day)
        over = max((_over_at(run, self.now) for run in self.runs if run.is_live), default=self.now)
        end = budget.end or max(over, self.now + (self.now - begin) / 3)
        name, plan = "an even pace", [(begin, budget.gpu_hours), (end, 0.0)]
        if self.progress is not None:
            rest = budget.gpu_hours
            name, plan = "the campaign's plan", [(self.progress.stages[0].start, rest)]
            for each in self.progress.stages:
                rest -= each.stage.gpu_hours
                plan.append((each.end, rest))
        return BurnDown(
            granted=budget.gpu_hours,
            begin=begin,
            end=end,
            now=min(max(self.now, begin), end),
            curve=curve,
            spent=self.status.spent,
            committed=self.status.committed,
            over=over,
            warn_at=budget.warn_at,
            plan_name=name,
            plan=plan,
        )

    @property
    def grouped(self) -> Iterator[tuple[str, list[tuple[str, float]]]]:
        """Yield (user, account ..., its rows): the largest, and one row for all others."""
        groups = self.groups or {key: self._sums(key) for key in ("user", "stage")}
        for name, hours in groups.items():
            ranked = sorted(hours.items(), key=lambda item: -item[1])
            rest = ranked[_MOST_GROUPS:]
            others = [(f"{len(rest)} others", sum(hours for _, hours in rest))] if rest else []
            yield name, [*ranked[:_MOST_GROUPS], *others]

    def _sums(self, key: str) -> dict[str, float]:
        found: dict[str, float] = defaultdict(float)
        for run in self.counted:
            found[getattr(run, key)] += run.used
        return dict(found)


def make_view(
    runs: Sequence[RunLedger], run_root: Path, now: float, *, notes: Sequence[str] = (), whole: bool = True
) -> View:
    """Return a view of some runs; of all (`whole`) with the run root's budget and campaign."""
    budget = load_budget(find_budget(run_root)) if whole else None
    return View(
        run_root=run_root,
        runs=tuple(runs),
        status=read_budget_status(budget, runs, now, ask_slurm=whole),
        now=now,
        budget=budget,
        progress=follow_campaign(budget, runs, now),
        notes=tuple(notes),
        is_whole=whole,
    )


def _over_at(run: RunLedger, now: float) -> float:
    """Return when a live run should be over, by its P50 on its current GPUs."""
    width = run.attempts[-1].width if run.attempts else 0
    return now + 3600 * run.to_come.p50 / width if width else now


def row_of(run: RunLedger) -> list[str]:
    """Return the run's row below RUN_HEADINGS."""
    planned, used = run.planned, run.used
    return [
        run.run_id,
        run.state,
        run.stage,
        run.user,
        str(len(run.attempts)),
        NONE if planned is None else format_hours(planned.p50),
        format_hours(used),
        NONE if planned is None or planned.p50 <= 0 else f"{used / planned.p50:.2f}",
        f"{100 * run.parts['useful'] / used:.1f} %" if used else NONE,
        NONE if run.summary.mfu is None else f"{100 * run.summary.mfu:.1f} %",
    ]
