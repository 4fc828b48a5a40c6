"""Draw the charts of one run: loss, reward, throughput, MFU and GPUs, with attempts as bands.

reporting.page reads a RunData from a run folder. Long series are shortened first: means over stretches, and
ranges over them or over many GPUs.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from r1hpc.reporting.drawing import (
    DAY,
    HALF,
    Axes,
    Chart,
    dot,
    note,
    number_axis,
    save_png,
    short,
    time_axis,
    tip,
)
from r1hpc.reporting.style import colour
from r1hpc.telemetry.diagnosis.summary import AttemptSummary
from r1hpc.telemetry.gpu.history import GpuSeries
from r1hpc.telemetry.records.metrics import Step

_FILES = {
    "loss": ("loss", "lr"),
    "throughput": ("throughput",),
    "reward": ("reward", "length", "learning"),
    "gpu": ("utilisation", "power", "memory"),
}
"""Charts that share a PNG."""
_REWARDS = ("reward", "reward_mean", "mean_reward")
_MOST_POINTS = 240
_ABOVE: Mapping[str, Any] = {
    **{"loc": "lower left", "bbox_to_anchor": (-0.02, 1.0), "ncols": 3, "borderpad": 0.1},
    **{"handlelength": 0.9, "handletextpad": 0.4, "columnspacing": 0.9},
}
"""Place and spacing of a legend in one line."""
_FLATTEST = 1e-3
"""Least range of an axis of losses, as a share of the loss."""
STUB = "source=stub: a test library, these readings mean nothing"
Bands = Sequence[tuple[float, float, str]]


@dataclass(frozen=True)
class Curve:
    """Points of one line, each with the range of the values it represents; a NaN interrupts it."""

    xs: list[float]
    ys: list[float]
    least: list[float]
    most: list[float]

    @property
    def last(self) -> tuple[float, float]:
        return next((x, y) for x, y in zip(self.xs[::-1], self.ys[::-1], strict=True) if math.isfinite(y))


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


def gpu_range(series: Sequence[GpuSeries], key: str, most: int = _MOST_POINTS) -> list[list[list[float]]]:
    """Return (xs, least, median, most) of each stretch without a gap, in about `most` xs: one field of
    telemetry.gpu.history.Point over all GPUs."""
    points = [p for each in series for segment in each.segments for p in segment]
    if not points:
        return []
    begin, end = min(p.time for p in points), max(p.time for p in points)
    segments = [segment for each in series for segment in each.segments if len(segment) > 1]
    periods = [(segment[-1].time - segment[0].time) / (len(segment) - 1) for segment in segments]
    step = max((end - begin) / most, *periods, 1.0)
    cells: dict[int, list[float]] = defaultdict(list)
    for point in points:
        value = getattr(point, key)
        if math.isfinite(value):
            cells[int((point.time - begin) / step)].append(value)
    parts: list[list[list[float]]] = []
    before = None
    for cell in sorted(cells):
        if before is None or cell > before + 2:
            parts.append([[], [], [], []])
        before, values = cell, cells[cell]
        row = (begin + (cell + 0.5) * step, min(values), statistics.median(values), max(values))
        for column, value in zip(parts[-1], row, strict=True):
            column.append(value)
    return parts


@dataclass(frozen=True)
class RunData:
    attempts: Sequence[AttemptSummary]
    steps: Sequence[Step]
    lost: Sequence[Step]
    """Steps that were repeated, or will be."""
    saves: Sequence[float] = ()
    evaluations: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    """Greedy accuracy on held-out items by step: value, low and high of its 95 % interval."""
    gpus: Sequence[GpuSeries] = ()

    @property
    def is_stub(self) -> bool:
        return any(each.source == "stub" for each in self.gpus)

    def column(self, key: str) -> list[float | None]:
        return [step.number(key) for step in self.steps]


def charts_of_run(data: RunData) -> dict[str, Chart]:
    """Return every chart that has data, by name."""
    reward = next((key for key in _REWARDS if _known(data.column(key))), "reward")
    rewards = {"accuracy": ("useful", "accuracy"), reward: ("good", "mean reward")}
    lengths = {"response_length_correct": ("good", "correct"), "response_length_wrong": ("lost", "wrong")}
    useless = ("muted", "groups that teach nothing")
    learning = {"zero_variance_share": useless, "entropy": ("useful", "entropy (nats)")}
    steps = [
        _over_steps(data, "reward", "Reward and accuracy (held-out: greedy)", rewards, held_out=True),
        _over_steps(data, "length", "Length of the answers, in tokens", lengths),
        _over_steps(data, "learning", "Left to learn from", learning),
    ]
    losses = [
        _over_steps(data, "loss", "Loss", {"loss": ("useful", "loss")}, lost="loss", floor=None),
        _over_steps(data, "lr", "Learning rate", {"lr": ("muted", "learning rate")}),
    ]
    drawn = [
        *([] if steps[0] is None else steps),  # the loss of RL does not show how good the policy is
        *losses,
        *(steps if steps[0] is None else []),
        _throughput(data),
        _gpus(data, "utilisation", "utilization_percent", "% of time with a kernel running", 100.0),
        _gpus(data, "power", "power_w", "watts a GPU", 0.0),
        _gpus(data, "memory", "memory_gib", "GiB a GPU", 0.0),
    ]
    return {chart.name: chart for chart in drawn if chart is not None}


def write_pngs(title: str, charts: Mapping[str, Chart], folder: Path, warning: str = "") -> list[Path]:
    """Write the charts as files, some sharing one; return the paths. `warning` is added to the GPUs'."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    paths = []
    for name, members in _FILES.items():
        drawn = [charts[member] for member in members if member in charts]
        if drawn:
            words = f"  ({warning})" if warning and name == "gpu" else ""
            paths.append(folder / f"{name}.png")
            save_png(drawn, f"{title}: {'GPUs' if name == 'gpu' else name}{words}", paths[-1])
    return paths


