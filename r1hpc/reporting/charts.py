"""The plots of a group's hours: budget, campaign, planned against used, waste, queue, days.

Each function gives the HTML of one plot, or an empty string where there is nothing to draw.
"""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from datetime import date, datetime, timedelta
from itertools import accumulate, pairwise

from r1hpc.accounting.budget import Budget, format_day, format_hours
from r1hpc.accounting.budget_status import BudgetStatus
from r1hpc.accounting.campaign import CampaignProgress
from r1hpc.accounting.forecast import Spread
from r1hpc.accounting.ledger import PARTS, RunLedger
from r1hpc.base.units import format_duration
from r1hpc.reporting.svg import TIMES, Plot, Rows, Scale, Tick
from r1hpc.telemetry.hours import split_days

DAY = 86400.0
_MOST_BARS = 120
_MOST_ROWS = 24


def burn_down(
    budget: Budget,
    standing: BudgetStatus,
    curve: Sequence[tuple[float, float]],
    progress: CampaignProgress | None,
    horizon: float,
    now: float,
) -> str:
    """What is left of the budget over its period, with the plan and the forecast.

    Args:
        curve: (time, hours spent until then).
        horizon: when what runs and waits should be over, in Unix seconds.
    """
    granted = budget.gpu_hours or 0.0
    begin = budget.start or (curve[0][0] if curve else now - DAY)
    end = budget.end or max(horizon, now + (now - begin) / 3)
    left = granted - standing.spent
    after = sorted(left - hours for hours in (standing.committed.p10, standing.committed.p90))
    low = min(0.0, left, after[0])
    plot = Plot("What is left of the budget over time", Scale(begin, end), Scale(low, granted), 280)
    plot.axes(plot_days(begin, end, 8), Scale(low, granted).ticks(5), "GPU-hours left", wide=True)
    plot.line([begin, end], [0, 0], "zero")
    for mark in budget.warn_at:
        plot.line([begin, end], [granted * (1 - mark)] * 2, "mark")
        plot.label(begin, granted * (1 - mark), f"{100 * mark:.0f} % spent", "start", "up muted small")
    _draw_plan(plot, progress, granted, begin, end)
    points = [(begin, granted), *((x, granted - spent) for x, spent in curve), (now, left)]
    xs, ys = ([float(value) for value in column] for column in zip(*points, strict=True))
    plot.area(xs, [0.0] * len(xs), ys, "useful pale")
    plot.line(xs, ys, "useful thick")
    _draw_fan(plot, standing, left, now, min(end, max(horizon, now + 0.02 * (end - begin))), end)
    plot.rule(now, "now")
    plot.dot(now, left, "useful", f"{format_hours(left)} GPU-hours left")
    plot.label(
        now, left, f"{format_hours(left)} left", "end" if now > (begin + end) / 2 else "start", "up strong"
    )
    return plot.render()


def spending(curve: Sequence[tuple[float, float]], unit: str) -> str:
    """Hours spent so far, where no budget is set."""
    if len(curve) < 2 or curve[-1][1] <= 0:
        return ""
    xs, ys = [x for x, _ in curve], [y for _, y in curve]
    plot = Plot(f"{unit} spent over time", Scale(xs[0], xs[-1]), Scale(0, 1.05 * ys[-1]), 220)
    plot.axes(plot_days(xs[0], xs[-1], 8), Scale(0, 1.05 * ys[-1]).ticks(), f"{unit} spent", wide=True)
    plot.area(xs, [0.0] * len(xs), ys, "useful pale")
    plot.line(xs, ys, "useful thick")
    plot.dot(xs[-1], ys[-1], "useful", f"{format_hours(ys[-1])} spent")
    plot.label(xs[-1], ys[-1], f"{format_hours(ys[-1])} spent", "end", "left strong")
    return plot.render()


