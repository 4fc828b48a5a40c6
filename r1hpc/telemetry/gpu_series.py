"""metrics/gpu-<node>.jsonl as a short series for each GPU, for drawing. A week of seconds stays small.

telemetry.gpu_history reads them, and keeps the folds as they are here: what changes in one of them, or in how
it thins, is another gpu_history.VERSION.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from r1hpc.base.units import GIB

_MOST_POINTS = 1500


class Point(NamedTuple):
    """One reading, or the mean of several in a row; nan where nothing was read."""

    time: float
    utilization_percent: float
    power_w: float
    memory_gib: float


@dataclass
class GpuSeries:
    """Readings of one GPU over time, one segment for each attempt, halved whenever there are too many."""

    node: str
    name: str
    source: str | None = None
    segments: list[list[Point]] = field(default_factory=list)
    attempt: int | None = None
    """Whose readings the last segment has."""
    stride: int = 1
    """How many readings a point stands for."""
    pending: list[Point] = field(default_factory=list)
    """Those of the next point."""

    @staticmethod
    def restored(kept: dict[str, Any]) -> "GpuSeries":
        """From its fields, as JSON holds them."""
        segments = [list(map(Point._make, segment)) for segment in kept["segments"]]
        pending = list(map(Point._make, kept["pending"]))
        return GpuSeries(**{**kept, "segments": segments, "pending": pending})

    @property
    def first_time(self) -> float:
        return self.segments[0][0].time

    @property
    def last_time(self) -> float:
        return self.segments[-1][-1].time

    def add(self, attempt: int | None, point: Point) -> None:
        """Points come in order of time; those of two attempts are never averaged together."""
        if not self.segments or attempt != self.attempt:
            self.segments.append([point])
            self.attempt, self.pending = attempt, []
            return
        self.pending.append(point)
        if len(self.pending) == self.stride:
            self.segments[-1].append(_mean(self.pending))
            self.pending = []
        if sum(map(len, self.segments)) > max(_MOST_POINTS, 4 * len(self.segments)):
            self.segments = [
                [_mean(segment[i : i + 2]) for i in range(0, len(segment), 2)] for segment in self.segments
            ]
            self.stride *= 2


@dataclass
class NodeSeries:
    """Lines of one file, folded one by one: add(record)."""

    node: str
    """Whose file it is, for lines that do not say it."""
    index: dict[str, int | None] = field(default_factory=dict)
    """The numbers of the GPUs on their node."""
    gpus: dict[str, GpuSeries] = field(default_factory=dict)
    """By node and uuid."""

    @staticmethod
    def restored(kept: dict[str, Any]) -> "NodeSeries":
        """From its fields, as JSON holds them."""
        gpus = {key: GpuSeries.restored(series) for key, series in kept["gpus"].items()}
        return NodeSeries(**{**kept, "gpus": gpus})

    def add(self, record: dict[str, Any]) -> None:
        """A line that has the shape of its kind (lines.gpu_line)."""
        if record.get("event") == "devices":
            self.index |= {gpu["uuid"]: gpu.get("index") for gpu in record["gpus"]}
        elif record.get("event") != "no_driver":
            self._tick(record)

    def _tick(self, record: dict[str, Any]) -> None:
        node, at = str(record.get("node", self.node)), float(record["time"])
        for gpu in record["gpus"]:
            series = self._series(node, gpu["uuid"])
            series.source = "stub" if series.source == "stub" else record.get("source")
            memory = gpu.get("memory_used_bytes")
            point = Point(
                at,
                _number(gpu.get("gpu_utilization_percent")),
                _number(gpu.get("power_w")),
                math.nan if memory is None else memory / GIB,
            )
            series.add(record.get("attempt"), point)

    def _series(self, node: str, uuid: str) -> GpuSeries:
        key = f"{node} {uuid}"
        if key not in self.gpus:
            number = self.index.get(uuid)
            self.gpus[key] = GpuSeries(node, f"{node} GPU {uuid[:12] if number is None else number}")
        return self.gpus[key]


def _mean(points: Sequence[Point]) -> Point:
    return Point(*(math.fsum(column) / len(points) for column in zip(*points, strict=True)))


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
