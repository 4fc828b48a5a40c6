"""Read the GPU readings of a node, as numbers and as short series; parse each line only once.

Eight GPUs write some 60 MB of readings a day. metrics/gpu-<node>.folded keeps the sums so far (the folds)
and where the last report stopped reading. The next report continues from there, also for a live run, and gets
the same figures to the last digit. The file may be removed at any time. It is ignored if it is damaged, of
another version, or if the readings changed in the last 4 KiB before that point. Raise VERSION when a fold
changes.
"""

import contextlib
import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from r1hpc.base.errors import StateError
from r1hpc.base.files import iter_objects, open_plain, parse_json, write_atomic
from r1hpc.base.records import mistake
from r1hpc.base.run_dir import RunDir
from r1hpc.base.units import GIB
from r1hpc.telemetry.records.lines import gpu_line
from r1hpc.telemetry.records.summary_file import Mark, mark_of

_MOST_POINTS = 1500
VERSION = 2
"""Version of the file, and of how the folds count."""
_WORTH_BYTES = 2**18
"""With fewer new bytes than this, reading them again is quicker than writing the folds."""
_SUMMED_UP = {
    "gpu_utilization_percent": ("mean",),
    "memory_utilization_percent": ("mean",),
    "power_w": ("mean", "max"),
    "memory_used_bytes": ("max",),
    "temperature_c": ("max",),
}
"""The summarised readings, and their attributes of _Series: mean_power_w, max_power_w, ..."""
_STATIC = ("index", "name", "memory_total_bytes", "power_limit_w")
_ECC = ("ecc_corrected_volatile", "ecc_uncorrected_volatile")
_BUSY_PERCENT = 99
_LOW_POWER = 0.25
"""Share of the power limit. A collective that hangs reads 100 % at about 70 W of 400 W (NVIDIA/nccl#968)."""


@dataclass
class GpuFold:
    """Readings of one GPU, folded one by one: start(static, period_s), add(time, reading), result()."""

    static: dict[str, Any] = field(default_factory=lambda: dict.fromkeys(_STATIC))
    ticks: int = 0
    series: dict[str, "_Series"] = field(default_factory=lambda: {key: _Series() for key in _SUMMED_UP})
    energy: "_Energy" = field(default_factory=lambda: _Energy())
    busy_low_power: int = 0
    throttled: Counter[str] = field(default_factory=Counter)
    throttle_ticks: int = 0
    ecc: dict[str, int | None] = field(default_factory=lambda: dict.fromkeys(_ECC))
    errors: Counter[str] = field(default_factory=Counter)

    @staticmethod
    def restored(kept: dict[str, Any]) -> "GpuFold":
        parts = {
            "series": {key: _Series(**series) for key, series in kept["series"].items()},
            "energy": _Energy(**kept["energy"]),
            "throttled": Counter(kept["throttled"]),
            "errors": Counter(kept["errors"]),
        }
        return GpuFold(**{**kept, **parts})

    def start(self, static: dict[str, Any], period_s: float) -> None:
        self.static = {key: static.get(key) for key in _STATIC}
        self.energy.start(period_s)

    def add(self, at: float, reading: dict[str, Any]) -> None:
        self.ticks += 1
        for key, series in self.series.items():
            series.add(reading.get(key))
        utilization, power = reading.get("gpu_utilization_percent"), reading.get("power_w")
        self.energy.add(at, reading.get("energy_j"), power)
        limit = self.static["power_limit_w"]
        if utilization is not None and power is not None and limit is not None:
            self.busy_low_power += utilization >= _BUSY_PERCENT and power < _LOW_POWER * limit
        reasons = reading.get("throttle_reasons")
        if reasons is not None:
            self.throttle_ticks += 1
            for reason in reasons:  # a third of the time of Counter.update
                self.throttled[reason] += 1
        for key in self.ecc:
            self.ecc[key] = self.ecc[key] if reading.get(key) is None else reading[key]
        if reading.get("error"):
            self.errors[reading["error"]] += 1

    def result(self) -> dict[str, Any]:
        return {
            **self.static,
            "ticks": self.ticks,
            **{
                f"{kind}_{key}": getattr(self.series[key], kind)
                for key, kinds in _SUMMED_UP.items()
                for kind in kinds
            },
            **self.energy.result(),
            "busy_low_power_fraction": self.busy_low_power / self.ticks if self.ticks else None,
            "throttle_fraction": {
                reason: count / self.throttle_ticks for reason, count in sorted(self.throttled.items())
            },
            **self.ecc,
            "errors": dict(self.errors),
        }


