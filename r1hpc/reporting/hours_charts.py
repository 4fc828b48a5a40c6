"""Draw the charts of used GPU-hours: planned against used, where they went, by day, queue waits.

    chart = waste({"run-1": {"useful": 12.0, "lost": 0.5, ...}}, "GPU-hours")

Each function returns a Chart, or None if there is nothing to draw. Times are Unix seconds. Long series are
shortened first: means over stretches, and ranges over them or over many GPUs.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta
from typing import TypeVar

from r1hpc.accounting.budget import format_day, format_hours, format_range
from r1hpc.accounting.forecast import Spread
from r1hpc.base.units import format_duration
from r1hpc.reporting.drawing import (
    BAND,
    DAY,
    FULL,
    Axes,
    Chart,
    dot,
    listed,
    log_axis,
    mark,
    named_rows,
    note,
    number_axis,
    time_axis,
    tip,
)
from r1hpc.reporting.style import colour
from r1hpc.telemetry.gpu.history import GpuSeries

_MOST_POINTS = 240
TIMES = "\N{MULTIPLICATION SIGN}"
PARTS = ("useful", "lost", "start-up", "save", "idle", "other")
"""In stacking order; `other` is what no run folder explains."""
_MOST_COLUMNS = 120
_MOST_ROWS = 24
_MOST_DOTS = 200
"""Up to so many runs, each is a dot with its own tooltip."""
Parts = Mapping[str, float]
T = TypeVar("T")


@dataclass(frozen=True)
class Curve:
    """Points of one line, each with the range of the values it represents; a NaN interrupts it."""

    xs: list[float]
    ys: list[float]
    least: list[float]
    most: list[float]

    @property
    def finite(self) -> list[float]:
        return [y for y in self.ys if math.isfinite(y)]

    @property
    def last(self) -> tuple[float, float]:
        return next((x, y) for x, y in zip(self.xs[::-1], self.ys[::-1], strict=True) if math.isfinite(y))

    @property
    def is_thinned(self) -> bool:
        return self.least != self.ys


@dataclass(frozen=True)
class GpuRange:
    """Median and range over many lines, in stretches without a gap."""

    parts: list[tuple[list[float], list[float], list[float], list[float]]]
    """(xs, least, median, most) of each stretch."""

    @property
    def top(self) -> float:
        return max((y for part in self.parts for y in part[3]), default=0.0)


def thin(xs: Sequence[float], ys: Sequence[float | None], num_all: int = 0) -> Curve:
    """Return means of several values each, about _MOST_POINTS for `num_all` values in several lines."""
    width = max(1, math.ceil(max(len(xs), num_all) / _MOST_POINTS))
    curve = Curve([], [], [], [])
    for i in range(0, len(xs), width):
        known = [y for y in ys[i : i + width] if y is not None and math.isfinite(y)] or [math.nan]
        curve.xs.append(statistics.fmean(xs[i : i + width]))
        curve.ys.append(statistics.fmean(known))
        curve.least.append(min(known))
        curve.most.append(max(known))
    return curve if width > 1 else replace(curve, least=curve.ys, most=curve.ys)


def gpu_range(series: Sequence[GpuSeries], field: str, most: int = _MOST_POINTS) -> GpuRange:
    """Return one field of telemetry.gpu.series.Point over all GPUs, at about `most` times, by stretches."""
    points = [p for each in series for segment in each.segments for p in segment]
    if not points:
        return GpuRange([])
    begin, end = min(p.time for p in points), max(p.time for p in points)
    segments = [segment for each in series for segment in each.segments if len(segment) > 1]
    periods = [(segment[-1].time - segment[0].time) / (len(segment) - 1) for segment in segments]
    step = max((end - begin) / most, *periods, 1.0)
    cells: dict[int, list[float]] = defaultdict(list)
    for point in points:
        value = getattr(point, field)
        if math.isfinite(value):
            cells[int((point.time - begin) / step)].append(value)
    parts: list[tuple[list[float], list[float], list[float], list[float]]] = []
    before = None
    for cell in sorted(cells):
        if before is None or cell > before + 2:
            parts.append(([], [], [], []))
        before = cell
        values = cells[cell]
        row = (begin + (cell + 0.5) * step, min(values), statistics.median(values), max(values))
        for column, value in zip(parts[-1], row, strict=True):
            column.append(value)
    return GpuRange(parts)


@dataclass(frozen=True)
class EstimatedRun:
    """One run with its estimate, in hours."""

    name: str
    planned: Spread
    used: float
    end: float
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
    values = [f"{format_hours(r.used)} of {format_hours(r.planned.p50)}" for r in shown]
    values = [f"{v} so far" if r.is_live and r.used else v for v, r in zip(values, shown, strict=True)]

    def draw(axes: Axes, width: int) -> None:
        if is_log:
            log_axis(axes.xaxis, low / 1.3, high * 1.3)
        else:
            number_axis(axes.xaxis, 0, high * 1.04)
        least = low / 1.3 if is_log else 0.0
        rows = [(run.name, value, False) for run, value in zip(shown, values, strict=True)]
        ys, height = named_rows(axes, rows, width)
        for y, run in zip(ys, shown, strict=True):
            left = max(run.planned.p10, least)
            bar = axes.barh(y, run.planned.p90 - left, height, left=left, color=colour("planned"))[0]
            tip(bar, f"planned {format_range(run.planned)}")
            words = f"planned P50 {format_hours(run.planned.p50)}"
            mark(axes, max(run.planned.p50, least), y, height, words)
            if run.used > 0:
                name = "start-up" if run.is_live else "useful" if run.is_inside else "lost"
                dot(axes, run.used, y, name, f"used {format_hours(run.used)}")
        axes.set_xlabel(f"{unit}{', logarithmic' if is_log else ''}{_only(shown, runs)}", loc="right")

    label = listed(
        "planned against used", [f"{r.name}: {value}" for r, value in zip(shown, values, strict=True)]
    )
    meanings = [("planned", f"{BAND} at submission"), ("useful", "used, inside"), ("lost", "used, outside")]
    meanings.append(("start-up", "so far"))
    return Chart("planned", "Planned against used", label, draw, num_rows=len(shown), keys=meanings)


def estimate_errors(runs: Sequence[EstimatedRun]) -> Chart | None:
    """Draw used / planned of every finished run, oldest first, with its estimate's P10 to P90."""
    shown = _finished(runs)[-_MOST_DOTS:]
    if not shown:
        return None
    ratios = [run.used / run.planned.p50 for run in shown]
    spans = [(run.planned.p10 / run.planned.p50, run.planned.p90 / run.planned.p50) for run in shown]
    edges = [edge for low, high in spans for edge in (1 / max(low, 1e-3), high)]
    widest = 1.2 * max([1.6, *edges, *ratios, *(1 / ratio for ratio in ratios)])
    marks = [v for v in (0.1, 0.25, 0.5, 0.67, 1, 1.5, 2, 4, 10) if 1 / widest <= v <= widest]

    def draw(axes: Axes, width: int) -> None:
        log_axis(axes.yaxis, 1 / widest, widest, marks, TIMES)
        axes.set(xlim=(-0.6, len(shown) - 0.4), xticks=[])
        axes.set_title("used / planned (P50)")
        axes.set_xlabel("finished runs, oldest first", loc="right")
        axes.axhline(1, color=colour("median"), lw=1)
        for i, (run, (low, high), ratio) in enumerate(zip(shown, spans, ratios, strict=True)):
            bar = axes.bar(i, high - low, 0.32, bottom=low, color=colour("planned"))[0]
            tip(bar, f"{run.name}: P10 to P90")
            words = f"{run.name}: {ratio:.2f}{TIMES} of the estimate"
            dot(axes, i, ratio, "useful" if run.is_inside else "lost", words)
            if len(shown) <= 12:
                note(axes, i, max(high, ratio), f"{ratio:.2f}")

    return Chart(
        "errors", "Error of the estimates so far", "Used over planned, for each finished run", draw, 300
    )