def _over_steps(
    data: RunData,
    name: str,
    title: str,
    lines: Mapping[str, tuple[str, str]],
    *,
    lost: str = "",
    floor: float | None = 0.0,
    held_out: bool = False,
) -> Chart | None:
    """Draw lines {key of the step: (colour, meaning)} over the optimizer steps.

    `floor` is the start of the y axis, None: near the least value. With `lost` that key of the lost steps is
    drawn too, with `held_out` the evaluations.
    """
    numbers = [float(step.global_step) for step in data.steps]
    curves = {key: thin(numbers, data.column(key)) for key in lines if _known(data.column(key))}
    tests = data.evaluations if held_out else {}
    if not curves:
        return None
    is_named = bool(tests or len(curves) > 1)
    shown = ", ".join(lines[key][1] for key in curves)
    begin, end = min([numbers[0], 1.0, *tests]) - 0.5, max([numbers[-1], *tests]) + 0.5

    def draw(axes: Axes, width: int) -> None:
        low, high = _limits(curves.values(), floor, [test["high"] for test in tests.values()])
        number_axis(axes.xaxis, begin, end)
        number_axis(axes.yaxis, low, high, 4)
        axes.set_xlabel("optimizer step", loc="right")
        _shade(axes, _step_bands(data.attempts), begin, end, width)
        if lost:
            _draw_lost(axes, data.lost, lost, (low, high), end)
        for key, curve in curves.items():
            _draw_curve(axes, curve, lines[key][0], (low, high), lines[key][1])
        if tests:
            _draw_tests(axes, tests)
        if is_named:  # above the chart, where it hides nothing
            axes.legend(**_ABOVE)
        else:
            axes.set_title(shown)
            # Mark the last value; its number is above the chart, where it hides no step.
            x, value = curve.last
            dot(axes, x, min(max(value, low), high), lines[key][0], f"{value:.4g}", 7)
            _at_top_right(axes, f"last {value:.3g}")

    last = ", ".join(f"{curve.last[1]:.3g}" for curve in curves.values())
    return Chart(name, title, f"{shown} over the optimizer steps: {last} at last", draw)


def _at_top_right(axes: Axes, words: str) -> None:
    axes.set_title(words, loc="right", fontweight="bold", color=colour("ink"))