def campaign(progress: CampaignProgress, now: float) -> str:
    """Each stage: planned hours as an outline, used ones filled, the forecast as a line to its P90."""
    most = max(max(s.stage.gpu_hours, s.forecast.p90, s.used) for s in progress.stages) or 1.0
    rows = Rows("campaign", Scale(0, most))
    for s in progress.stages:
        planned, used = format_hours(s.stage.gpu_hours), format_hours(s.used)
        shapes = [rows.bar(0, s.stage.gpu_hours, "planned", f"planned {planned}", 0.9)]
        if s.used > 0:
            css = "lost" if s.used > s.stage.gpu_hours else "useful"
            shapes.append(rows.bar(0, s.used, css, f"used {used}", 0.46))
        if s.when != "past" and s.forecast.p90 > s.used:
            told = f"forecast {format_hours(s.forecast.p50)} ({_range(s.forecast)})"
            shapes.append(rows.bar(s.forecast.p10, s.forecast.p90, "whisker", told, 0.12))
            shapes.append(rows.tick(s.forecast.p50, "forecast", told))
        days = f"{_short_day(s.start)} to {_short_day(s.end - 1)}"
        name = f"{s.stage.name} · {s.stage.days:g} d · {days}"
        rows.add(name, shapes, f"{used} of {planned}", "current" if s.when == "now" else s.when)
    return rows.render(Scale(0, most).ticks(5), "GPU-hours")


def planned_against_used(runs: Sequence[RunLedger]) -> str:
    """For each estimated run its P10 to P90, its P50, and what it used."""
    told = [run for run in runs if run.planned is not None and run.planned.p90 > 0][:_MOST_ROWS]
    if not told:
        return ""
    values = [v for r in told if r.planned for v in (r.planned.p10, r.planned.p90, r.used) if v > 0]
    least, most = min(values), max(values)
    scale = Scale(least / 1.3, most * 1.3, log=True) if most > 20 * least else Scale(0, most * 1.04)
    rows = Rows("planned against used", scale)
    for run in told:
        planned = run.planned
        assert planned is not None, "chosen above"
        shapes = [
            rows.bar(max(planned.p10, scale.low), planned.p90, "planned", f"planned {_range(planned)}", 0.62),
            rows.tick(planned.p50, "median", f"planned P50 {format_hours(planned.p50)}"),
        ]
        if run.used > 0:
            css = "live" if run.is_live else "useful" if _inside(run.used, planned) else "lost"
            shapes.append(rows.dot(run.used, css, f"used {format_hours(run.used)}"))
        words = f"{format_hours(run.used)} of {format_hours(planned.p50)}"
        rows.add(run.run_id, shapes, f"{words} so far" if run.is_live and run.used else words)
    unit = f"{told[0].unit}{', logarithmic' if scale.log else ''}"
    return rows.render(scale.ticks(4), unit, stacked=True)


def estimate_errors(runs: Sequence[RunLedger]) -> str:
    """Used / planned of every finished run, oldest first, with the P10 to P90 it was given."""
    told = sorted((run for run in runs if run.ratio), key=lambda run: run.end)
    if not told:
        return ""
    spans = [(r.planned.p10 / r.planned.p50, r.planned.p90 / r.planned.p50) for r in told if r.planned]
    ratios = [run.ratio or 1.0 for run in told]
    widest = 1.15 * max(
        [1.6, *(b for _, b in spans), *ratios, *(1 / a for a, _ in spans), *(1 / r for r in ratios)]
    )
    y = Scale(1 / widest, widest, log=True)
    height = max(220, min(340, 48 * sum(run.planned is not None for run in runs) - 30))  # as its neighbour
    plot = Plot("Used over planned, for each finished run", Scale(-0.6, len(told) - 0.4), y, height)
    marks = [(v, f"{v:g}{TIMES}") for v in (0.25, 0.5, 0.67, 1, 1.5, 2, 4) if y.low <= v <= y.high]
    plot.axes([], marks, "used / planned (P50)", "finished runs, oldest first")
    plot.line([-0.6, len(told) - 0.4], [1.0, 1.0], "zero")
    for i, (run, (low, high), ratio) in enumerate(zip(told, spans, ratios, strict=True)):
        plot.bar(i - 0.16, i + 0.16, low, high, "planned", f"{run.run_id}: P10 to P90")
        css = "useful" if low <= ratio <= high else "lost"
        plot.dot(i, ratio, css, f"{run.run_id}: {ratio:.2f}{TIMES} of the estimate")
        if len(told) <= 12:
            plot.label(i, high, f"{ratio:.2f}", "middle", "up small")
    return plot.render()


def error_words(runs: Sequence[RunLedger]) -> str:
    """The error of the estimates so far, in a sentence."""
    told = [(run.used, run.planned) for run in runs if run.ratio and run.planned]
    if not told:
        return "No run with a stored estimate has finished yet."
    errors = [abs(planned.p50 / used - 1) for used, planned in told]
    inside = sum(_inside(used, planned) for used, planned in told)
    bias = statistics.median(used / planned.p50 for used, planned in told)
    return (
        f"Median error {100 * statistics.median(errors):.0f} % over {len(told)} finished "
        f"run{'s' * (len(told) > 1)}; the median run used {bias:.2f}{TIMES} its P50; {inside} of {len(told)} "
        "lie between P10 and P90 (80 % should)."
    )