def error_words(runs: Sequence[EstimatedRun]) -> str:
    """Return the error of the estimates so far, in a sentence."""
    shown = _finished(runs)
    if not shown:
        return "No run with a stored estimate has finished yet."
    errors = [abs(run.planned.p50 / run.used - 1) for run in shown]
    inside = sum(run.is_inside for run in shown)
    bias = statistics.median(run.used / run.planned.p50 for run in shown)
    return (
        f"Median error {100 * statistics.median(errors):.0f} % over {len(shown)} finished "
        f"run{'s' * (len(shown) > 1)}; the median run used {bias:.2f}{TIMES} its P50; {inside} of "
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
    useful = [
        f"{100 * p.get('useful', 0.0) / w:.1f} % of {format_hours(w)}"
        for _, p, _ in rows
        if (w := sum(p.values()))
    ]

    def draw(axes: Axes, width: int) -> None:
        axes.set(xlim=(0, 100), xticks=range(0, 101, 25))
        axes.xaxis.set_major_formatter("{x:.0f} %")
        named = [(name, text, strong) for (name, _, strong), text in zip(rows, useful, strict=True)]
        ys, height = named_rows(axes, named, width)
        for y, (_, parts, _) in zip(ys, rows, strict=True):
            whole, base = sum(parts.values()), 0.0
            for part in PARTS:
                share = 100 * parts.get(part, 0.0) / whole
                if share > 0.05:
                    bar = axes.barh(y, share, height, left=base, color=colour(part))[0]
                    tip(bar, f"{part}: {format_hours(parts[part])} ({share:.1f} %)")
                base += share
        axes.set_xlabel(f"share of the {unit}, useful ones in numbers", loc="right")

    label = listed(
        "where the hours went", [f"{row[0]}: {text}" for row, text in zip(rows, useful, strict=True)]
    )
    whole = _sum(shown.values())
    return Chart("waste", "Where the hours went", label, draw, num_rows=len(rows), keys=_hours_of(whole))


def lost_by_cause(hours: Mapping[str, float], unit: str, used: float) -> Chart | None:
    """Draw lost and idle hours by what ended the attempt they were lost in. A tenth of the `used` hours or
    more fills the width: a few seconds in a day look like a few seconds."""
    shown = sorted(((h, cause.replace("_", " ")) for cause, h in hours.items() if h > 0), reverse=True)
    if not shown:
        return None

    def draw(axes: Axes, width: int) -> None:
        number_axis(axes.xaxis, 0, max(shown[0][0], used / 10), 4)
        ys, height = named_rows(axes, [(cause, format_hours(h), False) for h, cause in shown], width)
        axes.barh(ys, [h for h, _ in shown], height, color=colour("lost"))
        axes.set_xlabel(unit, loc="right")

    label = listed("lost and idle hours by cause", [f"{cause}: {format_hours(h)}" for h, cause in shown])
    return Chart("causes", "Lost and idle, by what ended the attempt", label, draw, num_rows=len(shown))


def queue_waits(waits: Sequence[tuple[float, float, str]]) -> Chart | None:
    """Draw each attempt's queue wait; `waits` holds (when it began, seconds, its run)."""
    if not waits:
        return None
    longest = max(wait for _, wait, _ in waits)
    units = (("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))
    unit, size = next((each for each in units if longest >= 2 * each[1]), units[-1])
    first, last = min(waits)[0], max(waits)[0]
    pad = 0.05 * (last - first) or 1800.0
    median = statistics.median(wait for _, wait, _ in waits)

    def draw(axes: Axes, width: int) -> None:
        time_axis(axes, first - pad, last + pad, width)
        number_axis(axes.yaxis, 0, 1.15 * max(longest, 1.0) / size, 4)
        if len(waits) > _MOST_DOTS:
            axes.set_title(f"{unit} in the queue, mean and range of neighbours")
            _draw_many(axes, [(begin / DAY, wait / size) for begin, wait, _ in sorted(waits)])
        else:
            axes.set_title(f"{unit} in the queue")
            for begin, wait, name in waits:
                axes.vlines(begin / DAY, 0, wait / size, color=colour("save"), alpha=0.45, lw=1)
                dot(axes, begin / DAY, wait / size, "save", f"{name}: {format_duration(wait)}", 6)
        axes.axhline(median / size, color=colour("start-up"), lw=1.2, ls=(0, (2, 3)))
        where = (axes.get_xlim()[1], median / size)
        note(axes, *where, f"median {format_duration(median)}", "muted", ha="right", xytext=(-2, 3))

    return Chart("queue", "Queue waits", "Queue wait of each attempt", draw)


def _draw_many(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    curve = thin([x for x, _ in points], [y for _, y in points])
    axes.fill_between(curve.xs, curve.least, curve.most, color=colour("save"), alpha=0.3, lw=0)
    axes.plot(curve.xs, curve.ys, color=colour("save"))


def by_day(days: Mapping[str, Parts], unit: str) -> Chart | None:
    """Draw columns of hours by PARTS for each day (YYYY-MM-DD), or for each week or 30 days if many."""
    if len(days) < 2:
        return None
    columns, size = _columns(days)
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


def _columns(days: Mapping[str, Parts]) -> tuple[dict[float, dict[str, float]], int]:
    """Return hours by the start of each column, and the number of days in a column."""
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
    return columns, size


def _hours_of(parts: Parts) -> list[tuple[str, str]]:
    """Return keys that read as a table: each part with its hours and share."""
    whole = sum(parts.values()) or 1.0
    return [
        (part, f"{part} {format_hours(parts[part])} ({100 * parts[part] / whole:.1f} %)")
        for part in PARTS
        if parts.get(part, 0.0) > 0.0005 * whole
    ]


def _largest(items: Sequence[T], sizes: Sequence[float]) -> list[T]:
    """Return the largest, in their given order."""
    ranked = sorted(range(len(items)), key=lambda i: -sizes[i])[:_MOST_ROWS]
    return [items[i] for i in sorted(ranked)]


def _only(shown: Sequence[object], runs: Sequence[object]) -> str:
    return f"; the {len(shown)} largest of {len(runs)} runs" if len(shown) < len(runs) else ""


def _finished(runs: Sequence[EstimatedRun]) -> list[EstimatedRun]:
    shown = (run for run in runs if run.is_finished and run.used > 0 and run.planned.p50 > 0)
    return sorted(shown, key=lambda run: run.end)


def _sum(many: Iterable[Parts]) -> dict[str, float]:
    whole: dict[str, float] = defaultdict(float)
    for parts in many:
        for part, hours in parts.items():
            whole[part] += hours
    return dict(whole)