def _draw_curve(axes: Axes, curve: Curve, name: str, limits: tuple[float, float], label: str) -> None:
    """Draw the means, and behind them, pale, the range of the values each represents."""
    low, high = limits
    if curve.least != curve.ys:  # thinned
        least, most = ([min(max(y, low), high) for y in ys] for ys in (curve.least, curve.most))
        axes.fill_between(curve.xs, least, most, color=colour(name), alpha=0.2, lw=0)
    ys = [min(max(y, low), high) for y in curve.ys]  # an outlier goes to the edge, as if it were cut off
    axes.plot(curve.xs, ys, color=colour(name), label=label or None, zorder=4)


def _draw_lost(axes: Axes, lost: Sequence[Step], key: str, limits: tuple[float, float], end: float) -> None:
    """Shade stretches of repeated steps, with their first values."""
    for stretch in _stretches(lost):
        xs, ys = [float(s.global_step) for s in stretch], [s.number(key) for s in stretch]
        words = f"steps {xs[0]:g} to {xs[-1]:g} were taken again"
        tip(axes.axvspan(xs[0] - 0.5, min(xs[-1] + 0.5, end), color=colour("lost"), alpha=0.14, lw=0), words)
        curve = thin(xs, ys)
        shown = [min(max(y, limits[0]), limits[1]) for y in curve.ys]
        axes.plot(curve.xs, shown, color=colour("lost"), lw=5, alpha=0.4, solid_capstyle="butt", zorder=3)
        note(axes, (xs[0] + min(xs[-1], end)) / 2, limits[0], "redone", "lost", xytext=(0, 2))


def _draw_tests(axes: Axes, tests: Mapping[int, Mapping[str, float]]) -> None:
    xs = sorted(tests)
    values = [tests[x]["value"] for x in xs]
    below = [max(0.0, tests[x]["value"] - tests[x]["low"]) for x in xs]
    above = [max(0.0, tests[x]["high"] - tests[x]["value"]) for x in xs]
    how = {"color": colour("save"), "ms": 6, "lw": 1.5, "zorder": 5, "label": "held-out"}
    axes.errorbar(xs, values, yerr=[below, above], fmt="o", clip_on=False, **how)


def _throughput(data: RunData) -> Chart | None:
    has_mfu = _known(data.column("mfu"))
    if not has_mfu and not _known(data.column("tokens_per_second")):
        return None
    unit = "% of dense bf16 peak" if has_mfu else "tokens per second"
    key, factor = ("mfu", 100.0) if has_mfu else ("tokens_per_second", 1.0)
    lines = [
        (name, _by_time(steps, key, factor)) for name, steps in (("useful", data.steps), ("lost", data.lost))
    ]
    known = [factor * value for value in data.column(key) if value is not None and math.isfinite(value)]
    mean = f"mean {short(round(statistics.fmean(known), 1))}"

    def draw(axes: Axes, width: int) -> None:
        high = _limits(lines[0][1], 0.0, ())[1]
        _set_over_time(axes, data, unit, high, width)
        for name, curves in lines:
            for curve in curves:
                _draw_curve(axes, curve, name, (0.0, high), "")
        if width > HALF and data.saves:
            days = [time / DAY for time in data.saves]
            axes.plot(days, [0] * len(days), "^", color=colour("good"), ms=6, mew=0, clip_on=False, zorder=5)
            note(axes, days[0], 0, "checkpoints", "good", xytext=(0, 7))
        _at_top_right(axes, mean)

    return Chart("throughput", "MFU" if has_mfu else "Throughput", f"{unit} over time: {mean}", draw)


def _by_time(steps: Sequence[Step], key: str, factor: float) -> list[Curve]:
    """Return curves over days, one a stretch of steps: a line would cross the time between attempts."""
    stretches = _stretches([step for step in steps if step.time is not None])
    found = []
    for stretch in stretches:
        values = [None if (value := step.number(key)) is None else factor * value for step in stretch]
        found.append(thin([(step.time or 0.0) / DAY for step in stretch], values, len(steps)))
    return found


