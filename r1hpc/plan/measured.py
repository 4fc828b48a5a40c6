"""Hours of a run from its own speed: what the steps that were taken say of the steps to come.

found = measured_estimate(rates, num_gpus=64, tokens_done=1e9, total_tokens=1e10, hours_spent=120, useful=0.9)
"""

import math
import statistics
from collections.abc import Sequence

from r1hpc.base.errors import UsageError
from r1hpc.plan.estimate import Estimate, Quantiles

_FEWEST_STEPS = 5
_DRIFT = 0.03
"""Standard deviation of ln(speed) between what was measured and what comes: nodes, neighbours. Assumed."""
_WARM_UP = 0.1
"""The first part of the steps, which compile and fill caches, is left out."""


def measured_estimate(
    rates: Sequence[float],
    *,
    num_gpus: int = 0,
    num_nodes: int = 0,
    tokens_done: float,
    total_tokens: float,
    hours_spent: float,
    useful: float,
) -> Estimate:
    """What the whole run will have cost.

    Args:
        rates: tokens per second of all GPUs, one for each step, in order.
        num_gpus, num_nodes: what it has now; 0 GPUs is a CPU run, told in node-hours.
        hours_spent: GPU-hours, of a CPU run node-hours, of all attempts so far, busy or idle.
        useful: part of them in which steps were taken that lasted.

    Raises:
        UsageError: too few steps to say anything.
    """
    if len(rates) < _FEWEST_STEPS:
        raise UsageError(
            f"--method measured needs at least {_FEWEST_STEPS} steps, and the run has {len(rates)}: let it "
            "run, or take --method flops"
        )
    steady = rates[int(_WARM_UP * len(rates)) :]
    rate = statistics.median(steady)
    log_sd = math.hypot(_DRIFT, _robust_sd([math.log(r) for r in steady]) / math.sqrt(len(steady)))
    width = num_gpus or num_nodes
    left = max(0.0, total_tokens - tokens_done) / rate * width / 3600 / max(useful, 0.05)
    remaining = Quantiles.log_normal(left, math.hypot(log_sd, 0.5 * (1 - min(1.0, useful))))
    hours = remaining + hours_spent
    ideal = Quantiles.log_normal(total_tokens / rate * num_gpus / 3600, log_sd)
    return Estimate(
        method="measured",
        gpu_hours=hours if num_gpus else None,
        node_hours=None if num_gpus else hours,
        ideal_gpu_hours=ideal if num_gpus else None,
        wall_hours={num_gpus: hours * (1 / num_gpus)} if num_gpus else {},
        assumptions={
            "steps_measured": len(rates),
            "tokens_per_second": rate,
            "tokens_done": tokens_done,
            "tokens": total_tokens,
            "num_gpus": num_gpus or None,
            "gpu_hours_spent" if num_gpus else "node_hours_spent": hours_spent,
            "useful_part": useful,
        },
        notes=(
            f"{tokens_done / total_tokens:.0%} of the tokens are done; the rest at the median speed so far",
        ),
    )


def _robust_sd(values: Sequence[float]) -> float:
    """From the median absolute deviation: one slow step says nothing of the others."""
    center = statistics.median(values)
    return 1.4826 * statistics.median(abs(value - center) for value in values)