@dataclass
class _Series:
    sum: float = 0.0
    count: int = 0
    max: float | None = None

    def add(self, value: float | None) -> None:
        if value is not None:
            self.sum += value
            self.count += 1
            self.max = value if self.max is None or value > self.max else self.max

    @property
    def mean(self) -> float | None:
        return self.sum / self.count if self.count else None


@dataclass
class _Energy:
    """Joules between the first and the last tick of each start, summed over the starts.

    From the counter: its increases; a counter that fell restarted at 0 when the driver was loaded, so its new
    value is the energy known to be used. From power: trapezoids between ticks, none across a gap of more than
    three periods (a suspended job).
    """

    counted: float = 0.0
    integrated: float = 0.0
    has_counter: bool = False
    has_power: bool = False
    resets: int = 0
    longest_s: float = 3.0
    last_counter: float | None = None
    last_power: tuple[float, float] | None = None

    def start(self, period_s: float) -> None:
        self.longest_s = 3 * period_s
        self.last_counter = None
        self.last_power = None

    def add(self, at: float, counter: float | None, power: float | None) -> None:
        if counter is not None:
            if self.last_counter is not None:
                fell = counter < self.last_counter
                self.resets += fell
                self.counted += counter if fell else counter - self.last_counter
            self.has_counter = True
            self.last_counter = counter
        if power is not None:
            if self.last_power is not None and 0 < at - self.last_power[0] <= self.longest_s:
                self.integrated += (at - self.last_power[0]) * (power + self.last_power[1]) / 2
            self.has_power = True
            self.last_power = (at, power)

    def result(self) -> dict[str, Any]:
        source = "counter" if self.has_counter else "power" if self.has_power else None
        energy = {"counter": self.counted, "power": self.integrated, None: None}[source]
        return {"energy_j": energy, "energy_source": source, "energy_resets": self.resets}