def waste(runs: Sequence[RunLedger]) -> str:
    """Where the hours of each run went, as shares."""
    told = [run for run in runs if run.used > 0]
    if not told:
        return ""
    rows = Rows("where the hours went", Scale(0, 1))
    whole = {part: sum(run.parts[part] for run in told) for part in PARTS}
    if len(told) > 1:
        rows.add("all runs", _stack(rows, whole), _useful(whole), "whole")
    for run in told[:_MOST_ROWS]:
        rows.add(run.run_id, _stack(rows, run.parts), _useful(run.parts))
    return rows.render([(share / 100, f"{share} %") for share in (0, 25, 50, 75, 100)])


def lost_by_cause(runs: Sequence[RunLedger]) -> str:
    """Lost and idle hours by what ended the attempt they were lost in."""
    by_cause: dict[str, float] = defaultdict(float)
    for run in runs:
        for each in run.attempts:
            by_cause[each.cause] += each.parts["lost"] + each.parts["idle"]
    told = sorted(((h, cause) for cause, h in by_cause.items() if h > 0), reverse=True)
    if not told:
        return ""
    rows = Rows("lost and idle hours by cause", Scale(0, told[0][0]))
    for hours, cause in told:
        rows.add(cause.replace("_", " "), [rows.bar(0, hours, "lost", thick=0.7)], format_hours(hours))
    return rows.render(Scale(0, told[0][0]).ticks(4))


def queue_waits(runs: Sequence[RunLedger]) -> str:
    """How long each attempt waited before it began."""
    told = [
        (each.start, each.wait_s, run) for run in runs for each in run.attempts if each.wait_s is not None
    ]
    if not told:
        return ""
    longest = max(wait for _, wait, _ in told)
    unit, size = (
        ("hours", 3600.0) if longest >= 7200 else ("minutes", 60.0) if longest >= 120 else ("seconds", 1.0)
    )
    first, last = min(t for t, _, _ in told), max(t for t, _, _ in told)
    pad = 0.05 * (last - first) or 1800.0
    x, y = Scale(first - pad, last + pad), Scale(0, 1.15 * max(longest, 1.0) / size)
    plot = Plot("Queue wait of each attempt", x, y, 200)
    plot.axes(x.time_ticks(5), y.ticks(4), f"{unit} in the queue")
    for start, wait, run in told:
        plot.line([start, start], [0, wait / size], "stem")
        plot.dot(start, wait / size, "save", f"{run.run_id}: {format_duration(wait)}")
    median = statistics.median(wait for _, wait, _ in told)
    plot.line([x.low, x.high], [median / size] * 2, "mark")
    plot.label(x.high, median / size, f"median {format_duration(median)}", "end", "up muted small")
    return plot.render()


def by_day(runs: Sequence[RunLedger], total_by_day: dict[str, float], unit: str) -> str:
    """Columns of each day's hours by what they were; of each week where there are many days."""
    days: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys((*PARTS, "other"), 0.0))
    for run in runs:
        for each in run.attempts:
            span = max(each.end - each.start, 1e-9)
            for day, seconds in split_days(each.start, each.end):
                for part in PARTS:
                    days[day][part] += each.parts[part] * seconds / span
    for day, hours in total_by_day.items():
        days[day]["other"] = max(0.0, hours - sum(days[day][part] for part in PARTS))
    if len(days) < 2:
        return ""
    columns, width = _columns(days)
    most = max(sum(parts.values()) for parts in columns.values())
    first, last = min(columns), max(columns) + width * DAY
    per = "day" if width == 1 else f"{width} days"
    plot = Plot(f"{unit} of each {per}", Scale(first, last), Scale(0, most or 1.0), 220)
    plot.axes(plot_days(first, last, 8), Scale(0, most or 1.0).ticks(4), f"{unit} a {per}", wide=True)
    for start, parts in sorted(columns.items()):
        base, gap = 0.0, 0.1 * width * DAY
        for part in (*PARTS, "other"):
            if parts[part] > 0.001 * most:
                told = f"{format_day(start)}: {part} {format_hours(parts[part])}"
                plot.bar(start + gap, start + width * DAY - gap, base, base + parts[part], _css(part), told)
                base += parts[part]
    return plot.render()


