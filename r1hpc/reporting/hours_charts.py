"""Draw the charts of GPU-hours: budget, campaign, planned against used, where they went, by day and by cause.

Each function returns a Chart, or None if there is nothing to draw. Times are Unix seconds.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import TypeVar

from r1hpc.accounting.budget import format_day, format_range
from r1hpc.accounting.campaign import StageProgress
from r1hpc.base.units import format_hours
from r1hpc.plan.hours.spread import Spread
from r1hpc.reporting.drawing import (
    BAND,
    DAY,
    FULL,
    Axes,
    Chart,
    dot,
    log_axis,
    mark,
    note,
    number_axis,
    row_chart,
    time_axis,
    tip,
)
from r1hpc.reporting.style import colour

TIMES = "\N{MULTIPLICATION SIGN}"
PARTS = ("useful", "lost", "start-up", "save", "idle", "other")
"""In stacking order; `other` is what no run folder explains."""
_MOST_COLUMNS = 120
_MOST_ROWS = 24
Parts = Mapping[str, float]
T = TypeVar("T")


@dataclass(frozen=True)
class EstimatedRun:
    """One run with its estimate, in hours."""

    name: str
    planned: Spread
    used: float
    is_live: bool
    is_finished: bool

    @property
    def is_inside(self) -> bool:
        return self.planned.p10 <= self.used <= self.planned.p90


def planned_against_used(runs: Sequence[EstimatedRun], unit: str) -> Chart | None:
    """Draw P10 to P90, P50 and the used hours of each estimated run; only the largest if they are many."""
    shown = _largest(runs, [max(run.planned.p50, run.used) for run in runs])
    hours = [h for r in shown for h in (r.planned.p10, r.planned.p90, r.used) if h > 0]
    if not hours:
        return None
    low, high = min(hours), max(hours)
    is_log = high > 20 * low
    only = f"; the {len(shown)} largest of {len(runs)} runs" if len(shown) < len(runs) else ""
    rows = []
    for run in shown:
        so_far = " so far" if run.is_live and run.used else ""
        value = f"{format_hours(run.used)} of {format_hours(run.planned.p50)}{so_far}"
        rows.append((run.name, value, False))

    def draw(axes: Axes, ys: Sequence[float], height: float) -> None:
        if is_log:
            log_axis(axes.xaxis, low / 1.3, high * 1.3)
        else:
            number_axis(axes.xaxis, 0, high * 1.04)
        least = low / 1.3 if is_log else 0.0
        for y, run in zip(ys, shown, strict=True):
            left = max(run.planned.p10, least)
            bar = axes.barh(y, run.planned.p90 - left, height, left=left, color=colour("planned"))[0]
            tip(bar, f"planned {format_range(run.planned)}")
            words = f"planned P50 {format_hours(run.planned.p50)}"
            mark(axes, max(run.planned.p50, least), y, height, words)
            if run.used > 0:
                name = "start-up" if run.is_live else "useful" if run.is_inside else "lost"
                dot(axes, run.used, y, name, f"used {format_hours(run.used)}")
        axes.set_xlabel(f"{unit}{', logarithmic' if is_log else ''}{only}", loc="right")

    meanings = [("planned", f"{BAND} at submission"), ("useful", "used, inside"), ("lost", "used, outside")]
    meanings.append(("start-up", "so far"))
    return row_chart("planned", "Planned against used", "planned against used", rows, draw, meanings)


def error_words(runs: Sequence[EstimatedRun]) -> str:
    """Return the error of the estimates so far, in a sentence."""
    shown = [run for run in runs if run.is_finished and run.used > 0 and run.planned.p50 > 0]
    if not shown:
        return "No run with a stored estimate has finished yet."
    errors = [abs(run.planned.p50 / run.used - 1) for run in shown]
    inside = sum(run.is_inside for run in shown)
    bias = statistics.median(run.used / run.planned.p50 for run in shown)
    if len(shown) == 1:
        where = "inside" if inside else "outside"
        return f"It used {bias:.2f}{TIMES} its P50, {where} P10 to P90."
    return (
        f"Median error {100 * statistics.median(errors):.0f} % over {len(shown)} finished "
        f"runs; the median run used {bias:.2f}{TIMES} its P50; {inside} of "
        f"{len(shown)} lie between P10 and P90 (80 % should)."
    )


def waste(runs: Mapping[str, Parts], unit: str) -> Chart | None:
    """Draw where each run's hours went, as shares: all runs, the largest, and the others together."""
    shown = {name: parts for name, parts in runs.items() if sum(parts.values()) > 0}
    if not shown:
        return None
    kept = _largest(list(shown), [sum(parts.values()) for parts in shown.values()])
    rest = [parts for name, parts in shown.items() if name not in kept]
    rows = [("all runs", _sum(shown.values()), True)] if len(shown) > 1 else []
    rows += [(name, dict(shown[name]), False) for name in kept]
    rows += [(f"{len(rest)} others", _sum(rest), False)] if rest else []
    named = []
    for name, parts, strong in rows:
        held = sum(parts.values())
        named.append((name, f"{100 * parts.get('useful', 0.0) / held:.1f} % of {format_hours(held)}", strong))

    def draw(axes: Axes, ys: Sequence[float], height: float) -> None:
        axes.set(xlim=(0, 100), xticks=range(0, 101, 25))
        axes.xaxis.set_major_formatter("{x:.0f} %")
        for y, (_, parts, _) in zip(ys, rows, strict=True):
            whole, base = sum(parts.values()), 0.0
            for part in PARTS:
                share = 100 * parts.get(part, 0.0) / whole
                if share > 0.05:
                    bar = axes.barh(y, share, height, left=base, color=colour(part))[0]
                    tip(bar, f"{part}: {format_hours(parts[part])} ({share:.1f} %)")
                base += share
        axes.set_xlabel(f"share of the {unit}, useful ones in numbers", loc="right")

    meanings = _hours_of(_sum(shown.values()))
    return row_chart("waste", "Where the hours went", "where the hours went", named, draw, meanings)


