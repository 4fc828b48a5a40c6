"""Draw the charts of a budget: what is left, what was spent if no budget is set, and its campaign.

    chart = burn_down(BurnDown(granted=16000.0, ...))

Each function returns a Chart, or None if there is nothing to draw. Times are Unix seconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from r1hpc.accounting.budget import format_hours, format_range
from r1hpc.accounting.campaign import StageProgress
from r1hpc.accounting.forecast import Spread
from r1hpc.reporting.drawing import (
    BAND,
    DAY,
    Axes,
    Chart,
    dot,
    listed,
    mark,
    named_rows,
    note,
    number_axis,
    time_axis,
    tip,
)
from r1hpc.reporting.style import colour


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
    """When that should be over."""
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
        curve = [(x, granted - spent) for x, spent in data.curve]
        points = [(data.begin, granted), *curve, (data.now, left)]
        _draw_hours(axes, points, f"{format_hours(left)} left", data.now > (data.begin + data.end) / 2)

    label = f"What is left of the budget over time: {format_hours(left)} of {format_hours(granted)}"
    return Chart("spent", "Burn-down", label, draw, 300)


def spending(curve: Sequence[tuple[float, float]], unit: str) -> Chart | None:
    """Draw the hours spent so far, if no budget is set; `curve` is (time, spent until then)."""
    if len(curve) < 2 or curve[-1][1] <= 0:
        return None
    spent = f"{format_hours(curve[-1][1])} spent"

    def draw(axes: Axes, width: int) -> None:
        time_axis(axes, curve[0][0], curve[-1][0], width)
        number_axis(axes.yaxis, 0, 1.15 * curve[-1][1])
        axes.set_title(f"{unit} spent")
        _draw_hours(axes, curve, spent, True)

    return Chart("spent", "Spent so far", f"{unit} over time: {spent}", draw, 240)


def _draw_hours(axes: Axes, points: Sequence[tuple[float, float]], words: str, on_the_left: bool) -> None:
    """Draw (time, hours) as a line over its area; `words` label the last point."""
    xs, ys = [x / DAY for x, _ in points], [y for _, y in points]
    axes.fill_between(xs, ys, color=colour("useful"), alpha=0.14, lw=0)
    axes.plot(xs, ys, color=colour("useful"), lw=2)
    dot(axes, xs[-1], ys[-1], "useful", words)
    side, gap = ("right", -8) if on_the_left else ("left", 8)
    note(axes, xs[-1], ys[-1], words, fontweight="bold", ha=side, xytext=(gap, 6))


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
    names = [_stage_name(s) for s in stages]
    values = [f"{format_hours(s.used)} of {format_hours(s.stage.gpu_hours)}" for s in stages]

    def draw(axes: Axes, width: int) -> None:
        number_axis(axes.xaxis, 0, most)
        rows = [(name, value, s.when == "now") for name, value, s in zip(names, values, stages, strict=True)]
        ys, height = named_rows(axes, rows, width)
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
    label = listed("campaign", [f"{name}: {value}" for name, value in zip(names, values, strict=True)])
    return Chart("campaign", "Campaign", label, draw, num_rows=len(stages), keys=meanings) if most else None


def _stage_name(each: StageProgress) -> str:
    first, last = (_short_day(moment) for moment in (each.start, each.end - 1))
    return f"{each.stage.name} \N{MIDDLE DOT} {each.stage.days:g} d \N{MIDDLE DOT} {first} to {last}"


def _short_day(moment: float) -> str:
    return datetime.fromtimestamp(moment).strftime("%d %b").lstrip("0")
