"""Describe a budget and its campaign for `budget`, as text for a terminal and as the object of --json."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from r1hpc.accounting.budget import Budget, format_day, format_range
from r1hpc.accounting.budget_status import PACE_DAYS, BudgetStatus
from r1hpc.accounting.campaign import CampaignProgress
from r1hpc.base.tables import format_table, wrap
from r1hpc.base.units import format_hours
from r1hpc.plan.hours.spread import Spread


def budget_json(
    path: Path,
    budget: Budget | None,
    status: BudgetStatus,
    progress: CampaignProgress | None,
    notes: Sequence[str],
) -> dict[str, Any]:
    """Return the object of --json; `path` is where the budget is, or would be."""
    granted = budget.gpu_hours if budget else None
    return {
        "budget": None if budget is None else {**vars(budget), "path": str(budget.path)},
        "path": str(path),
        **status.to_json(),
        "left": None if granted is None else granted - status.spent,
        "left_after_committed": None if granted is None else _left_after(granted, status),
        "marks_passed": budget.passed(status.spent) if budget else [],
        "campaign": None if progress is None else progress.to_json(),
        "notes": [*status.notes, *notes],
    }


def budget_text(
    path: Path,
    budget: Budget | None,
    status: BudgetStatus,
    progress: CampaignProgress | None,
    notes: Sequence[str],
    now: float,
) -> Iterator[str]:
    """Return the text: state of the budget, warnings, limits, the campaign, notes."""
    state = _title(path, budget) + "\n" + _table(budget, status)
    left = (budget.gpu_hours or 0.0) - status.spent if budget else 0.0
    if (until := status.lasts_until(left, now)) is not None:
        state += f"\n  {format_hours(left)} are left now: until {format_day(until)}"
        state += f" at the pace of the last {PACE_DAYS} days"
    yield state
    if warnings := list(status.warnings(budget)):
        yield "\n".join(wrap(text, "! ", "  ") for text in warnings)
    if status.limits:
        rows = [
            (each.owner, each.tres, *map(format_hours, (each.gpu_hours, each.used, each.running, each.left)))
            for each in status.limits
        ]
        headings = ("Slurm's GrpTRESMins", "TRES", "GPU-hours", "used", "held", "left")
        yield format_table(headings, rows, right={2, 3, 4, 5}, indent="  ") + (
            "\n  used decays as the site's PriorityDecayHalfLife says; held: time limits of running jobs"
        )
    if progress is not None:
        yield _campaign(progress)
    if status.notes or notes:
        yield "\n".join(wrap(f"note: {note}", hanging="  ") for note in (*status.notes, *notes))


def _title(path: Path, budget: Budget | None) -> str:
    if budget is None:
        return wrap(f"No budget is set: give gpu_hours in {path}, or copy that file to RUN_ROOT/budget.yaml")
    whose = f"account {budget.account}" if budget.account else "the runs under the run root"
    granted = f"{format_hours(budget.gpu_hours)} GPU-hours" if budget.gpu_hours else "no total set"
    days = [format_day(t) for t in (budget.start, budget.end and budget.end - 1) if t]
    return wrap(f"Budget of {whose}: {granted}{', ' + ' to '.join(days) if days else ''}") + f"\n  {path}"


def _table(budget: Budget | None, status: BudgetStatus) -> str:
    granted = budget.gpu_hours if budget else None
    origin = f"by {status.source}"
    if status.billing_hours is not None:
        origin += f"; billed {format_hours(status.billing_hours)} TRES-hours"
    rows = [("spent", format_hours(status.spent), "", _share(status.spent, granted), origin)]
    for name, taken, count in (
        ("running", status.running, status.num_running),
        ("queued", status.queued, status.num_queued),
    ):
        rows.append((name, *_spread(taken), _share(taken.p50, granted), f"{count} job{'s' * (count != 1)}"))
    if granted is not None:
        left = _left_after(granted, status)
        band = f"{format_hours(left['p10'])} to {format_hours(left['p90'])}"
        share = _share(left["p50"], granted)
        rows.append(("left", format_hours(left["p50"]), band, share, "once all of these are over"))
    return format_table(("", "GPU-hours", "P10 to P90", "share", ""), rows, right={1, 2, 3}, indent="  ")


def _left_after(granted: float, status: BudgetStatus) -> dict[str, float]:
    """Return what is left once all that runs and waits is over; below 0 if too much is promised."""
    rest, taken = granted - status.spent, status.committed
    return {"p10": rest - taken.p90, "p50": rest - taken.p50, "p90": rest - taken.p10}


def _campaign(progress: CampaignProgress) -> str:
    rows = []
    for each in progress.stages:
        hours = (format_hours(each.stage.gpu_hours), format_hours(each.used), *_spread(each.forecast))
        rows.append((each.stage.name, each.when, f"{each.stage.days:g}", *hours, str(each.num_runs)))
    if progress.elsewhere:
        rows.append(("in no stage", "", "", "", format_hours(progress.elsewhere), "", "", ""))
    plan = progress.campaign
    hours = (format_hours(plan.gpu_hours), format_hours(progress.used), *_spread(progress.forecast))
    rows.append(("all", "", f"{plan.days:g}", *hours, ""))
    headings = ("stage", "", "days", "planned", "used", "forecast", "P10 to P90", "runs")
    title = wrap(f"Campaign {plan.name}, from {format_day(progress.stages[0].start)}, GPU-hours")
    return title + "\n" + format_table(headings, rows, right={2, 3, 4, 5, 6, 7}, indent="  ")


def _spread(spread: Spread) -> tuple[str, str]:
    if spread.p90 == 0:
        return "0", ""
    return format_hours(spread.p50), format_range(spread)


def _share(hours: float, granted: float | None) -> str:
    return "" if granted is None else f"{100 * hours / granted:.1f} %"
