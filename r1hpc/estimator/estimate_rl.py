"""The estimate of a run that samples: reinforcement learning, generation, evaluation.

    found = estimate_rl(RlWork(params=7e9, gpu=find_gpu("a100"), num_gpus=8, ...))
    found.gpu_hours, found.phases

The rates come from one software stack (see rl_phase), so the width is put together from what they cannot say
as well: how much stacks differ, and how long completions will be.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from r1hpc.estimator.baselines import baselines
from r1hpc.estimator.estimate import LEAST_GOODPUT, Estimate, shares_of
from r1hpc.estimator.goodput import FailureRates, overhead
from r1hpc.estimator.memory_options import Beside, memory_options
from r1hpc.estimator.mfu import coefficients
from r1hpc.estimator.rl_phase import RlRates, RlWork, rl_phases
from r1hpc.estimator.spread import Spread
from r1hpc.estimator.workload import Workload
from r1hpc.plan.shape import ModelShape

ONLY_SAMPLING = ("generate", "evaluate")
LENGTH_SD = 0.4
"""Standard deviation of ln(mean completion length over the run), whoever guessed it: P10 and P90 lie a
factor 1.7 from it. Assumed; lengths change while a policy learns."""
_STEP = 1.1
"""By how much a length is changed to see what hours grow with."""


def estimate_rl(
    work: RlWork,
    stage: str = "rl",
    rates: FailureRates | None = None,
    shape: ModelShape | None = None,
    beside: Beside | None = None,
) -> Estimate:
    """The phases of a run that samples; of `generate` and `evaluate` only its sampling.

    Args:
        rates: the site's own failures and preemptions; None takes published ones.
        shape: the model's, for the memory plan of the updates; None guesses a Llama of that size.
        beside: what the updates find in memory beside the training states; None: nothing.
    """
    phases = _phases(work, stage)
    total = math.fsum(phases.values())
    variances = _variances(work, stage, total)
    ideal = Spread.log_normal(total, math.sqrt(math.fsum(variances.values())))
    lost = overhead(rates or FailureRates(), work.num_gpus)
    hours = ideal * (1 / max(lost.goodput, LEAST_GOODPUT))
    trained = _as_training(work, shape)
    return Estimate(
        method="flops",
        gpu_hours=hours,
        ideal_gpu_hours=ideal,
        wall_hours={work.num_gpus: hours * (1 / work.num_gpus)},
        goodput=lost,
        phases=phases,
        drivers=shares_of(variances),
        assumptions=_assumptions(work),
        notes=("completions are assumed to have the mean length named: decoding and update grow with it",),
        baselines=baselines(trained),
        memory=None if stage in ONLY_SAMPLING else memory_options(trained, shape, beside),
    )


def _phases(work: RlWork, stage: str) -> dict[str, float]:
    """GPU-hours at P50."""
    known = coefficients().rl
    phases = rl_phases(work, RlRates(known["arithmetic"], known["bandwidth"]))
    return {name: phases[name] for name in ("prefill", "decode")} if stage in ONLY_SAMPLING else phases


def _variances(work: RlWork, stage: str, total: float) -> Mapping[str, float]:
    """Variances of ln(hours), by source. The errors of the fit are those within one stack, and not all."""
    known = coefficients().rl
    shorter = replace(work, completion_length=max(1.0, work.completion_length / _STEP))
    grown = total / math.fsum(_phases(shorter, stage).values())
    elasticity = math.log(grown) / math.log(_STEP)
    return {
        "software stack and its tuning": known["stack_sd"] ** 2,
        "length of the completions": (elasticity * LENGTH_SD) ** 2,
        "between runs of one stack": known["log_sd"] ** 2,
    }


def _as_training(work: RlWork, shape: ModelShape | None) -> Workload:
    """What rules of thumb know of it: its tokens, each trained on once, in sequences of full length."""
    known: dict[str, Any] = {
        "tokens": work.tokens,
        "seq_len": math.ceil(work.prompt_length + work.max_completion_length),
        "gpu": work.gpu,
        "num_gpus": work.num_gpus,
        "precision": work.precision,
    }
    if shape is not None:
        return Workload.of_shape(shape, **known)
    return Workload.of_counts(params=work.params, active_params=work.active_params, **known)


def _assumptions(work: RlWork) -> dict[str, Any]:
    known = coefficients().rl
    return {
        "gpu": work.gpu.name,
        "num_gpus": work.num_gpus,
        "params": work.params,
        "active_params": work.params_met,
        "tokens": work.tokens,
        "precision": work.precision,
        "sequences": work.num_sequences,
        "evaluations": work.num_evaluations,
        "prompt_length": work.prompt_length,
        "mean_completion_length": work.completion_length,
        "max_completion_length": work.max_completion_length,
        "arithmetic_efficiency": known["arithmetic"],
        "bandwidth_efficiency": known["bandwidth"],
    }
