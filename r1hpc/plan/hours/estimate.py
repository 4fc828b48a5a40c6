"""Estimate the GPU-hours of training from a `Workload`: P10, P50 and P90, and the sources of uncertainty.

estimate_run.py makes the workload from a run, from_flags.py from flags; rl.py estimates runs that sample.

hours = FLOPs / (peak x MFU x goodput). FLOPs follow exactly from the shape; MFU is a distribution fitted on
published runs (mfu.py); goodput is the share left by failures, preemptions, restarts and saves (goodput.py).
`ideal_gpu_hours` come from throughput x tokens; `gpu_hours` are billed: they include goodput and part of the
further losses of published long runs (evaluation, stalls, restarts by hand); the rest widens the interval.

Beside it stand the simple estimates in use today, for comparison, and the measured estimate of a run that has
taken steps. The seed formula is from the article this project started from: parameters in units of 10^8,
times 0.8, plus 0.3 for each GB of text. It adds where cost multiplies; no constant repairs that.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from r1hpc.base.errors import UsageError
from r1hpc.base.units import format_duration
from r1hpc.plan.hours.goodput import SAVE_S, FailureRates, Overhead, overhead
from r1hpc.plan.hours.memory_options import MemoryOptions, memory_options
from r1hpc.plan.hours.mfu import Coefficients, MfuBelief, data_notes, mfu_belief, num_gpus_of, run_weight
from r1hpc.plan.hours.spread import Spread
from r1hpc.plan.hours.workload import ASSUMED_GPU, Workload
from r1hpc.plan.model.shape import ModelShape
from r1hpc.plan.topology.gpus import find_gpu

CONVENTION = (
    "MFU without recomputation, the full square of attention scores (PaLM), against the dense bf16 peak; "
    "`causal` counts half the scores (Megatron-LM)"
)
_WALL_EXAMPLES = (8, 64, 512)
LEAST_GOODPUT = 1e-6
"""Below this goodput the hours are computed at it: a run that never ends has none."""
BYTES_PER_TOKEN = 4.0
"""English text, roughly; 3.5 to 4.5 for usual tokenizers."""
CONSTANT_MFU = (0.35, 0.40, 0.50)
_BIGSCIENCE_TFLOPS = 150.0
_FEWEST_STEPS = 5
_FEWEST_ROLLOUTS = 2
_DRIFT = 0.03
"""Standard deviation of ln(speed) between the measured and the coming steps: nodes, neighbours. Assumed."""
_WARM_UP = 0.1
"""The first part of the steps, which compile and fill caches, is left out."""
_LEAST_USEFUL = 0.05


@dataclass(frozen=True)
class Estimate:
    """One estimate. None: does not apply, or unknown."""

    method: str
    gpu_hours: Spread | None
    """Billed: GPUs x allocated time of all attempts."""
    ideal_gpu_hours: Spread | None = None
    """Throughput x tokens, if nothing goes wrong."""
    node_hours: Spread | None = None
    """For a CPU run, instead of GPU-hours."""
    wall_hours: Mapping[int, Spread] = field(default_factory=dict)
    """By number of GPUs, with the efficiency of the run as given."""
    mfu: Spread | None = None
    flops: Mapping[str, float] = field(default_factory=dict)
    goodput: Overhead | None = None
    phases: Mapping[str, float] = field(default_factory=dict)
    """GPU-hours at P50 of a run that samples."""
    drivers: Mapping[str, float] = field(default_factory=dict)
    """Sources of the uncertainty: parts of the variance of ln(hours), which add up to 1."""
    assumptions: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """Notes for the user, one sentence each."""
    baselines: Mapping[str, float] = field(default_factory=dict)
    """GPU-hours by rules of thumb; for a CPU run those of one A100 per rank."""
    memory: MemoryOptions | None = None
    """None: nothing is trained, or no size is known. For a CPU run like `baselines`."""

    def assuming(self, **more: object) -> "Estimate":
        """Return the estimate with more assumptions recorded."""
        return replace(self, assumptions={**self.assumptions, **more})

    def with_startup(self, gpu_hours: Spread) -> "Estimate":
        """Return the estimate plus the cost of all attempts before their first step."""
        before = self.gpu_hours
        assert before is not None, "of a run on GPUs"
        wall = {num: hours + gpu_hours * (1 / num) for num, hours in self.wall_hours.items()}
        own, added = (before.p90 - before.p50) ** 2, (gpu_hours.p90 - gpu_hours.p50) ** 2
        part = added / (own + added)
        drivers = {name: share * (1 - part) for name, share in self.drivers.items()} | {"start-up": part}
        return replace(
            self, gpu_hours=before + gpu_hours, wall_hours=wall, drivers=shares_of(drivers) or self.drivers
        )

    def to_json(self) -> dict[str, Any]:
        value = asdict(replace(self, memory=None))
        value["wall_hours"] = {str(gpus): hours for gpus, hours in value["wall_hours"].items()}
        value["mfu"] = value["mfu"] and {**value["mfu"], "convention": CONVENTION}
        value["memory"] = self.memory and self.memory.to_json()
        return {**value, "notes": list(self.notes)}


def estimate(
    work: Workload,
    *,
    shape: ModelShape | None = None,
    rates: FailureRates | None = None,
    save_time_s: float = SAVE_S,
    save_interval_s: float | None = None,
) -> Estimate:
    """Return the estimate from FLOPs.

    Args:
        shape: the model's, for the memory plan; None guesses a Llama of that size.
        rates: the site's own failures and preemptions; None takes published ones.
        save_interval_s: between saves; None takes the optimal one.
    """
    gpus, rates = num_gpus_of(work), rates or FailureRates()
    lost = overhead(rates, gpus, save_time_s, save_interval_s)
    ideal = mfu_belief(work, 0.0)
    belief = billed_belief(work)
    useful = max(lost.goodput, LEAST_GOODPUT)
    hours = Spread.log_normal(work.gpu_hours_at(belief.median) / useful, belief.log_sd)
    options = memory_options(work, shape)
    counts = (work.num_gpus,) if work.num_gpus else _WALL_EXAMPLES
    return Estimate(
        method="flops",
        gpu_hours=hours,
        ideal_gpu_hours=Spread.log_normal(work.gpu_hours_at(ideal.median), ideal.log_sd),
        wall_hours={n: hours * (1 / n) for n in counts},
        mfu=Spread.log_normal(ideal.median, ideal.log_sd),
        flops={
            "per_token": work.flops_per_token,
            "total": work.flops,
            "total_causal": work.flops_causal,
            "hardware": work.hardware_flops,
        },
        goodput=lost,
        drivers=shares_of(belief.variances),
        assumptions=_assumptions(work, gpus, rates, save_time_s, belief),
        notes=_notes(work, lost, options),
        baselines=baselines(work),
        memory=options,
    )


def billed_belief(work: Workload, known: Coefficients | None = None) -> MfuBelief:
    """Return the MFU of all billed time except goodput: long runs lose more than their steps show."""
    ideal = mfu_belief(work, 0.0, known)
    return mfu_belief(work, run_weight(work.gpu_hours_at(ideal.median) / num_gpus_of(work)), known)


def seed_estimate(params: float, gigabytes: float) -> Estimate:
    """Return the estimate of the article's formula, with its faults as notes."""
    hours = seed_formula(params, gigabytes)
    gpu = find_gpu(ASSUMED_GPU)
    work = Workload.of_counts(params=params, tokens=gigabytes * 1e9 / BYTES_PER_TOKEN, gpu=gpu)
    note = (
        "the article's formula, 0.8 per 10^8 parameters + 0.3 per GB of text, kept as a baseline: for 7 B "
        "and 100 GB it gives 86, where the article itself prints 560; 6ND at 40% MFU is about 2,300 "
        "A100-hours. It adds where cost multiplies, so it has no interval: do not plan with it"
    )
    return Estimate(
        method="seed",
        gpu_hours=Spread(hours, hours, hours),
        assumptions={"params": params, "gigabytes": gigabytes, "gpu": gpu.name},
        notes=(note,),
        baselines=baselines(work),
        memory=memory_options(work),
    )


