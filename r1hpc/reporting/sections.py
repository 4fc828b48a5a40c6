"""The sections of the page, each as HTML blocks: tiles, budget, estimates, hours, tables, notes."""

import time
from collections import defaultdict
from collections.abc import Iterator

from r1hpc.accounting.budget import format_day, format_hours
from r1hpc.accounting.budget_status import PACE_DAYS, BudgetStatus
from r1hpc.accounting.campaign import CampaignProgress
from r1hpc.accounting.forecast import Spread, total
from r1hpc.accounting.ledger import RunLedger
from r1hpc.reporting import charts
from r1hpc.reporting.html import NONE, card, keys, side_by_side, table, text
from r1hpc.reporting.view import View

_MOST_TABLE = 500
_SOURCES = {"sacct": "Slurm's accounting over all attempts", "run folders": "the run folders"}
_BAND = "P10 to P90"


def head(view: View) -> str:
    attempts = [each for run in view.runs for each in run.attempts]
    span = ""
    if attempts:
        begin, end = min(a.start for a in attempts), max(a.end for a in attempts)
        span = f", {format_day(begin)} to {format_day(end)}"
    made = time.strftime("%Y-%m-%d %H:%M", time.localtime(view.now))
    where = f" under {view.run_root.absolute()}" if view.is_whole else ""
    count = f"{len(view.runs)} run{'s' * (len(view.runs) != 1)}{where}"
    return (
        f"<header><h1>{text(view.title)}</h1>"
        f'<p class="sub">{count}{span}. Counted from {_SOURCES[view.standing.source]}; written {made}.</p>'
        "</header>"
    )


def tiles(view: View) -> str:
    """The four figures that matter most."""
    whole, spent, taken = sum(view.parts.values()), view.spent, view.committed
    granted = view.budget.gpu_hours if view.budget else None
    useful = f"{100 * view.parts['useful'] / whole:.1f} %" if whole else NONE
    wasted = f"{format_hours(view.parts['lost'])} lost, {format_hours(view.parts['idle'])} idle"
    share = view.unit
    if granted is not None:
        share = f"{100 * spent / granted:.0f} % of {format_hours(granted)} {view.unit}"
    told = [
        ("Spent", format_hours(spent), share),
        _left(view) if view.is_whole else _planned(view),
        ("Useful", useful, wasted),
        ("Forecast with running and queued", format_hours(spent + taken.p50), _band(taken + spent)),
    ]
    cells = "".join(
        f'<div class="tile"><div class="k">{text(name)}</div><div class="v">{text(value)}</div>'
        f'<div class="d">{text(words)}</div></div>'
        for name, value, words in told
    )
    return f'<div class="tiles">{cells}</div>'


def _left(view: View) -> tuple[str, str, str]:
    if view.budget is None or view.budget.gpu_hours is None:
        return "Left", NONE, "no budget is set"
    left, end = view.budget.gpu_hours - view.spent, view.budget.end
    until = time.strftime(" until %d %b", time.localtime(end - 1)) if end else " of what was granted"
    return "Left", format_hours(left), f"{100 * left / view.budget.gpu_hours:.0f} %{until}"


def _planned(view: View) -> tuple[str, str, str]:
    planned = total([run.planned for run in view.counted if run.planned])
    if planned.p90 <= 0:
        return "Planned", NONE, "no estimate was stored"
    return "Planned", format_hours(planned.p50), _band(planned)


def _band(spread: Spread) -> str:
    if spread.p10 == spread.p90:
        return "nothing runs or waits"
    return f"{_BAND} {format_hours(spread.p10)} to {format_hours(spread.p90)}"


def warnings(view: View) -> Iterator[str]:
    budget, standing = view.budget, view.standing
    if budget is None or budget.gpu_hours is None:
        return
    after = standing.spent + standing.committed.p50
    passed = budget.passed(standing.spent)
    if passed:
        yield _warning(f"The warning mark at {100 * max(passed):.0f} % of the budget is passed.")
    if after > budget.gpu_hours:
        yield _warning(
            f"What runs and waits exceeds the budget by {format_hours(after - budget.gpu_hours)} GPU-hours: "
            f"new submissions are refused."
        )


def _warning(words: str) -> str:
    return f'<div class="warn">{text(words)}</div>'


def budget(view: View) -> Iterator[str]:
    """Burn-down and campaign; without a budget what was spent so far."""
    granted, standing = view.budget, view.standing
    if granted is not None and granted.gpu_hours is not None:
        horizon = max((_over_at(run, view.now) for run in view.runs if run.is_live), default=view.now)
        words = (
            f"{format_hours(granted.gpu_hours)} GPU-hours granted. {standing.num_running} running and "
            f"{standing.num_queued} queued will take about {format_hours(standing.committed.p50)}."
        )
        until = standing.lasts_until(granted.gpu_hours - standing.spent, view.now)
        if until is not None:
            words += f" At the pace of the last {PACE_DAYS} days the rest lasts until {format_day(until)}."
        drawn = charts.burn_down(granted, standing, view.curve, view.progress, horizon, view.now)
        yield "<h2>Budget</h2>" + card("Burn-down", drawn, words)
    elif drawn := charts.spending(view.curve, view.unit):
        hint = "Set gpu_hours in budget.yaml to see what is left." if view.is_whole else ""
        yield card("Spent so far", drawn, hint)
    if view.progress is not None:
        yield _campaign(view.progress, view.now)
    if standing.limits:
        yield _limits(standing)


