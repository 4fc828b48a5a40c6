"""The sections of the page, each as HTML blocks: tiles, budget, estimates, hours, tables, notes."""

import time
from collections.abc import Iterator
from urllib.parse import quote

from r1hpc.accounting.budget import format_day, format_hours, format_range
from r1hpc.accounting.budget_status import PACE_DAYS, BudgetStatus
from r1hpc.accounting.campaign import CampaignProgress
from r1hpc.accounting.forecast import Spread
from r1hpc.reporting import budget_charts, hours_charts
from r1hpc.reporting.drawing import BAND, FULL, HALF, Chart, inline
from r1hpc.reporting.hours_charts import error_words
from r1hpc.reporting.html import NONE, card, side_by_side, table, text
from r1hpc.reporting.view import RUN_HEADINGS, View

Charts = dict[str, Chart | None]
"""By name; None: there is nothing to hours_charts."""
_MOST_TABLE = 500
_SOURCES = {"sacct": "Slurm's accounting over all attempts", "run folders": "the run folders"}


def head(view: View) -> str:
    span = f", {' to '.join(map(format_day, view.span))}" if view.span else ""
    made = time.strftime("%Y-%m-%d %H:%M", time.localtime(view.now))
    where = f" under {view.run_root.absolute()}" if view.is_whole else ""
    count = f"{len(view.runs)} run{'s' * (len(view.runs) != 1)}{where}"
    words = f"{count}{span}. Counted from {_SOURCES[view.status.source]}; written {made}."
    return f'<header><h1>{text(view.title)}</h1><p class="sub">{text(words)}</p></header>'


def tiles(view: View) -> str:
    """The figures that matter most."""
    whole, spent, taken = sum(view.parts.values()), view.spent, view.committed
    granted = view.budget.gpu_hours if view.budget else None
    useful = f"{100 * view.parts['useful'] / whole:.1f} %" if whole else NONE
    wasted = f"{format_hours(view.parts['lost'])} lost, {format_hours(view.parts['idle'])} idle"
    share = view.unit
    if granted is not None:
        share = f"{100 * spent / granted:.0f} % of {format_hours(granted)} {view.unit}"
    shown = [
        ("Spent", format_hours(spent), share),
        _left(view) if view.is_whole else _planned(view),
        ("Useful", useful, wasted),
    ]
    if not any(run.is_cut for run in view.runs):  # a window's hours and those to come are no sum of anything
        shown.append(
            ("Forecast with running and queued", format_hours(spent + taken.p50), _band(taken + spent))
        )
    cells = "".join(
        f'<div class="tile"><div class="k">{text(name)}</div><div class="v">{text(value)}</div>'
        f'<div class="d">{text(words)}</div></div>'
        for name, value, words in shown
    )
    return f'<div class="tiles">{cells}</div>'


def _left(view: View) -> tuple[str, str, str]:
    if view.budget is None or view.budget.gpu_hours is None:
        return "Left", NONE, "no budget is set"
    left, end = view.budget.gpu_hours - view.spent, view.budget.end
    until = time.strftime(" until %d %b", time.localtime(end - 1)) if end else " of what was granted"
    return "Left", format_hours(left), f"{100 * left / view.budget.gpu_hours:.0f} %{until}"


def _planned(view: View) -> tuple[str, str, str]:
    planned = view.planned
    if planned.p90 <= 0:
        return "Planned", NONE, "no estimate was stored"
    return "Planned", format_hours(planned.p50), _band(planned)


def _band(spread: Spread) -> str:
    if spread.p10 == spread.p90:
        return "nothing runs or waits"
    return f"{BAND} {format_range(spread)}"


def warnings(view: View) -> Iterator[str]:
    for words in view.status.warnings(view.budget):
        yield f'<div class="warn">{text(words)}</div>'


def budget(view: View, charts: Charts) -> Iterator[str]:
    """Burn-down and campaign; without a budget what was spent so far."""
    status = view.status
    if view.burn_down is not None:
        left = view.burn_down.left
        words = (
            f"{format_hours(view.burn_down.granted)} GPU-hours granted. {status.num_running} running and "
            f"{status.num_queued} queued will take about {format_hours(status.committed.p50)}."
        )
        until = status.lasts_until(left, view.now)
        if until is not None:
            words += f" At the pace of the last {PACE_DAYS} days the rest lasts until {format_day(until)}."
        yield "<h2>Budget</h2>" + _card(charts["spent"], FULL, words)
    else:
        words = "Set gpu_hours in budget.yaml to see what is left." if view.is_whole else ""
        yield _card(charts["spent"], FULL, words)
    if view.progress is not None:
        yield _campaign(view.progress, charts["campaign"])
    if status.limits:
        yield _limits(status)


