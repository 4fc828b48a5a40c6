"""Describe an uncertain amount by its P10, P50 and P90.

It is log-normal with a separate width on either side of the median.
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from r1hpc.base.records import mistake
from r1hpc.base.units import amount

NORMAL = statistics.NormalDist()
Z90 = NORMAL.inv_cdf(0.9)


@dataclass(frozen=True)
class Spread:
    """Quantiles, mostly of GPU-hours."""

    p10: float
    p50: float
    p90: float

    def __post_init__(self) -> None:
        assert 0 <= self.p10 <= self.p50 <= self.p90 < math.inf, f"not a spread: {self}"

    def __add__(self, other: "Spread | float") -> "Spread":
        """Return the sum with a certain or an independent amount: medians add, widths by their squares.

        >>> Spread(7, 10, 16) + Spread(1, 5, 13)
        Spread(p10=10.0, p50=15, p90=25.0)
        """
        if not isinstance(other, Spread):
            return Spread(self.p10 + other, self.p50 + other, self.p90 + other)
        below = math.hypot(self.p50 - self.p10, other.p50 - other.p10)
        middle = self.p50 + other.p50
        above = math.hypot(self.p90 - self.p50, other.p90 - other.p50)
        return Spread(middle - below, middle, middle + above)

    def __mul__(self, factor: float) -> "Spread":
        return Spread(self.p10 * factor, self.p50 * factor, self.p90 * factor)

    def at(self, z: float) -> float:
        """Return the value `z` standard deviations from the median."""
        if self.p50 <= 0:
            return self.p90 * max(0.0, z) / Z90
        if z >= 0:
            return float(self.p50 * (self.p90 / self.p50) ** (z / Z90))
        return float(self.p50 * (max(self.p10, 1e-9 * self.p50) / self.p50) ** (-z / Z90))

    def chance_below(self, amount: float) -> float:
        """Return the probability that it is at most `amount`."""
        if amount <= 0 or self.p50 <= 0:
            return 0.0 if amount < self.p50 else 1.0
        side = self.p90 / self.p50 if amount >= self.p50 else self.p50 / max(self.p10, 1e-9 * self.p50)
        if side <= 1:
            return 1.0 if amount >= self.p50 else 0.0
        return NORMAL.cdf(math.log(amount / self.p50) / math.log(side) * Z90)

    def text(self, unit: str) -> str:
        """Format as `230 GPU-hours (P10 150, P90 340)`."""
        return f"{amount(self.p50)} {unit} (P10 {amount(self.p10)}, P90 {amount(self.p90)})"

    def to_json(self) -> dict[str, float]:
        return asdict(self)

    @staticmethod
    def of_json(value: Mapping[str, Any]) -> "Spread":
        """Parse the result of `to_json`. Raises KeyError, TypeError, ValueError or AssertionError."""
        return Spread(*(float(value[name]) for name in ("p10", "p50", "p90")))

    @staticmethod
    def read(value: Any) -> "Spread | None":
        """Read the result of `to_json` from a file's value; None if it is something else."""
        try:
            return Spread.of_json(value) if mistake(value, Spread) is None else None
        except AssertionError:
            return None

    @staticmethod
    def log_normal(median: float, log_sd: float) -> "Spread":
        """Make it from a median and a standard deviation of the logarithm."""
        return Spread(median * math.exp(-Z90 * log_sd), median, median * math.exp(Z90 * log_sd))