def _gpus(data: RunData, name: str, key: str, unit: str, top: float) -> Chart | None:
    series = [each for each in data.gpus if each.segments]
    stretches = gpu_range(series, key)
    if not stretches:
        return None
    highest = max(y for _, _, _, most in stretches for y in most)
    count = f"{len(series)} GPU{'s' * (len(series) != 1)}"
    many = ": median and range" if len(series) > 1 else ""

    def draw(axes: Axes, width: int) -> None:
        _set_over_time(axes, data, unit, max(top, highest, 1.0) * 1.12, width)
        for xs, least, median, most in stretches:
            days = [x / DAY for x in xs]
            axes.fill_between(days, least, most, color=colour("save"), alpha=0.2, lw=0)
            axes.plot(days, median, color=colour("save"), lw=1.4, zorder=4)

    return Chart(name, f"{name.capitalize()}, {count}{many}", f"{unit}, {count}{many}", draw)


def _set_over_time(axes: Axes, data: RunData, unit: str, high: float, width: int) -> None:
    """Set the axes of a chart over time, and shade the attempts."""
    moments = [t for a in data.attempts for t in (a.attempt.start, a.end)]
    moments += [step.time for step in data.steps if step.time]
    for segments in (each.segments for each in data.gpus if each.segments):
        moments += [segments[0][0].time, segments[-1][-1].time]
    begin, end = min(moments), max(*moments, min(moments) + 1)
    time_axis(axes, begin, end, width)
    number_axis(axes.yaxis, 0, high, 4)
    axes.set_title(unit)
    bands = [(each.attempt.start / DAY, each.end / DAY, _name(each)) for each in data.attempts]
    _shade(axes, bands, begin / DAY, end / DAY, width)


def _shade(axes: Axes, bands: Bands, begin: float, end: float, width: int) -> None:
    """Shade the attempts alternately, named if there is room; gaps are time in the queue."""
    if len(bands) < 2:
        return
    size = 0.86 * width / max(end - begin, 1e-9)
    has_room = all(len(name) <= (right - left) * size / 6.8 for left, right, name in bands)
    for i, (left, right, name) in enumerate(bands):
        shade = axes.axvspan(
            max(left, begin), min(right, end), color=colour(("band", "band2")[i % 2]), lw=0, zorder=0
        )
        tip(shade, name)
        words = name if has_room else name.partition(" ")[0]  # all alike
        if len(words) <= (right - left) * size / 6.8:
            how = {"xycoords": ("data", "axes fraction"), "va": "top", "xytext": (0, -3)}
            note(axes, (left + right) / 2, 1.0, words, "muted", **how)


def _step_bands(attempts: Sequence[AttemptSummary]) -> Bands:
    """Return bands from an attempt's first step to that of the next one that took any."""
    taken = [(each, each.attempt.first_step) for each in attempts if each.attempt.first_step is not None]
    found = []
    for i, (each, first) in enumerate(taken):
        end = taken[i + 1][1] - 1 if i + 1 < len(taken) else each.attempt.last_step
        if end is not None and end >= first:
            found.append((first - 0.5, end + 0.5, _name(each)))
    return found


def _name(each: AttemptSummary) -> str:
    return f"#{each.attempt.attempt} {each.cause.replace('_', ' ')}"


def _limits(curves: Any, floor: float | None, others: Sequence[float]) -> tuple[float, float]:
    """Return limits of the y axis, with room for the attempts' names; a few outliers do not widen it."""
    known = sorted(y for curve in curves for y in curve.ys if math.isfinite(y))
    low, usual, high = known[0], known[int(0.99 * len(known))], known[-1]
    high = max([high if high - low <= 5 * (usual - low) else usual, *others])
    low = low if floor is None else min(floor, low)
    if floor is not None:
        return low, high + 0.2 * ((high - low) or 1.0)
    least = max(_FLATTEST * max(abs(low), abs(high)), 1e-4)  # less would show rounding as a curve
    if high - low < least:
        low, high = (low + high - least) / 2, (low + high + least) / 2
    return low - 0.06 * (high - low), high + 0.2 * (high - low)


def _stretches(steps: Sequence[Step]) -> list[list[Step]]:
    """Group consecutive steps of one attempt."""
    found: list[list[Step]] = []
    for step in sorted(steps, key=lambda s: (s.attempt, s.global_step)):
        last = found[-1][-1] if found else None
        if last is not None and (last.attempt, last.global_step + 1) == (step.attempt, step.global_step):
            found[-1].append(step)
        else:
            found.append([step])
    return found


def _known(values: Sequence[float | None]) -> bool:
    return any(value is not None and math.isfinite(value) for value in values)
