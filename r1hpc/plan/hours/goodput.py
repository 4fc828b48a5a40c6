"""Estimate goodput, the part of the allocated time in which a run progresses.

Goodput is separate from MFU. Failures and preemptions strike at random with a mean time M between them; a
save costs C and a restart R. Young (CACM 17(9), 1974) saves every sqrt(2 C M); Daly (FGCS 22(3), 2006,
equation 37) adds two terms. With intervals W of work the expected time is Daly's equation 13, exact for
exponential times between failures: M e^(R/M) (e^((W + C)/M) - 1) for each interval. The defaults document
their assumptions; a site with its own rates should give them.
"""

import math
from dataclasses import dataclass

from r1hpc.base.errors import UsageError

GPU_HOURS_PER_FAILURE = 50_000.0
"""BLOOM 64,500 (one failure a week on 384), Llama 3 50,700 (419 unexpected in 54 days on 16,384). OPT was
worse: 11,900 (about two hosts a day on 992 GPUs)."""
RESTART_S = 900.0
"""Assumed: noticed, requeued, started, compiled, loaded."""
SAVE_S = 60.0
"""Assumed if the checkpoint's size is unknown; BLOOM wrote 2.3 TB in 40 s."""
_LONGEST_EXPONENT = 50.0


@dataclass(frozen=True)
class FailureRates:
    """The interruptions of a run.

    Preemptions affect the whole job, whatever its size, with a warning: the run saves, and loses the restart
    but no work.
    """

    gpu_hours_per_failure: float = GPU_HOURS_PER_FAILURE
    preemptions_per_day: float = 0.0
    restart_s: float = RESTART_S

    def __post_init__(self) -> None:
        if not self.gpu_hours_per_failure > 0:
            raise UsageError(f"GPU-hours per failure is {self.gpu_hours_per_failure:g}: it must be above 0")
        if not 0 <= self.preemptions_per_day < 1e5:
            raise UsageError(f"preemptions per day is {self.preemptions_per_day:g}: it must be 0 or more")
        if not 0 <= self.restart_s < math.inf:
            raise UsageError(f"restart is {self.restart_s:g} s: it must be 0 or more")


@dataclass(frozen=True)
class Overhead:
    """The cost of failures and saves, as parts of the allocated time."""

    goodput: float
    save_interval_s: float
    """The interval of this goodput: given, or optimal."""
    optimal_interval_s: float
    mtbf_s: float
    """Mean seconds between unwarned interruptions."""
    interruptions_per_day: float


def daly_interval_s(save_time_s: float, mean_s: float) -> float:
    """Return Daly's equation 37; the MTBF itself if a save takes more than twice as long.

    >>> round(daly_interval_s(40, 168 * 3600) / 3600, 2)
    1.92
    """
    if save_time_s >= 2 * mean_s:
        return mean_s
    ratio = save_time_s / (2 * mean_s)
    interval = math.sqrt(2 * save_time_s * mean_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_time_s
    return max(interval, 1.0)


def expected_goodput(interval_s: float, save_time_s: float, mean_s: float, restart_s: float) -> float:
    """Return useful work over expected time, with a save every `interval_s` of work. Daly, equation 13."""
    exponent = (interval_s + save_time_s) / mean_s
    if exponent + restart_s / mean_s > _LONGEST_EXPONENT:
        return 0.0
    return interval_s / (mean_s * math.exp(restart_s / mean_s) * math.expm1(exponent))


def overhead(
    rates: FailureRates, num_gpus: int, save_time_s: float = SAVE_S, save_interval_s: float | None = None
) -> Overhead:
    """Return the goodput of a run on `num_gpus`, with its own save interval or the optimal one."""
    mean = 1 / (num_gpus / rates.gpu_hours_per_failure / 3600)
    best = daly_interval_s(save_time_s, mean)
    interval = save_interval_s or best
    preempted = rates.preemptions_per_day * (rates.restart_s + save_time_s) / 86400
    return Overhead(
        goodput=expected_goodput(interval, save_time_s, mean, rates.restart_s) * max(0.0, 1 - preempted),
        save_interval_s=interval,
        optimal_interval_s=best,
        mtbf_s=mean,
        interruptions_per_day=86400 / mean + rates.preemptions_per_day,
    )
