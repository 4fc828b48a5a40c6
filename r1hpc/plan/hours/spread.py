"""Describe an uncertain amount by its P10, P50 and P90, and forecast GPU-hours still to be spent.

A spread is log-normal with a separate width on either side of the median. A sum uses a fixed set of samples,
so that the same jobs give the same forecast.
"""

import math
import random
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from r1hpc.base.records import mistake
from r1hpc.base.units import amount

NORMAL = statistics.NormalDist()
Z90 = NORMAL.inv_cdf(0.9)
TYPICAL_FACTOR = 1.47
"""P90/P50 of a run without an estimate: the 80 % interval of whole-run MFU over the published A100 runs,
leaving their own family out, is a factor 2.16 wide (research/estimator/scores.md)."""
CORRELATION = 0.5
"""Between the logarithms of two similar estimates: an assumption. At 0 the errors of many runs would cancel,
at 1 none would; one estimator on one cluster errs partly in one direction."""
_SAMPLES = 2000
_MANY = 12
"""From so many on, spreads of one shape are drawn together: their sum is close to normal."""
_OWN = tuple(1.084 * NORMAL.inv_cdf((i + 0.5) / 8) for i in range(8))
"""Eight points that stand for a normal distribution: 1.084 gives them its variance."""
_TAIL = 0.99
"""Beyond this quantile P10, P50 and P90 of an estimate do not show how far a run can miss it."""


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


NOTHING = Spread(0.0, 0.0, 0.0)


def around(hours: float, factor: float = TYPICAL_FACTOR) -> Spread:
    """Return a median with the width of a run without any other information."""
    return Spread(hours / factor, hours, hours * factor)


def until_limit(most: float) -> Spread:
    """Forecast a job known only by its time limit: it ends anywhere before it, all times equally likely."""
    return Spread(0.1 * most, 0.5 * most, 0.9 * most)


def remaining(estimate: Spread, used: float) -> Spread:
    """Forecast the rest of a run that has used part of its estimate and is not over.

    The estimate given that it is more than `used`. In its last hundredth the estimate no longer describes the
    run. There a tail without a scale of its own takes over, which grows with what was used.
    """
    passed = estimate.chance_below(used)
    if passed <= _TAIL:
        levels = (passed + (1 - passed) * share for share in (0.1, 0.5, 0.9))
        return Spread(*(max(0.0, estimate.at(NORMAL.inv_cdf(level)) - used) for level in levels))
    # A Pareto distribution with the slope that the estimate has at _TAIL. An estimate that was so wrong
    # counts as no narrower than that of a run without an estimate.
    side = max(TYPICAL_FACTOR, estimate.p90 / estimate.p50 if estimate.p50 > 0 else 0.0)
    index = NORMAL.pdf(NORMAL.inv_cdf(_TAIL)) / (1 - _TAIL) * Z90 / math.log(side)
    return Spread(*(used * ((1 - share) ** (-1 / index) - 1) for share in (0.1, 0.5, 0.9)))


def by_progress(used: float, share_done: float) -> Spread:
    """Forecast the rest of a run by the share of its steps that is done, waste included.

    The width shrinks with what is uncertain: TYPICAL_FACTOR^(1 - share_done).
    """
    rest = used * (1 - share_done) / share_done
    return around(rest, TYPICAL_FACTOR ** (1 - share_done))


def total(spreads: Sequence[Spread], correlation: float = CORRELATION) -> Spread:
    """Return the quantiles of the sum; a single spread keeps its own.

    Each is drawn at z = sqrt(correlation) x shared + sqrt(1 - correlation) x own. Of many spreads that differ
    only in scale the sum is drawn: normal around its mean, both moments given `shared`.
    """
    known = [spread for spread in spreads if spread.p90 > 0]
    if len(known) < 2:
        return known[0] if known else NOTHING
    together, alone = math.sqrt(correlation), math.sqrt(1 - correlation)
    alike: dict[Spread, list[float]] = defaultdict(list)
    for spread in known:
        scale = spread.p50 or spread.p90
        shape = Spread(*(round(hours / scale, 9) for hours in (spread.p10, spread.p50, spread.p90)))
        alike[shape].append(scale)
    shared, sums, number = _draws(0), [0.0] * _SAMPLES, 0
    for shape, scales in alike.items():
        if len(scales) < _MANY:
            for scale in scales:
                number += 1
                for i, own in enumerate(_draws(number)):
                    sums[i] += scale * shape.at(together * shared[i] + alone * own)
            continue
        number += 1
        scale, width = math.fsum(scales), math.hypot(*scales)
        for i, own in enumerate(_draws(number)):
            values = [shape.at(together * shared[i] + alone * z) for z in _OWN]
            mean = sum(values) / len(values)
            deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
            sums[i] += max(0.0, scale * mean + width * deviation * own)
    sums.sort()
    return Spread(*(sums[int(share * _SAMPLES)] for share in (0.1, 0.5, 0.9)))


@lru_cache(maxsize=256)
def _draws(number: int) -> tuple[float, ...]:
    """Return normal values spread evenly over the distribution, in their own order (a Latin hypercube): they
    give steadier quantiles of a sum than random values."""
    values = [NORMAL.inv_cdf((i + 0.5) / _SAMPLES) for i in range(_SAMPLES)]
    random.Random(number).shuffle(values)
    return tuple(values)
