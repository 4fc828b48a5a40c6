"""Long series made short enough for a page: means over stretches, and the range over many GPUs."""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from r1hpc.telemetry.gpu_series import GpuSeries
from r1hpc.telemetry.metrics import Step

_MOST_POINTS = 240
_REWARDS = ("reward", "reward_mean", "mean_reward")


@dataclass(frozen=True)
class Curve:
    """Points of one line; a NaN interrupts it."""

    xs: list[float]
    ys: list[float]

    @property
    def finite(self) -> list[float]:
        return [y for y in self.ys if math.isfinite(y)]


@dataclass(frozen=True)
class Band:
    """Median and range over many lines, in stretches without a gap."""

    parts: list[tuple[list[float], list[float], list[float], list[float]]]
    """(xs, least, median, most) of each stretch."""

    @property
    def top(self) -> float:
        return max((y for part in self.parts for y in part[3]), default=0.0)


def thin(xs: Sequence[float], ys: Sequence[float | None], most: int = _MOST_POINTS) -> Curve:
    """At most about `most` points, each the mean of those it stands for."""
    width = max(1, math.ceil(len(xs) / most))
    columns: tuple[list[float], list[float]] = ([], [])
    for i in range(0, len(xs), width):
        known = [y for y in ys[i : i + width] if y is not None and math.isfinite(y)]
        columns[0].append(statistics.fmean(xs[i : i + width]))
        columns[1].append(statistics.fmean(known) if known else math.nan)
    return Curve(*columns)


def by_time(steps: Iterable[Step], values: Sequence[float | None]) -> Curve:
    """Values over wall time, interrupted where an attempt ended."""
    xs: list[float] = []
    ys: list[float | None] = []
    attempt = None
    for step, value in zip(steps, values, strict=True):
        if step.time is None:
            continue
        if attempt is not None and step.attempt != attempt:
            xs.append(xs[-1])
            ys.append(None)
        attempt = step.attempt
        xs.append(step.time)
        ys.append(value)
    if len(xs) <= _MOST_POINTS:
        return Curve(xs, [math.nan if y is None else y for y in ys])
    return thin(xs, ys)


def rewards(steps: Sequence[Step]) -> list[float | None]:
    """The mean reward of each step; empty where the stage has none."""
    keys = [key for key in _REWARDS if any((step.extra or {}).get(key) is not None for step in steps)]
    return [step.value(keys[0]) for step in steps] if keys else []


def gpu_band(series: Sequence[GpuSeries], field: str) -> Band:
    """One field of telemetry.gpu_series.Point over all GPUs, by stretches of time."""
    points = [p for each in series for segment in each.segments for p in segment]
    if not points:
        return Band([])
    begin, end = min(p.time for p in points), max(p.time for p in points)
    longest = max(len(segment) for each in series for segment in each.segments)
    step = max((end - begin) / _MOST_POINTS, (end - begin) / max(1, longest), 1.0)
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
    return Band(parts)