def lost_by_cause(hours: Mapping[str, float], unit: str, used: float) -> Chart | None:
    """Draw lost and idle hours by what ended the attempt they were lost in. A tenth of the `used` hours or
    more fills the width: a few seconds in a day look like a few seconds."""
    shown = sorted(((h, cause.replace("_", " ")) for cause, h in hours.items() if h > 0), reverse=True)
    if not shown:
        return None
    rows = [(cause, format_hours(h), False) for h, cause in shown]

    def draw(axes: Axes, ys: Sequence[float], height: float) -> None:
        number_axis(axes.xaxis, 0, max(shown[0][0], used / 10), 4)
        axes.barh(ys, [h for h, _ in shown], height, color=colour("lost"))
        axes.set_xlabel(unit, loc="right")

    title = "Lost and idle, by what ended the attempt"
    return row_chart("causes", title, "lost and idle hours by cause", rows, draw)


def by_day(days: Mapping[str, Parts], unit: str) -> Chart | None:
    """Draw columns of hours by PARTS for each day (YYYY-MM-DD), or for each week or 30 days if many."""
    if len(days) < 2:
        return None
    first, last = date.fromisoformat(min(days)), date.fromisoformat(max(days))
    count = (last - first).days + 1
    size = 1 if count <= _MOST_COLUMNS else 7 if count <= 7 * _MOST_COLUMNS else 30
    begins = (first + timedelta(days=i) for i in range(0, max(count, 7), size))  # two would be huge
    starts = [datetime.combine(day, datetime.min.time()).timestamp() for day in begins]
    columns = {start: dict.fromkeys(PARTS, 0.0) for start in starts}
    for text, parts in days.items():
        column = columns[starts[(date.fromisoformat(text) - first).days // size]]
        for part, hours in parts.items():
            column[part] += hours
    per = {1: "day", 7: "week"}.get(size, f"{size} days")
    most = max(sum(parts.values()) for parts in columns.values()) or 1.0

    def draw(axes: Axes, width: int) -> None:
        time_axis(axes, min(columns), max(columns) + size * DAY, width)
        number_axis(axes.yaxis, 0, 1.04 * most, 4)
        axes.set_title(f"{unit} per {per}")
        middles, base = [start / DAY + size / 2 for start in columns], [0.0] * len(columns)
        for part in PARTS:
            hours = [parts[part] for parts in columns.values()]
            bars = axes.bar(middles, hours, 0.8 * size, bottom=base, color=colour(part))
            for bar, start, h in zip(bars, columns, hours, strict=True):
                if h < 0.001 * most:
                    bar.remove()
                elif width == FULL:
                    tip(bar, f"{format_day(start)}: {part} {format_hours(h)}")
            base = [below + h for below, h in zip(base, hours, strict=True)]

    whole = _sum(columns.values())
    return Chart("days", f"By {per}", f"{unit} of each {per}", draw, 240, keys=_hours_of(whole))


def _hours_of(parts: Parts) -> list[tuple[str, str]]:
    """Return keys that read as a table: each part with its hours and share."""
    whole = sum(parts.values()) or 1.0
    return [
        (part, f"{part} {format_hours(parts[part])} ({100 * parts[part] / whole:.1f} %)")
        for part in PARTS
        if parts.get(part, 0.0) > 0.0005 * whole
    ]


def _largest(items: Sequence[T], sizes: Sequence[float]) -> list[T]:
    ranked = sorted(range(len(items)), key=lambda i: -sizes[i])[:_MOST_ROWS]
    return [items[i] for i in sorted(ranked)]


def _sum(many: Iterable[Parts]) -> dict[str, float]:
    whole: dict[str, float] = defaultdict(float)
    for parts in many:
        for part, hours in parts.items():
            whole[part] += hours
    return dict(whole)


@dataclass(frozen=True)
class BurnDown:
    """A budget over its period, in GPU-hours."""

    granted: float
    begin: float
    end: float
    now: float
    curve: Sequence[tuple[float, float]]
    """(time, spent until then)."""
    spent: float
    committed: Spread
    """Still to be used by running and queued jobs."""
    over: float
    warn_at: Sequence[float]
    """Shares of the budget at which it warns."""
    plan_name: str
    plan: Sequence[tuple[float, float]]
    """(time, planned rest at that time)."""

    @property
    def left(self) -> float:
        return self.granted - self.spent


def burn_down(data: BurnDown) -> Chart:
    """Draw the rest of the budget, with the plan and the forecast."""
    left, granted = data.left, data.granted

    def draw(axes: Axes, width: int) -> None:
        time_axis(axes, data.begin, data.end, width)
        number_axis(axes.yaxis, min(0.0, left - data.committed.p90), granted * 1.04)
        axes.set_title("GPU-hours left")
        axes.axhline(0, color=colour("median"), lw=1)
        for share in data.warn_at:
            axes.axhline(granted * (1 - share), color=colour("start-up"), lw=1.2, ls=(0, (2, 3)))
            where = (data.begin / DAY, granted * (1 - share))
            note(axes, *where, f"{100 * share:.0f} % spent", "muted", ha="left", xytext=(4, 3))
        _draw_plan(axes, data)
        _draw_forecast(axes, data)
        axes.axvline(data.now / DAY, color=colour("muted"), lw=1)
        times = [data.begin, *(x for x, _ in data.curve), data.now]
        xs, ys = [x / DAY for x in times], [granted, *(granted - spent for _, spent in data.curve), left]
        axes.fill_between(xs, ys, color=colour("useful"), alpha=0.14, lw=0)
        axes.plot(xs, ys, color=colour("useful"), lw=2)
        words = f"{format_hours(left)} left"
        dot(axes, xs[-1], left, "useful", words)
        side, gap = ("right", -8) if data.now > (data.begin + data.end) / 2 else ("left", 8)
        note(axes, xs[-1], left, words, fontweight="bold", ha=side, xytext=(gap, 6))

    label = f"What is left of the budget over time: {format_hours(left)} of {format_hours(granted)}"
    return Chart("spent", "Burn-down", label, draw, 300)


def _draw_plan(axes: Axes, data: BurnDown) -> None:
    """Draw the part of the plan in the period; name it if it plans a fifth of the budget or more."""
    import numpy as np

    times, left = zip(*data.plan, strict=True)
    xs = np.linspace(data.begin, data.end, 201)
    ys = np.interp(xs, times, left, left=np.nan, right=np.nan)
    xs, ys = xs[ys >= 0] / DAY, ys[ys >= 0]
    axes.plot(xs, ys, "--", color=colour("muted"), lw=1.5)
    if (low := ys < 0.8 * data.granted).any():
        note(axes, xs[low][0], ys[low][0], data.plan_name, "muted", ha="left", xytext=(8, 4))


def _draw_forecast(axes: Axes, data: BurnDown) -> None:
    """Draw the fan from now until all jobs are over."""
    left, taken = data.left, data.committed
    until = min(data.end, max(data.over, data.now + 0.02 * (data.end - data.begin)))
    if taken.p90 <= 0 or until <= data.now:
        return
    xs = [x / DAY for x in (data.now, until, data.end)]
    low, middle, high = ([left, left - hours, left - hours] for hours in (taken.p90, taken.p50, taken.p10))
    axes.fill_between(xs, low, high, color=colour("useful"), alpha=0.18, lw=0)
    axes.plot(xs, middle, color=colour("useful"), lw=1.5, ls=(0, (3, 3)))
    words = f"{format_hours(middle[-1])} when all jobs are over"
    note(axes, xs[-1], middle[-1], words, "useful", ha="right", va="top", xytext=(-4, -5))


def campaign(stages: Sequence[StageProgress]) -> Chart | None:
    """Draw each stage: planned hours pale, used ones on top, the forecast of an open one as a line."""
    ahead = [s.forecast.p90 for s in stages if s.when != "past"]
    most = max([0.0, *ahead, *(max(s.stage.gpu_hours, s.used) for s in stages)])
    rows = []
    for s in stages:
        days = [datetime.fromtimestamp(at).strftime("%d %b").lstrip("0") for at in (s.start, s.end - 1)]
        name = f"{s.stage.name} \N{MIDDLE DOT} {s.stage.days:g} d \N{MIDDLE DOT} {' to '.join(days)}"
        rows.append((name, f"{format_hours(s.used)} of {format_hours(s.stage.gpu_hours)}", s.when == "now"))

    def draw(axes: Axes, ys: Sequence[float], height: float) -> None:
        number_axis(axes.xaxis, 0, most)
        for y, s in zip(ys, stages, strict=True):
            planned = s.stage.gpu_hours
            bar = axes.barh(y, planned, height, color=colour("planned"))[0]
            tip(bar, f"planned {format_hours(planned)}")
            name = "lost" if s.used > planned else "useful"
            tip(axes.barh(y, s.used, height / 2, color=colour(name))[0], f"used {format_hours(s.used)}")
            if s.when != "past" and s.forecast.p90 > s.used:
                axes.plot([s.forecast.p10, s.forecast.p90], [y, y], color=colour("median"), lw=2)
                words = f"forecast {format_hours(s.forecast.p50)} ({format_range(s.forecast)})"
                mark(axes, s.forecast.p50, y, height, words)
        axes.set_xlabel("GPU-hours", loc="right")

    meanings = [("planned", "planned"), ("useful", "used"), ("median", f"forecast, {BAND}")]
    return row_chart("campaign", "Campaign", "campaign", rows, draw, meanings) if most else None
