"""Forecast GPU-hours still to be spent, as P10, P50 and P90, for one run or several together.

A spread is log-normal with its own width on either side of the median, like the estimator's. A sum uses a
fixed set of samples, so that the same jobs give the same forecast.
"""

import math
import random
from collections.abc import Sequence
from functools import lru_cache

from r1hpc.plan.hours.quantiles import NORMAL, Z90
from r1hpc.plan.hours.quantiles import Spread as Spread

TYPICAL_FACTOR = 1.47
"""P90/P50 of a run without an estimate: the 80 % interval of whole-run MFU over the published A100 runs,
leaving their own family out, is a factor 2.16 wide (research/estimator/scores.md)."""
CORRELATION = 0.5
"""Between the logarithms of two similar estimates: an assumption. At 0 the errors of many runs would cancel,
at 1 none would; one estimator on one cluster errs partly in one direction."""
_SAMPLES = 2000
_TAIL = 0.99
"""Beyond this quantile P10, P50 and P90 of an estimate do not show how far a run can miss it."""
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

    Each is drawn at z = sqrt(correlation) x shared + sqrt(1 - correlation) x own.
    """
    known = [spread for spread in spreads if spread.p90 > 0]
    if len(known) < 2:
        return known[0] if known else NOTHING
    together, alone = math.sqrt(correlation), math.sqrt(1 - correlation)
    shared = _draws(0)
    sums = [0.0] * _SAMPLES
    for number, spread in enumerate(known, start=1):
        for i, own in enumerate(_draws(number)):
            sums[i] += spread.at(together * shared[i] + alone * own)
    sums.sort()
    return Spread(*(sums[int(share * _SAMPLES)] for share in (0.1, 0.5, 0.9)))


@lru_cache(maxsize=256)
def _draws(number: int) -> tuple[float, ...]:
    """Return normal values spread evenly over the distribution, in their own order (a Latin hypercube): they
    give steadier quantiles of a sum than random values."""
    values = [NORMAL.inv_cdf((i + 0.5) / _SAMPLES) for i in range(_SAMPLES)]
    random.Random(number).shuffle(values)
    return tuple(values)
