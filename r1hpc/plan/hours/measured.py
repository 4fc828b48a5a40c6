"""Estimate the hours of a run from its own speed: the steps taken predict the steps to come.

Steps are counted, not tokens: the loss tokens of an SFT step depend on its samples, and those of an RL step
on which completions taught something.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

from r1hpc.base.errors import UsageError
from r1hpc.plan.hours.estimate import Estimate
from r1hpc.plan.hours.quantiles import Spread

_FEWEST_STEPS = 5
_FEWEST_ROLLOUTS = 2
_DRIFT = 0.03
"""Standard deviation of ln(speed) between the measured and the coming steps: nodes, neighbours. Assumed."""
_WARM_UP = 0.1
"""The first part of the steps, which compile and fill caches, is left out."""
_LEAST_USEFUL = 0.05


def measured_estimate(
    seconds: Mapping[int, float],
    *,
    num_steps: int,
    num_gpus: int = 0,
    num_nodes: int = 0,
    hours_spent: float,
    useful: float,
    updates_per_rollout: int = 1,
) -> Estimate:
    """Return the final cost of the run.

    Args:
        seconds: GPU-seconds (of a CPU run node-seconds) of each lasting step, by its number from 1.
        num_gpus, num_nodes: the current numbers; 0 GPUs is a CPU run, counted in node-hours.
        hours_spent: GPU-hours, of a CPU run node-hours, of all attempts so far, busy or idle.
        useful: the part of them spent on lasting steps.
        updates_per_rollout: of stage rl, whose first update after a rollout carries the rollout's time.

    Raises:
        UsageError: too few steps for an estimate.
    """
    means = _means(seconds, updates_per_rollout)
    samples = updates_per_rollout > 1
    if len(means) < (_FEWEST_ROLLOUTS if samples else _FEWEST_STEPS):
        rollouts = f"{_FEWEST_ROLLOUTS} whole rollouts of {updates_per_rollout} steps"
        asked = rollouts if samples else f"{_FEWEST_STEPS} steps"
        raise UsageError(
            f"--method measured needs at least {asked}, and the run has {len(seconds)} steps: let it run, or "
            "take --method flops"
        )
    steady = means[int(_WARM_UP * len(means)) :]
    each = statistics.median(steady)
    log_sd = math.hypot(_DRIFT, _robust_sd([math.log(s) for s in steady]) / math.sqrt(len(steady)))
    left = max(0, num_steps - len(seconds)) * each / 3600 / max(useful, _LEAST_USEFUL)
    hours = Spread.log_normal(left, math.hypot(log_sd, 0.5 * (1 - useful))) + hours_spent
    ideal = Spread.log_normal(num_steps * each / 3600, log_sd)
    unit = "rollout" if samples else "step"
    return Estimate(
        method="measured",
        gpu_hours=hours if num_gpus else None,
        node_hours=None if num_gpus else hours,
        ideal_gpu_hours=ideal if num_gpus else None,
        wall_hours={num_gpus: hours * (1 / num_gpus)} if num_gpus else {},
        assumptions={
            "steps_measured": len(seconds),
            "num_steps": num_steps,
            "step_time_s": each / (num_gpus or num_nodes),
            "num_gpus": num_gpus or None,
            "gpu_hours_spent" if num_gpus else "node_hours_spent": hours_spent,
            "useful_part": useful,
        },
        notes=(f"{len(seconds) / num_steps:.0%} of the steps are done; the rest at the median {unit}",),
    )


def _means(seconds: Mapping[int, float], updates_per_rollout: int) -> Sequence[float]:
    """Return the mean step of each rollout whose updates are all there, in order."""
    rollouts: defaultdict[int, list[float]] = defaultdict(list)
    for step in sorted(seconds):
        rollouts[(step - 1) // updates_per_rollout].append(seconds[step])
    whole = [each for each in rollouts.values() if len(each) == updates_per_rollout]
    return [statistics.fmean(each) for each in whole]


def _robust_sd(values: Sequence[float]) -> float:
    """Estimate the spread from the median absolute deviation: one slow step must not dominate."""
    center = statistics.median(values)
    return 1.4826 * statistics.median(abs(value - center) for value in values)