class Point(NamedTuple):
    """One reading, or the mean of several in a row; nan if nothing was read."""

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
    stride: int = 1
    """Number of readings behind a point."""
    pending: list[Point] = field(default_factory=list)

    @staticmethod
    def restored(kept: dict[str, Any]) -> "GpuSeries":
        segments = [list(map(Point._make, segment)) for segment in kept["segments"]]
        pending = list(map(Point._make, kept["pending"]))
        return GpuSeries(**{**kept, "segments": segments, "pending": pending})

    def add(self, attempt: int | None, point: Point) -> None:
        """Add a point. Points come in order of time; those of two attempts are never averaged together."""
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
class GpuHistory:
    """The lines of one node's file, folded one by one: add(record), result(). Memory use stays constant."""

    node: str
    source: str | None = None
    driver: str | None = None
    message: str | None = None
    attempts: set[int] = field(default_factory=set)
    starts: int = 0
    ticks: int = 0
    first_time: float | None = None
    last_time: float | None = None
    gpus: dict[str, GpuFold] = field(default_factory=dict)
    series: dict[str, GpuSeries] = field(default_factory=dict)

    @staticmethod
    def restored(kept: dict[str, Any]) -> "GpuHistory":
        folds = {
            "attempts": set(kept["attempts"]),
            "gpus": {uuid: GpuFold.restored(gpu) for uuid, gpu in kept["gpus"].items()},
            "series": {uuid: GpuSeries.restored(series) for uuid, series in kept["series"].items()},
        }
        return GpuHistory(**{**kept, **folds})

    def add(self, record: dict[str, Any]) -> None:
        """Add a line with the shape of its kind (lines.gpu_line)."""
        self.attempts.add(record.get("attempt", 0))
        self.node = record.get("node") or self.node
        if record.get("event") == "devices":
            self.starts += 1
            self.driver = record.get("driver")
            self.source = "stub" if self.source == "stub" else record.get("source")
            for static in record["gpus"]:
                fold = self.gpus.setdefault(static["uuid"], GpuFold())
                fold.start(static, record.get("period_s") or 1.0)
        elif record.get("event") == "no_driver":
            self.message = record.get("message")
        else:
            self._tick(record)

    def _tick(self, record: dict[str, Any]) -> None:
        self.ticks += 1
        self.last_time = record["time"]
        self.first_time = self.last_time if self.first_time is None else self.first_time
        for reading in record["gpus"]:
            uuid = reading["uuid"]
            fold = self.gpus.setdefault(uuid, GpuFold())
            fold.add(record["time"], reading)
            if uuid not in self.series:
                index = fold.static["index"]
                name = f"{self.node} GPU {uuid[:12] if index is None else index}"
                self.series[uuid] = GpuSeries(self.node, name)
            series = self.series[uuid]
            series.source = "stub" if series.source == "stub" else record.get("source")
            point = Point(
                float(record["time"]),
                _number(reading.get("gpu_utilization_percent")),
                _number(reading.get("power_w")),
                _number(reading.get("memory_used_bytes")) / GIB,
            )
            series.add(record.get("attempt"), point)

    def result(self) -> dict[str, Any]:
        """Return means, maxima and energy of each GPU over all ticks.

        Returns:
            {node, source, driver, attempts, starts, ticks, first_time, last_time, message, gpus}.
            `source` is "stub" if any start was on the test library, None without a driver; `message` is why
            there are no readings. gpus: {uuid: {ticks, index, name, memory_total_bytes, power_limit_w,
            mean_gpu_utilization_percent, mean_memory_utilization_percent, mean_power_w, max_power_w,
            max_memory_used_bytes, max_temperature_c, energy_j, energy_source ("counter", or "power" if the
            energy is mean power over time), energy_resets, busy_low_power_fraction (ticks at 100 % and under
            a quarter of the power limit: most likely a hang), throttle_fraction {reason: of ticks},
            ecc_corrected_volatile, ecc_uncorrected_volatile (the last), errors {text: ticks}}}. None: never
            read.
        """
        kept = {name: value for name, value in vars(self).items() if name != "series"}
        gpus = {uuid: gpu.result() for uuid, gpu in self.gpus.items()}
        return {**kept, "attempts": sorted(self.attempts), "gpus": gpus}


def _mean(points: Sequence[Point]) -> Point:
    return Point(*(math.fsum(column) / len(points) for column in zip(*points, strict=True)))


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def read_gpu_history(path: Path) -> GpuHistory:
    """Return the folds of metrics/gpu-<node>.jsonl; empty ones if there is no such file."""
    history, begin = _kept(path) or (GpuHistory(path.stem.removeprefix("gpu-")), 0)
    end = begin
    for at, record in iter_objects(path, begin):
        if record is not None and mistake(record, gpu_line(record)) is None:
            history.add(record)
            end = at  # the rest may be half written and is read again
    if end - begin >= _WORTH_BYTES and (mark := mark_of(path, end)) is not None:
        body = json.dumps({"mark": mark, "folds": history}, default=_fields).encode()
        with contextlib.suppress(OSError):  # an unwritable folder or a full disk keeps the old file
            write_atomic(folded_beside(path), _head(body) + b"\n" + body)
    return history


def read_gpus(run: RunDir) -> list[GpuHistory]:
    """Return the history of each node that has written any."""
    return [read_gpu_history(path) for path in run.all_gpu_metrics]


def folded_beside(path: Path) -> Path:
    """Return the file that keeps the folds of a node's readings."""
    return path.with_suffix(".folded")


def _kept(path: Path) -> tuple[GpuHistory, int] | None:
    """Return the kept folds, and their position in the readings; None if there are no usable ones."""
    try:
        with open_plain(folded_beside(path)) as file:
            head, _, body = file.read().partition(b"\n")
        if head != _head(body):
            return None
        kept = parse_json(body)
        begin = Mark(*kept["mark"]).offset(path)
        if begin is None:
            return None
        return GpuHistory.restored(kept["folds"]), begin
    except (OSError, StateError, TypeError, KeyError):
        return None


def _head(body: bytes) -> bytes:
    """Return the first line of the file. Its digest detects any change to the rest."""
    return f"r1hpc {VERSION} {hashlib.sha256(body).hexdigest()}".encode()


def _fields(each: Any) -> Any:
    return sorted(each) if isinstance(each, set) else vars(each)
