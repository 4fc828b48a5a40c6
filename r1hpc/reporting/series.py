"""Long series made short enough to draw: means over stretches, and ranges over them or over many GPUs."""

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from r1hpc.telemetry.gpu_series import GpuSeries

_MOST_POINTS = 240


@dataclass(frozen=True)
class Curve:
    """Points of one line, with the range of the values that each stands for; a NaN interrupts it."""

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
    """Means of several values each, about _MOST_POINTS of them for `num_all` values in several lines."""
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
    """One field of telemetry.gpu_series.Point over all GPUs, at about `most` times, by stretches of time."""
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
