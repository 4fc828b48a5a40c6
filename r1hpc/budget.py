"""What is left of the GPU-hours, what running and queued jobs will take, and how the campaign goes.

    python -m r1hpc.budget                       # configs/budget.yaml, or RUN_ROOT/budget.yaml
    python -m r1hpc.budget --budget FILE --json
    python -m r1hpc.budget --campaign hundred_days

Spent hours are Slurm's own over all attempts where the budget names an account, else the run folders'.
Every forecast is P50 (P10 to P90).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1hpc.base.choose_run import add_run_root, run_root_of
from r1hpc.base.cli import ArgumentParser, print_json, run_command
from r1hpc.base.tables import format_table, wrap

if TYPE_CHECKING:  # at run time what only an answer needs is imported for it: --help must be quick
    from r1hpc.accounting.budget import Budget
    from r1hpc.accounting.budget_status import BudgetStatus
    from r1hpc.accounting.campaign import CampaignProgress
    from r1hpc.accounting.forecast import Spread


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    from r1hpc.accounting.budget import find_budget, load_budget
    from r1hpc.accounting.budget_status import read_budget_status
    from r1hpc.accounting.campaign import follow, load_campaign
    from r1hpc.accounting.open_ledger import survey

    root = run_root_of(arguments.run_root)
    now = time.time()
    path = find_budget(root, arguments.budget)
    budget = load_budget(path)
    runs, notes = survey(root, now)
    if not root.is_dir():
        notes.append(
            f"there is no folder {root.absolute()}, so no run is counted: --run-root, R1HPC_RUN_ROOT"
        )
    status = read_budget_status(budget, runs, now)
    name = arguments.campaign or (budget.campaign if budget else None)
    plan = load_campaign(name, budget.gpu_hours if budget else None) if name else None
    progress = follow(plan, [run for run in runs if run.unit == "GPU-hours"], now) if plan else None
    if arguments.json:
        print_json(_to_json(path, budget, status, progress, notes))
    else:
        print("\n\n".join(_blocks(path, budget, status, progress, notes, now)))
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m r1hpc.budget", description=__doc__)
    parser.add_argument(
        "--budget", type=Path, metavar="FILE", help="default $R1HPC_BUDGET, RUN_ROOT/budget.yaml, configs/"
    )
    parser.add_argument("--campaign", metavar="NAME", help="a plan of stages; default the budget's")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    add_run_root(parser)
    return parser


def _to_json(
    path: Path,
    budget: Budget | None,
    status: BudgetStatus,
    progress: CampaignProgress | None,
    notes: Sequence[str],
) -> dict[str, Any]:
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


def _blocks(
    path: Path,
    budget: Budget | None,
    status: BudgetStatus,
    progress: CampaignProgress | None,
    notes: Sequence[str],
    now: float,
) -> Iterator[str]:
    yield _title(path, budget) + "\n" + _table(budget, status) + _pace(budget, status, now)
    if budget is not None and budget.gpu_hours is not None:
        warnings = list(_warnings(budget, status))
        if warnings:
            yield "\n".join(wrap(text, "! ", "  ") for text in warnings)
    if status.limits:
        yield _limits(status)
    if progress is not None:
        yield _campaign(progress)
    if status.notes or notes:
        yield "\n".join(wrap(f"note: {note}", hanging="  ") for note in (*status.notes, *notes))


def _title(path: Path, budget: Budget | None) -> str:
    from r1hpc.accounting.budget import format_day, format_hours

    if budget is None:
        return wrap(f"No budget is set: give gpu_hours in {path}, or copy that file to RUN_ROOT/budget.yaml")
    whose = f"account {budget.account}" if budget.account else "the runs under the run root"
    granted = f"{format_hours(budget.gpu_hours)} GPU-hours" if budget.gpu_hours else "no total set"
    days = [format_day(t) for t in (budget.start, budget.end and budget.end - 1) if t]
    return wrap(f"Budget of {whose}: {granted}{', ' + ' to '.join(days) if days else ''}") + f"\n  {path}"


def _table(budget: Budget | None, status: BudgetStatus) -> str:
    from r1hpc.accounting.budget import format_hours

    granted = budget.gpu_hours if budget else None
    rows = [
        ("spent", format_hours(status.spent), "", _share(status.spent, granted), f"by {status.source}"),
        (
            "running",
            *_spread(status.running),
            _share(status.running.p50, granted),
            _jobs(status.num_running),
        ),
        (
            "queued",
            *_spread(status.queued),
            _share(status.queued.p50, granted),
            _jobs(status.num_queued),
        ),
    ]
    if granted is not None:
        left = _left_after(granted, status)
        band = f"{format_hours(left['p10'])} to {format_hours(left['p90'])}"
        share = _share(left["p50"], granted)
        rows.append(("left", format_hours(left["p50"]), band, share, "once all of these are over"))
    return format_table(("", "GPU-hours", "P10 to P90", "share", ""), rows, right={1, 2, 3}, indent="  ")


def _pace(budget: Budget | None, status: BudgetStatus, now: float) -> str:
    from r1hpc.accounting.budget import format_day, format_hours
    from r1hpc.accounting.budget_status import PACE_DAYS

    left = (budget.gpu_hours or 0.0) - status.spent if budget else 0.0
    until = status.lasts_until(left, now)
    if until is None:
        return ""
    text = f"{format_hours(left)} are left now: until {format_day(until)} at the pace of the last"
    return f"\n  {text} {PACE_DAYS} days"


def _left_after(granted: float, status: BudgetStatus) -> dict[str, float]:
    """What is left once all that runs and waits is over; below 0: more is promised than there is."""
    rest, taken = granted - status.spent, status.committed
    return {"p10": rest - taken.p90, "p50": rest - taken.p50, "p90": rest - taken.p10}


def _warnings(budget: Budget, status: BudgetStatus) -> Iterator[str]:
    from r1hpc.accounting.budget import format_hours

    granted, after = budget.gpu_hours or 0.0, status.spent + status.committed.p50
    spent, promised = budget.passed(status.spent), budget.passed(after)
    if spent:
        share = 100 * status.spent / granted
        yield f"{share:.0f} % are spent: the mark at {100 * max(spent):.0f} % is passed"
    if promised and promised != spent:
        yield f"with what runs and waits the mark at {100 * max(promised):.0f} % will be passed"
    if after > granted:
        over = format_hours(after - granted)
        yield f"what runs and waits exceeds the budget by {over} GPU-hours: new submissions are refused"


def _limits(status: BudgetStatus) -> str:
    from r1hpc.accounting.budget import format_hours

    rows = [
        (
            limit.owner,
            limit.tres,
            format_hours(limit.gpu_hours),
            format_hours(limit.used),
            format_hours(limit.running),
            format_hours(limit.left),
        )
        for limit in status.limits
    ]
    headings = ("Slurm's GrpTRESMins", "TRES", "GPU-hours", "used", "held", "left")
    table = format_table(headings, rows, right={2, 3, 4, 5}, indent="  ")
    return (
        table + "\n  used decays as the site's PriorityDecayHalfLife says; held: time limits of running jobs"
    )


def _campaign(progress: CampaignProgress) -> str:
    from r1hpc.accounting.budget import format_day, format_hours

    plan, forecast = progress.campaign, progress.forecast
    rows = [
        (
            stage.stage.name,
            stage.when,
            f"{stage.stage.days:g}",
            format_hours(stage.stage.gpu_hours),
            format_hours(stage.used),
            *_spread(stage.forecast),
            str(stage.num_runs),
        )
        for stage in progress.stages
    ]
    if progress.elsewhere:
        rows.append(("in no stage", "", "", "", format_hours(progress.elsewhere), "", "", ""))
    rows.append(
        (
            "all",
            "",
            f"{plan.days:g}",
            format_hours(plan.gpu_hours),
            format_hours(progress.used),
            *_spread(forecast),
            "",
        )
    )
    headings = ("stage", "", "days", "planned", "used", "forecast", "P10 to P90", "runs")
    title = wrap(f"Campaign {plan.name}, from {format_day(progress.stages[0].start)}, GPU-hours")
    return title + "\n" + format_table(headings, rows, right={2, 3, 4, 5, 6, 7}, indent="  ")


def _spread(spread: Spread) -> tuple[str, str]:
    from r1hpc.accounting.budget import format_hours

    if spread.p90 == 0:
        return "0", ""
    return format_hours(spread.p50), f"{format_hours(spread.p10)} to {format_hours(spread.p90)}"


def _share(hours: float, granted: float | None) -> str:
    return "" if granted is None else f"{100 * hours / granted:.1f} %"


def _jobs(count: int) -> str:
    return "1 job" if count == 1 else f"{count} jobs"


if __name__ == "__main__":
    run_command(main)
