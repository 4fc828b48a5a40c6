"""Fold the readings of a GPU into a few numbers, for reports. Needs no NVML.

telemetry.gpu.history keeps these folds: raise its VERSION when a fold changes.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

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
        """Restore it from its fields in JSON."""
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
