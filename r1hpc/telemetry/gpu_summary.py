"""metrics/gpu-<node>.jsonl in a few numbers per GPU, for reports. Needs no NVML.

summarise(run.gpu_metrics("node-1"))["gpus"]["GPU-..."]["mean_power_w"]
"""

from collections import Counter
from pathlib import Path
from typing import Any

from r1hpc.base.files import iter_records
from r1hpc.base.shapes import mistake
from r1hpc.telemetry.lines import gpu_line

_SUMMED_UP = {
    "gpu_utilization_percent": ("mean",),
    "memory_utilization_percent": ("mean",),
    "power_w": ("mean", "max"),
    "memory_used_bytes": ("max",),
    "temperature_c": ("max",),
}
"""Which readings are summed up, and by which attributes of _Series: mean_power_w, max_power_w, ..."""
_BUSY_PERCENT = 99
_LOW_POWER = 0.25
"""Share of the power limit. A collective that hangs reads 100 % at about 70 W of 400 W (NVIDIA/nccl#968)."""


def summarise(path: Path) -> dict[str, Any]:
    """Means, maxima and energy of each GPU over all ticks. Memory does not grow.

    Returns:
        {node, source, driver, attempts, starts, ticks, first_time, last_time, message, gpus: {uuid: {...}}}.
        `source` is "stub" if any start was on the test library, None without a driver; `message` is why
        there are no readings. Each GPU: `ticks`, index, name, memory_total_bytes, power_limit_w,
        mean_gpu_utilization_percent, mean_memory_utilization_percent, mean_power_w, max_power_w,
        max_memory_used_bytes, max_temperature_c, energy_j, energy_source ("counter", or "power" where the
        energy is mean power over time), energy_resets, busy_low_power_fraction (ticks at 100 % and under
        a quarter of the power limit: most likely a hang), throttle_fraction {reason: of ticks},
        ecc_corrected_volatile, ecc_uncorrected_volatile (the last), errors {text: ticks}. None: never read.
    """
    summary = _Summary()
    for record in iter_records(path):
        if mistake(record, gpu_line(record)) is None:
            summary.add(record)
    return summary.result()


class _Summary:
    def __init__(self) -> None:
        self._about: dict[str, Any] = dict.fromkeys(("node", "source", "driver", "message"))
        self._attempts: set[int] = set()
        self._starts = 0
        self._ticks = 0
        self._first_time: float | None = None
        self._last_time: float | None = None
        self._gpus: dict[str, GpuFold] = {}

    def add(self, record: dict[str, Any]) -> None:
        self._attempts.add(record.get("attempt", 0))
        self._about["node"] = record.get("node")
        if record.get("event") == "devices":
            self._start(record)
        elif record.get("event") == "no_driver":
            self._about["message"] = record.get("message")
        elif "gpus" in record:
            self._tick(record)

    def _start(self, record: dict[str, Any]) -> None:
        self._starts += 1
        self._about["driver"] = record.get("driver")
        if self._about["source"] != "stub":
            self._about["source"] = record.get("source")
        for static in record["gpus"]:
            self._gpu(static["uuid"]).start(static, record.get("period_s") or 1.0)

    def _tick(self, record: dict[str, Any]) -> None:
        self._ticks += 1
        self._last_time = record["time"]
        if self._first_time is None:
            self._first_time = self._last_time
        for reading in record["gpus"]:
            self._gpu(reading["uuid"]).add(record["time"], reading)

    def _gpu(self, uuid: str) -> "GpuFold":
        return self._gpus.setdefault(uuid, GpuFold())

    def result(self) -> dict[str, Any]:
        return {
            **self._about,
            "attempts": sorted(self._attempts),
            "starts": self._starts,
            "ticks": self._ticks,
            "first_time": self._first_time,
            "last_time": self._last_time,
            "gpus": {uuid: gpu.result() for uuid, gpu in self._gpus.items()},
        }