def plot_days(begin: float, end: float, count: int) -> list[Tick]:
    return Scale(begin, end).time_ticks(count)


def legend(parts: dict[str, float]) -> str:
    """The parts with their colour, hours and share: a legend that is read as a table."""
    whole = sum(parts.values())
    items = [
        f'<li><i class="key {_css(part)}"></i>{part} <b>{format_hours(hours)}</b> '
        f"<span class=muted>{100 * hours / whole if whole else 0:.1f} %</span></li>"
        for part, hours in parts.items()
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


def _draw_plan(
    plot: Plot, progress: CampaignProgress | None, granted: float, begin: float, end: float
) -> None:
    """The campaign's hours stage by stage, else an even pace; labelled where it is a third down."""
    xs, ys, name = [begin, end], [granted, 0.0], "an even pace"
    if progress is not None:
        name = "the campaign's plan"
        spent = accumulate(s.stage.gpu_hours for s in progress.stages)
        xs = [progress.stages[0].start, *(s.end for s in progress.stages)]
        ys = [granted, *(granted - hours for hours in spent)]
    grid = [begin + (end - begin) * i / 200 for i in range(201)]
    line = [(x, y) for x in grid if (y := _between(xs, ys, x)) is not None and y >= 0]
    if not line:
        return
    plot.line([x for x, _ in line], [y for _, y in line], "plan")
    third = next((point for point in line if point[1] < 0.8 * granted), line[-1])
    plot.label(*third, name, "start", "upright muted small")


def _between(xs: Sequence[float], ys: Sequence[float], x: float) -> float | None:
    """The value of the line through the points at x; None outside of them."""
    for (x0, y0), (x1, y1) in pairwise(zip(xs, ys, strict=True)):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / max(x1 - x0, 1e-9)
    return None


def _draw_fan(plot: Plot, standing: BudgetStatus, left: float, now: float, until: float, end: float) -> None:
    taken = standing.committed
    if taken.p90 <= 0 or until <= now:
        return
    xs = [now, until, max(until, end)]
    low, middle, high = ([left, left - hours, left - hours] for hours in (taken.p90, taken.p50, taken.p10))
    plot.area(xs, low, high, "fan")
    plot.line(xs, [float(y) for y in middle], "forecast dash")
    plot.label(
        xs[-1], middle[-1], f"{format_hours(middle[-1])} when all jobs are over", "end", "down small forecast"
    )


def _columns(days: dict[str, dict[str, float]]) -> tuple[dict[float, dict[str, float]], int]:
    first, last = date.fromisoformat(min(days)), date.fromisoformat(max(days))
    count = (last - first).days + 1
    width = 1 if count <= _MOST_BARS else 7 if count <= 7 * _MOST_BARS else 30
    columns: dict[float, dict[str, float]] = {}
    for i in range(0, max(count, 7), width):  # at least a week: two lone columns would fill the plot
        day = first + timedelta(days=i)
        columns[_midnight(day)] = dict.fromkeys((*PARTS, "other"), 0.0)
    for text, parts in days.items():
        i = (date.fromisoformat(text) - first).days // width * width
        column = columns[_midnight(first + timedelta(days=i))]
        for part, hours in parts.items():
            column[part] += hours
    return columns, width


def _midnight(day: date) -> float:
    return datetime(day.year, day.month, day.day).timestamp()


def _stack(rows: Rows, parts: dict[str, float]) -> list[str]:
    whole, base, shapes = sum(parts.values()) or 1.0, 0.0, []
    for part in PARTS:
        share = parts[part] / whole
        if share > 0.0005:
            told = f"{part}: {format_hours(parts[part])} ({100 * share:.1f} %)"
            shapes.append(rows.bar(base, base + share, _css(part), told))
        base += share
    return shapes


def _useful(parts: dict[str, float]) -> str:
    whole = sum(parts.values())
    return f"{100 * parts['useful'] / whole:.1f} % of {format_hours(whole)}" if whole else "0"


def _css(part: str) -> str:
    return part.replace("-", "")


def _inside(used: float, planned: Spread) -> bool:
    return planned.p10 <= used <= planned.p90


def _range(spread: Spread) -> str:
    return f"{format_hours(spread.p10)} to {format_hours(spread.p90)}"


def _short_day(moment: float) -> str:
    return datetime.fromtimestamp(moment).strftime("%d %b").lstrip("0")
