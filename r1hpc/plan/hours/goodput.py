"""Estimate goodput, the part of the allocated time in which a run progresses, and the node-hours of CPU runs.

    rates = FailureRates(gpu_hours_per_failure=50_000)
    overhead(rates, num_gpus=384, save_time_s=40).goodput      # 0.97
    cpu_node_hours(plan)     # Spread(0.002, 0.006, 0.019), or None if FLOPs are unknown

Goodput is separate from MFU. Failures and preemptions strike at random with a mean time M between them; a
save costs C and a restart R. Young (CACM 17(9), 1974) saves every sqrt(2 C M); Daly (FGCS 22(3), 2006,
equation 37) adds two terms. With intervals W of work the expected time is Daly's equation 13, exact for
exponential times between failures: M e^(R/M) (e^((W + C)/M) - 1) for each interval. The defaults document
their assumptions; a site with its own rates should give them.

Nobody publishes CPU runs. Our numbers for them come from eleven runs of jobs/smoke.yaml and the stages of
jobs/r1.yaml: 0.1 to 0.4 M parameters and once 26 M, one core per rank, on two shared x86 cores with a local
disk, November 2026. Other cores, more of them per rank, larger models and network file systems may be several
times off in either direction: the interval shows that, and the site's first runs replace it.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from r1hpc.base.errors import UsageError
from r1hpc.plan.hours.quantiles import Spread
from r1hpc.plan.save_time import optimal_save_interval_s

if TYPE_CHECKING:  # estimate --help loads this module
    from r1hpc.plan.run import RunPlan

GPU_HOURS_PER_FAILURE = 50_000.0
"""BLOOM 64,500 (one failure a week on 384), Llama 3 50,700 (419 unexpected in 54 days on 16,384). OPT was
worse: 11,900 (about two hosts a day on 992 GPUs)."""
RESTART_S = 900.0
"""Assumed: noticed, requeued, started, compiled, loaded."""
SAVE_S = 60.0
"""Assumed if the checkpoint's size is unknown; BLOOM wrote 2.3 TB in 40 s."""
_LONGEST_EXPONENT = 50.0
CPU_PRIOR = 3
"""Version of the numbers below for CPU runs: ratios to estimates of another version correct nothing."""
STARTUP_S = 10.0
"""CPU runs: from the allocation to the first step, and from the last step to the end. Measured: 4 to 14 s,
of which 3 to 9 until the first step, mostly importing torch."""
FLOPS_PER_RANK = 4e10
MOST_FLOPS_PER_RANK = 1.3e11
"""Model FLOPs per second of one rank with one core, for a model of 0.4 M parameters and one of 135 M, whose
matrices are large enough to multiply fast; between them by the logarithm of the parameters. Measured: 2.8e10
to 5.5e10 for the small models, 1.3e11 for one of 26 M, and 6e10 for it beside other work. All stages of
jobs/smollm2.yaml (135 M) took 0.63 node-hours; this gives 0.95, since answers are shorter than allowed."""
_SMALL, _LARGE = 4e5, 1.35e8
SPREAD = 3.0
"""P90/P50 and P50/P10 of CPU runs. Ours took 0.56 to 1.44 times the P50; the rest is for other machines."""


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
    young_interval_s: float
    mtbf_s: float
    """Mean seconds between unwarned interruptions."""
    interruptions_per_day: float


def mtbf_s(rates: FailureRates, num_gpus: int) -> float:
    """Return the mean seconds between failures, the interruptions that lose work."""
    return 1 / (num_gpus / rates.gpu_hours_per_failure / 3600)


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
    mean = mtbf_s(rates, num_gpus)
    best = daly_interval_s(save_time_s, mean)
    interval = save_interval_s or best
    preempted = rates.preemptions_per_day * (rates.restart_s + save_time_s) / 86400
    return Overhead(
        goodput=expected_goodput(interval, save_time_s, mean, rates.restart_s) * max(0.0, 1 - preempted),
        save_interval_s=interval,
        optimal_interval_s=best,
        young_interval_s=optimal_save_interval_s(save_time_s, mean),
        mtbf_s=mean,
        interruptions_per_day=86400 / mean + rates.preemptions_per_day,
    )


def cpu_node_hours(plan: "RunPlan") -> Spread | None:
    """Return the node-hours for all steps of the plan in one attempt."""
    if plan.flops_per_token is None:
        return None
    rate = plan.topology.world_size * flops_per_rank(plan.num_parameters or 0)
    work_s = plan.total_tokens * plan.flops_per_token / rate
    hours = plan.topology.num_nodes * (STARTUP_S + work_s) / 3600
    return Spread(hours / SPREAD, hours, hours * SPREAD)


def flops_per_rank(num_parameters: float) -> float:
    """Return the model FLOPs per second of one rank, which grow with the model."""
    at = math.log(max(num_parameters, _SMALL) / _SMALL) / math.log(_LARGE / _SMALL)
    return FLOPS_PER_RANK * math.pow(MOST_FLOPS_PER_RANK / FLOPS_PER_RANK, min(1.0, at))