class GpuFold:
    """Readings of one GPU, folded one by one: start(static, period_s), add(time, reading), result()."""

    def __init__(self) -> None:
        self._static: dict[str, Any] = {}
        self._ticks = 0
        self._series = {key: _Series() for key in _SUMMED_UP}
        self._energy = _Energy()
        self._busy_low_power = 0
        self._throttled: Counter[str] = Counter()
        self._throttle_ticks = 0
        self._ecc: dict[str, int | None] = dict.fromkeys(
            ("ecc_corrected_volatile", "ecc_uncorrected_volatile")
        )
        self._errors: Counter[str] = Counter()

    def start(self, static: dict[str, Any], period_s: float) -> None:
        self._static = static
        self._energy.start(period_s)

    def add(self, at: float, reading: dict[str, Any]) -> None:
        self._ticks += 1
        for key, series in self._series.items():
            series.add(reading.get(key))
        utilization, power = reading.get("gpu_utilization_percent"), reading.get("power_w")
        self._energy.add(at, reading.get("energy_j"), power)
        self._busy_low_power += self._looks_hung(utilization, power)
        self._add_events(reading)

    def _add_events(self, reading: dict[str, Any]) -> None:
        reasons = reading.get("throttle_reasons")
        if reasons is not None:
            self._throttle_ticks += 1
            self._throttled.update(reasons)
        for key in self._ecc:
            self._ecc[key] = self._ecc[key] if reading.get(key) is None else reading[key]
        if reading.get("error"):
            self._errors[reading["error"]] += 1

    def _looks_hung(self, utilization: float | None, power: float | None) -> bool:
        limit = self._static.get("power_limit_w")
        if utilization is None or power is None or limit is None:
            return False
        return utilization >= _BUSY_PERCENT and power < _LOW_POWER * limit

    def result(self) -> dict[str, Any]:
        static = {
            key: self._static.get(key) for key in ("index", "name", "memory_total_bytes", "power_limit_w")
        }
        return {
            **static,
            "ticks": self._ticks,
            **{
                f"{kind}_{key}": getattr(self._series[key], kind)
                for key, kinds in _SUMMED_UP.items()
                for kind in kinds
            },
            **self._energy.result(),
            "busy_low_power_fraction": self._busy_low_power / self._ticks if self._ticks else None,
            "throttle_fraction": {
                reason: count / self._throttle_ticks for reason, count in sorted(self._throttled.items())
            },
            **self._ecc,
            "errors": dict(self._errors),
        }


class _Series:
    """Mean and maximum of the numbers that were there."""

    def __init__(self) -> None:
        self._sum = 0.0
        self._count = 0
        self.max: float | None = None

    def add(self, value: float | None) -> None:
        if value is not None:
            self._sum += value
            self._count += 1
            self.max = value if self.max is None else max(self.max, value)

    @property
    def mean(self) -> float | None:
        return self._sum / self._count if self._count else None


class _Energy:
    """Joules between the first and the last tick of each start, summed over the starts.

    From the counter: its increases; a counter that fell began again at 0 when the driver was loaded, so its
    new value is what is known to have been spent. From power: trapezoids between ticks, none across a gap
    of more than three periods (a suspended job).
    """

    def __init__(self) -> None:
        self._counted = 0.0
        self._integrated = 0.0
        self._has_counter = False
        self._has_power = False
        self._resets = 0
        self.start(1.0)

    def start(self, period_s: float) -> None:
        self._longest_s = 3 * period_s
        self._last_counter: float | None = None
        self._last_power: tuple[float, float] | None = None

    def add(self, at: float, counter: float | None, power: float | None) -> None:
        if counter is not None:
            self._count(counter)
        if power is not None:
            self._integrate(at, power)

    def _count(self, counter: float) -> None:
        if self._last_counter is not None:
            fell = counter < self._last_counter
            self._resets += fell
            self._counted += counter if fell else counter - self._last_counter
        self._has_counter = True
        self._last_counter = counter

    def _integrate(self, at: float, power: float) -> None:
        if self._last_power is not None and 0 < at - self._last_power[0] <= self._longest_s:
            self._integrated += (at - self._last_power[0]) * (power + self._last_power[1]) / 2
        self._has_power = True
        self._last_power = (at, power)

    def result(self) -> dict[str, Any]:
        source = "counter" if self._has_counter else "power" if self._has_power else None
        energy = {"counter": self._counted, "power": self._integrated, None: None}[source]
        return {"energy_j": energy, "energy_source": source, "energy_resets": self._resets}