def charts_of_hours(view: View) -> Charts:
    """Every chart of the page but those of single runs, by its name."""
    down, unit = view.burn_down, view.unit
    return {
        "spent": budget_charts.burn_down(down) if down else budget_charts.spending(view.curve, unit),
        "campaign": budget_charts.campaign(view.progress.stages if view.progress else ()),
        "planned": hours_charts.planned_against_used(view.planned_runs, unit),
        "errors": hours_charts.estimate_errors(view.planned_runs),
        "waste": hours_charts.waste(view.parts_by_run, unit),
        "days": hours_charts.by_day(view.days, unit),
        "causes": hours_charts.lost_by_cause(view.wasted_by_cause, unit),
        "queue": hours_charts.queue_waits(view.waits),
    }


def _card(chart: Chart | None, width: int, words: str = "", title: str = "") -> str:
    return card(title or chart.title, inline(chart, width), words) if chart else ""


def _campaign(progress: CampaignProgress, chart: Chart | None) -> str:
    plan, forecast = progress.campaign, progress.forecast
    words = (
        f"{plan.days:g} days and {format_hours(plan.gpu_hours)} GPU-hours planned; "
        f"{format_hours(progress.used)} used; at its end about {format_hours(forecast.p50)} "
        f"({_band(forecast)})."
    )
    return _card(chart, FULL, words, f"Campaign: {plan.name}")


def _limits(status: BudgetStatus) -> str:
    rows = [
        [each.owner, each.tres, *map(format_hours, (each.gpu_hours, each.used, each.running, each.left))]
        for each in status.limits
    ]
    shown = table(["limit", "TRES", "GPU-hours", "used", "held", "left"], rows, 2)
    return card(
        "Slurm's own limits (GrpTRESMins)", shown, "Slurm lets usage decay as the site configured it."
    )


def estimates(view: View, charts: Charts) -> Iterator[str]:
    """Planned against used, and how wrong the estimates were."""
    planned, so_far = charts["planned"], charts["errors"]
    if planned is None:
        return
    errors = error_words(view.planned_runs)
    yield "<h2>Planned against used</h2>"
    if len(view.runs) == 1:
        yield _card(planned, FULL, errors, "Estimate")
    else:
        words = "The dark line is the estimate's median." + ("" if so_far else f" {errors}")
        yield side_by_side([_card(planned, HALF, words, "Each run"), _card(so_far, HALF, errors)])


def hours(view: View, charts: Charts) -> Iterator[str]:
    """What they went into, by run, by day and by cause; and the time in the queue."""
    if charts["waste"] is not None:
        yield "<h2>Where the hours went</h2>"
        yield _card(charts["waste"], FULL, f"Shares of the {view.unit} each run held.", "By run")
        yield _card(charts["days"], FULL)
    words = "Of each attempt, by the time at which it began."
    yield side_by_side([_card(charts["causes"], HALF), _card(charts["queue"], HALF, words)])


def tables(view: View) -> Iterator[str]:
    yield "<h2>Tables</h2>"
    more = len(view.runs) - _MOST_TABLE
    shown = table(RUN_HEADINGS, view.table[:_MOST_TABLE], 4)
    yield card("All runs", shown, f"and {more} older ones" if more > 0 else "")
    cards = []
    for name, rows in view.grouped:
        whole = sum(hours for _, hours in rows)
        lines = [[key, format_hours(h), f"{100 * h / whole:.1f} %"] for key, h in rows if whole]
        cards.append(card(f"By {name}", table([name, view.unit, "share"], lines, 1)))
    yield side_by_side(cards)


def notes(view: View) -> str:
    shown = [
        "GPU-hours: GPUs x allocated wall hours, busy or idle, over all attempts; node-hours for a run "
        "without GPUs.",
        "useful: steps that lasted. lost: steps taken again. start-up: until the first step. save: "
        "checkpoints. idle: the rest of what was allocated. Of a server, useful is the time in which it "
        "answered.",
        "MFU leaves recomputation out; peaks are dense bf16. Utilisation is the share of time in which any "
        "kernel ran: 100 % is not busy.",
        "Forecasts are P50 with P10 and P90: by its own pace once a run has done 5 % of its steps, else by "
        "its estimate, else half its time limit.",
        *view.status.notes,
        *view.notes,
    ]
    items = "".join(f"<li>{text(note)}</li>" for note in shown)
    links = ", ".join(f'<a href="{quote(name)}">{text(name)}</a>' for name in view.pictures)
    pictures = f"<p>The same as PNG: {links}</p>" if links else ""
    return f'<h2>Notes</h2><div class="card notes"><ul>{items}</ul>{pictures}</div>'