def _campaign(progress: CampaignProgress, now: float) -> str:
    plan, forecast = progress.campaign, progress.forecast
    words = (
        f"{plan.days:g} days and {format_hours(plan.gpu_hours)} GPU-hours planned; "
        f"{format_hours(progress.used)} used; at its end about {format_hours(forecast.p50)} "
        f"({_band(forecast)})."
    )
    shown = keys([("planned", "planned"), ("useful", "used"), ("fan", f"forecast, {_BAND}")])
    return card(f"Campaign: {plan.name}", shown + charts.campaign(progress, now), words)


def _limits(standing: BudgetStatus) -> str:
    rows = [
        [each.owner, each.tres, *map(format_hours, (each.gpu_hours, each.used, each.running, each.left))]
        for each in standing.limits
    ]
    told = table(["limit", "TRES", "GPU-hours", "used", "held", "left"], rows, 2)
    return card("Slurm's own limits (GrpTRESMins)", told, "Slurm lets usage decay as the site configured it.")


def estimates(view: View) -> Iterator[str]:
    """Planned against used, and how wrong the estimates were."""
    planned = charts.planned_against_used(view.counted)
    if not planned:
        return
    meanings = [("planned", f"{_BAND} at submission"), ("useful round", "used, inside")]
    meanings += [("lost round", "used, outside"), ("live", "so far")]
    drawn, errors = keys(meanings) + planned, charts.error_words(view.counted)
    yield "<h2>Planned against used</h2>"
    if len(view.runs) == 1:
        yield card("Estimate", drawn, errors)
    else:
        told = charts.estimate_errors(view.counted)
        words = "The dark line is the estimate's median." + ("" if told else f" {errors}")
        so_far = card("Error of the estimates so far", told, errors)
        yield side_by_side([card("Each run", drawn, words), so_far])


def hours(view: View) -> Iterator[str]:
    runs, unit = view.counted, view.unit
    drawn = charts.waste(runs)
    if drawn:
        yield "<h2>Where the hours went</h2>"
        days = charts.by_day(runs, view.standing.by_day if unit == "GPU-hours" else {}, unit)
        yield card("By run", charts.legend(view.parts) + drawn, f"Shares of the {unit} each run held.")
        yield card("By day", days, "")
    pair = [
        card("Lost and idle, by what ended the attempt", charts.lost_by_cause(runs), unit),
        card("Queue waits", charts.queue_waits(runs), "Each point is an attempt, at the time it began."),
    ]
    yield side_by_side(pair)


def tables(view: View) -> Iterator[str]:
    yield "<h2>Tables</h2>"
    headings = [
        "run",
        "state",
        "stage",
        "user",
        "attempts",
        "planned",
        "used",
        "used / planned",
        "useful",
        "MFU",
    ]
    rows = [_run_row(run) for run in view.runs[:_MOST_TABLE]]
    more = len(view.runs) - _MOST_TABLE
    yield card("All runs", table(headings, rows, 4), f"and {more} older ones" if more > 0 else "")
    groups = view.groups or {"user": _sums(view, "user"), "stage": _sums(view, "stage")}
    told = []
    for name, hours in groups.items():
        whole = sum(hours.values())
        ranked = sorted(hours.items(), key=lambda item: -item[1])[:40]
        lines = [[key, format_hours(h), f"{100 * h / whole:.1f} %"] for key, h in ranked if whole]
        told.append(card(f"By {name}", table([name, view.unit, "share"], lines, 1), "") if lines else "")
    yield side_by_side(told)


def _run_row(run: RunLedger) -> list[str]:
    planned = run.planned
    used = run.used
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
        NONE if run.mfu is None else f"{100 * run.mfu:.1f} %",
    ]


def notes(view: View) -> str:
    told = [
        "GPU-hours: GPUs x allocated wall hours, busy or idle, over all attempts; node-hours for a run "
        "without GPUs.",
        "useful: steps that lasted. lost: steps taken again. start-up: until the first step. save: "
        "checkpoints. idle: the rest of what was allocated.",
        "MFU leaves recomputation out; peaks are dense bf16. Utilisation is the share of time in which any "
        "kernel ran: 100 % is not busy.",
        "Forecasts are P50 with P10 and P90: by its own pace once a run has done 5 % of its steps, else by "
        "its estimate, else half its time limit.",
        *view.standing.notes,
        *view.notes,
    ]
    items = "".join(f"<li>{text(note)}</li>" for note in told)
    links = ", ".join(f'<a href="{text(name)}">{text(name)}</a>' for name in view.pictures)
    pictures = f"<p>The same as PNG: {links}</p>" if links else ""
    return f'<h2>Notes</h2><div class="card notes"><ul>{items}</ul>{pictures}</div>'


def _over_at(run: RunLedger, now: float) -> float:
    """When a live run should be over, by its P50 on the GPUs it has."""
    width = run.attempts[-1].width if run.attempts else 0
    return now + 3600 * run.to_come.p50 / width if width else now


def _sums(view: View, key: str) -> dict[str, float]:
    found: dict[str, float] = defaultdict(float)
    for run in view.counted:
        found[getattr(run, key)] += run.used
    return dict(found)
