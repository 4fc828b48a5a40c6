"""metrics/gpu-<node>.jsonl as a short series for each GPU, for drawing. A week of seconds stays small."""

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from r1hpc.base.files import iter_records
from r1hpc.base.shapes import mistake
from r1hpc.base.units import GIB
from r1hpc.telemetry.lines import gpu_line

_MOST_POINTS = 1500


class Point(NamedTuple):
    """One reading, or the mean of several in a row; nan where nothing was read."""

    time: float
    utilization_percent: float
    power_w: float
    memory_gib: float


class GpuSeries:
    """Readings of one GPU over time, one segment for each attempt, halved whenever there are too many."""

    def __init__(self, node: str, name: str) -> None:
        self.node, self.name = node, name
        self.source: str | None = None
        self.segments: list[list[Point]] = []
        self._attempt: Any = None
        self._stride = 1
        self._pending: list[Point] = []

    @property
    def first_time(self) -> float:
        return self.segments[0][0].time

    @property
    def last_time(self) -> float:
        return self.segments[-1][-1].time

    def add(self, attempt: Any, point: Point) -> None:
        """Points come in order of time; those of two attempts are never averaged together."""
        if not self.segments or attempt != self._attempt:
            self.segments.append([point])
            self._attempt, self._pending = attempt, []
            return
        self._pending.append(point)
        if len(self._pending) == self._stride:
            self.segments[-1].append(_mean(self._pending))
            self._pending = []
        if sum(map(len, self.segments)) > max(_MOST_POINTS, 4 * len(self.segments)):
            self.segments = [
                [_mean(segment[i : i + 2]) for i in range(0, len(segment), 2)] for segment in self.segments
            ]
            self._stride *= 2


def read_gpu_series(paths: Iterable[Path]) -> list[GpuSeries]:
    """One series for each GPU in the files that telemetry.sampler wrote; none without a driver."""
    found: dict[tuple[str, str], GpuSeries] = {}
    for path in paths:
        index: dict[str, Any] = {}
        for record in iter_records(path):
            if mistake(record, gpu_line(record)) is not None:
                continue
            node = str(record.get("node", path.stem.removeprefix("gpu-")))
            if record.get("event") == "devices":
                index |= {gpu["uuid"]: gpu.get("index") for gpu in record.get("gpus", [])}
            elif "gpus" in record and "time" in record:
                _add_tick(found, node, index, record)
    return list(found.values())


def _add_tick(
    found: dict[tuple[str, str], GpuSeries], node: str, index: dict[str, Any], record: dict[str, Any]
) -> None:
    for gpu in record["gpus"]:
        uuid = str(gpu["uuid"])
        number = index.get(uuid)
        name = f"{node} GPU {uuid[:12] if number is None else number}"
        series = found.setdefault((node, uuid), GpuSeries(node, name))
        series.source = "stub" if series.source == "stub" else record.get("source")
        memory = gpu.get("memory_used_bytes")
        point = Point(
            time=float(record["time"]),
            utilization_percent=_number(gpu.get("gpu_utilization_percent")),
            power_w=_number(gpu.get("power_w")),
            memory_gib=math.nan if memory is None else memory / GIB,
        )
        series.add(record.get("attempt"), point)


def _mean(points: Sequence[Point]) -> Point:
    return Point(*(statistics.fmean(column) for column in zip(*points, strict=True)))


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