def seed_formula(params: float, gigabytes: float) -> float:
    """Return the GPU-hours of the article's formula: 86 for 7 B parameters and 100 GB; it prints 560.

    >>> seed_formula(7e9, 100)
    86.0
    """
    return params / 1e8 * 0.8 + gigabytes * 0.3


def text_gigabytes(tokens: float) -> float:
    return tokens * BYTES_PER_TOKEN / 1e9


def six_nd(work: Workload, mfu: float) -> float:
    """Return 6 x active params x tokens (Kaplan et al., arXiv 2001.08361) at constant MFU, no attention."""
    return 6 * work.active_params * work.tokens / (mfu * work.gpu.peak_flops) / 3600


def eight_nd(work: Workload) -> float:
    """Apply BLOOM's planning rule: 8ND, with recomputation (arXiv 2104.04473, section 5.1), at 150 of 312
    TFLOP/s; the same share of other peaks."""
    rate = _BIGSCIENCE_TFLOPS / 312 * work.gpu.peak_flops
    return 8 * work.active_params * work.tokens / rate / 3600


def baselines(work: Workload) -> dict[str, float]:
    """Return the GPU-hours of every baseline that needs no fit."""
    constant = {f"6nd_at_{round(100 * mfu)}": six_nd(work, mfu) for mfu in CONSTANT_MFU}
    return {
        "seed_formula": seed_formula(work.params, text_gigabytes(work.tokens)),
        **constant,
        "8nd_at_150_tflops": eight_nd(work),
    }


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
    """Return the final cost of the run: the steps taken predict the steps to come.

    Steps are counted, not tokens: the loss tokens of an SFT step depend on its samples, and those of an RL
    step on which completions taught something. Raise UsageError if there are too few steps for an estimate.

    Args:
        seconds: GPU-seconds (of a CPU run node-seconds) of each lasting step, by its number from 1.
        num_gpus, num_nodes: the current numbers; 0 GPUs is a CPU run, counted in node-hours.
        hours_spent: GPU-hours, of a CPU run node-hours, of all attempts so far, busy or idle.
        useful: the part of them spent on lasting steps.
        updates_per_rollout: of stage rl, whose first update after a rollout carries the rollout's time.
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
    # From the median absolute deviation: one slow step must not dominate.
    logs = [math.log(s) for s in steady]
    center = statistics.median(logs)
    sd = 1.4826 * statistics.median(abs(value - center) for value in logs)
    log_sd = math.hypot(_DRIFT, sd / math.sqrt(len(steady)))
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


def shares_of(variances: Mapping[str, float]) -> dict[str, float]:
    """Return the parts of the variance of ln(hours), largest first, without those below 1/200."""
    total = math.fsum(variances.values())
    parts = {name: value / total for name, value in variances.items() if value > 0.005 * total}
    return dict(sorted(parts.items(), key=lambda item: -item[1]))


def _assumptions(
    work: Workload, gpus: int, rates: FailureRates, save_time_s: float, belief: MfuBelief
) -> dict[str, Any]:
    return {
        "gpu": work.gpu.name,
        "peak_tflops": work.gpu.peak_tflops,
        "num_gpus": gpus,
        "num_gpus_given": work.num_gpus is not None,
        "params": work.params,
        "active_params": work.active_params,
        "tokens": work.tokens,
        "seq_len": work.seq_len,
        "shape": "exact" if work.shape_is_known else "guessed from the number of parameters",
        "attention_share_of_flops": work.attention_share,
        "precision": work.precision,
        "stack": work.stack or "unknown",
        "published_families": belief.num_families,
        "recompute": work.recompute or "unknown",
        "tokens_per_step": work.tokens_per_step or "unknown",
        "zero_stage": "unknown" if work.zero_stage is None else work.zero_stage,
        **asdict(rates),
        "save_time_s": save_time_s,
        "effects_on_ln_mfu": dict(belief.effects),
    }


def _notes(work: Workload, lost: Overhead, options: MemoryOptions) -> tuple[str, ...]:
    notes = data_notes(work)
    if work.num_gpus is None:
        notes.append("the number of GPUs is not given: efficiency and losses are those of the usual number")
    if work.recompute is None:
        notes.append("recomputation is not given: full recomputation would cost about a quarter more")
    if work.precision in ("fp32", "tf32"):
        notes.append(f"{work.precision}: no published run, so only the ratio of the peaks is known")
    if lost.goodput < 0.5:
        every = format_duration(86400 / lost.interruptions_per_day)
        notes.append(
            f"interruptions come every {every}: less than half of the time is progress. "
            "Save faster or more often, or restart faster"
        )
    if not options.fits:
        few = options.num_gpus
        cards = f"{few} x {work.gpu.name}" if few > 1 else f"one {work.gpu.name}"
        more = f"from {options.least_gpus} GPUs on ZeRO 3 fits, or train adapters (model.lora_rank)"
        if options.least_gpus is None:
            more = "no number of them holds one sequence: shorten --seq-len, or take a larger card"
        notes.append(
            f"nothing fits on {cards}: the leanest configuration ({options.smallest}) exceeds the "
            f"{options.usable_gib:.0f} GiB that a card has to offer; {more}"
        )
    return tuple(notes)
