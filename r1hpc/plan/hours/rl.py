"""Estimate the GPU-hours of runs that sample: reinforcement learning by phase, generation, evaluation.

    prefill      2N FLOPs per prompt token, at the rate of large matrices; N is the parameters a token meets
    decode       every step reads all weights and the cache of every sequence: bound by memory bandwidth
                 unless many sequences decode together, or by kernel launches for a small model without
                 vLLM; a batch runs until its longest completion ends
    logprobs     2N FLOPs per token for each forward pass of old policy, reference, teacher or critic
    reward       a reward model's forward passes, without the GPUs' wait for verifiers
    update       6N FLOPs per token (8N with recomputation) for each pass over the rollout; also a critic's
    hand_over    before each rollout the new weights go to the sampler
    evaluation   hand_over, prefill and decode of answers that are not trained on, at every evaluation

Two efficiencies are fitted on the runs of DeepSpeed-Chat, the only published ones with token counts. They
come from one software stack, so the width also covers how much stacks differ and how long completions will
be.
"""

import math
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

from r1hpc.base.errors import UsageError
from r1hpc.plan.hours.estimate import LEAST_GOODPUT, Estimate, baselines, shares_of
from r1hpc.plan.hours.goodput import FailureRates, overhead
from r1hpc.plan.hours.memory_options import Beside, memory_options
from r1hpc.plan.hours.mfu import (
    GPUS_PER_NODE,
    OFFLOAD_TOKENS,
    SHARDING_TOKENS,
    SLOWER,
    USUAL_MICRO_TOKENS,
    coefficients,
)
from r1hpc.plan.hours.spread import Spread
from r1hpc.plan.hours.workload import Workload, check_amount, check_precision
from r1hpc.plan.model.shape import ModelShape
from r1hpc.plan.topology.gpus import Gpu

PHASES = ("prefill", "decode", "logprobs", "reward", "update", "hand_over", "evaluation")
_USABLE = 0.9
"""Part of the card's memory; the rest is the CUDA context and fragmentation. Assumed."""
_STATE_BYTES = 16
_MOST_WEIGHTS = 0.35
"""A replica uses more GPUs if its weights fill more of a card than this."""
_LEAST_FREE = 0.25
"""Part of the memory beside the weights: assumed for the cache if the training states fill the card."""
_NETWORK_BYTES_S = 25e9
"""Per GPU between nodes: 200 Gbit/s."""
_SEEN = 0.6
"""Share of gathering and offloading losses in published pretraining (research/estimator/scores.md)."""
EAGER_LAYER_S = 0.8e-3
"""Time of a model's layer to decode one token of each sequence, however little it computes, if its kernels
are launched one by one (rollout.engine=sampler; vLLM replays graphs). On an A100-80GB with transformers, at
batch size 1: 0.83 ms (Qwen2-0.5B, 24 layers, 49.94 tokens/s; Qwen's documentation, v2.0, "Speed Benchmark"),
0.77, 0.76 and 0.78 ms (Qwen-1.8B, 7B and 14B of 24, 32 and 40 layers, 54.09, 40.93 and 32.22 tokens/s;
QwenLM/Qwen, "Performance")."""
LENGTH_SPREAD = 0.5
"""Standard deviation of ln(completion length), assumed if only the mean is known."""


_LIMITS = {
    "params": ("--params", 1, 1e14),
    "num_gpus": ("--num-gpus", 1, 10**6),
    "num_rollouts": ("the number of rollouts, --rl-sequences over --sequences-per-rollout,", 1, 10**12),
    "sequences_per_rollout": ("--sequences-per-rollout", 1, 10**9),
    "prompt_length": ("--prompt-length", 1, 1 << 24),
    "completion_length": ("--completion-length", 1, 1 << 24),
    "max_completion_length": ("--max-completion-length", 1, 1 << 24),
    "logprob_passes": ("--logprob-passes", 0, 100),
    "critic_params": ("--critic-params", 0, 1e14),
}
"""By field of RlWork with a flag: its name, its least and its most. NaN is in no range."""
LENGTH_SD = 0.4
"""Standard deviation of ln(mean completion length over the run), for any guess: P10 and P90 lie a factor 1.7
from it. Assumed; lengths change while a policy learns."""
_STEP = 1.1
"""Factor on a length to see how hours grow with it."""


@dataclass(frozen=True)
class Batches:
    """The batches that each GPU decodes one after the other, and the sequences of each.

    A GPU that gets fewer waits for the others, and is billed like them.
    """

    num: int
    sequences: float


@dataclass(frozen=True)
class RlWork:
    """All of a run's rollouts. Tokens are totals over the run; lengths are of one completion."""

    params: float
    """All parameters: held, read and handed over."""
    gpu: Gpu
    num_gpus: int
    num_rollouts: int
    sequences_per_rollout: int
    prompt_length: float
    completion_length: float
    max_completion_length: float
    cache_bytes_per_token: float
    """Keys and values of all layers, in 16 bits."""
    active_params: float | None = None
    """Parameters that one token meets, which set the arithmetic; None: all."""
    eager_layers: int = 0
    """Layers of a model that decodes with kernels launched one by one; 0: it does not."""
    precision: str = "bf16"
    logprob_passes: int = 2
    """Forward passes over a rollout beside the updates: old policy and reference."""
    num_iterations: int = 1
    critic_params: float = 0.0
    """Parameters that one token meets."""
    critic_passes: int = 0
    """Forward passes of the critic over a rollout beside the updates."""
    reward_params: float = 0.0
    reference_params: float = 0.0
    """Parameters that one token meets in a reference or teacher used in every pass over a rollout."""
    recompute: bool = False
    rollout_batches: tuple[Batches, ...] = ()
    """The batches of a rollout; empty: split evenly over the GPUs, as large as memory allows."""
    num_evaluations: int = 0
    evaluation_batches: tuple[Batches, ...] = ()
    """The batches of one evaluation, by kind of answer."""
    is_trained: bool = True
    """Training states share the memory with the sampler."""
    is_whole: bool = False
    """Every GPU samples with a complete model, as in r1hpc; else a model is spread over as many as its
    weights need."""
    cache_tokens: float | None = None
    """Tokens whose keys and values fit on each GPU; None: follows from the other memory use."""

    def __post_init__(self) -> None:
        for name, (what, least, most) in _LIMITS.items():
            value = getattr(self, name)
            if not least <= value <= most:
                raise UsageError(f"{what} is {value:g}: give a number from {least:g} to {most:g}")
        check_amount("--active-params", self.active_params, self.params, "--params")
        check_precision(self.precision, self.gpu)
        if self.precision == "fp8":
            raise UsageError(
                "--precision fp8: how fast sampling and training in FP8 are together nobody has published; "
                "give --precision bf16"
            )
        if self.completion_length > self.max_completion_length:
            raise UsageError(
                f"--completion-length is {self.completion_length:g}, the mean, and the longest is "
                f"{self.max_completion_length:g}: give a longer --max-completion-length, or a shorter mean"
            )

    @property
    def params_met(self) -> float:
        """Return the parameters that one token meets."""
        return self.params if self.active_params is None else self.active_params

    @property
    def value_bytes(self) -> int:
        """Return the bytes of a weight, and of a number in the cache."""
        return 4 if self.precision in SLOWER else 2

    @property
    def cache_bytes(self) -> float:
        """Return the bytes of a token's keys and values, in the run's precision."""
        return self.cache_bytes_per_token * self.value_bytes / 2

    @property
    def peak_flops(self) -> float:
        return self.gpu.peak_flops * SLOWER.get(self.precision, 1.0)

    @property
    def rollout(self) -> tuple[Batches, ...]:
        return self.rollout_batches or (Batches(1, self.sequences_per_rollout / self.num_gpus),)

    @property
    def num_sequences(self) -> int:
        return self.num_rollouts * self.sequences_per_rollout

    @property
    def tokens(self) -> float:
        """Return prompt and completion tokens together."""
        return self.num_sequences * (self.prompt_length + self.completion_length)


@dataclass(frozen=True)
class RlRates:
    """Parts of the card's peaks that are reached."""

    arithmetic: float
    bandwidth: float


@dataclass(frozen=True)
class Decoding:
    """Decoding of completions: replicas of the model and sequences in each."""

    gpus_per_replica: int
    batch: float
    """Sequences that one replica decodes together."""
    waves: float
    """Batches one after the other for a rollout."""
    steps: float
    """Tokens until the longest sequence of a batch ends."""


def rl_phases(work: RlWork, rates: RlRates) -> dict[str, float]:
    """Return the GPU-hours of each of PHASES."""
    # 2 FLOPs per weight and token forward, 4 backward, 2 for the second forward pass of recomputation (Kaplan
    # et al., arXiv 2001.08361, table 1; arXiv 2104.04473, section 5.1). Attention scores are left out.
    matrix_s = _gathering(work) / (work.peak_flops * rates.arithmetic)
    backward = (8 if work.recompute else 6) * work.num_iterations
    met = work.params_met
    beside = work.logprob_passes * met + work.critic_passes * work.critic_params
    beside += work.num_iterations * work.reference_params
    # An update is slower if the training states must be in host memory.
    fits = _STATE_BYTES * work.params / work.num_gpus < _USABLE * work.gpu.memory_gib * 2**30
    offloading = 1.0 if fits else _slower(OFFLOAD_TOKENS, USUAL_MICRO_TOKENS, work)
    replicas = work.num_gpus / _sampling_gpus(work)
    hand_over = work.value_bytes * work.params * replicas / _NETWORK_BYTES_S
    evaluation = hand_over + sum(
        _prefill_s(work, each, matrix_s) + _decode_s(work, each, rates) for each in work.evaluation_batches
    )
    seconds = {
        "prefill": work.num_rollouts * sum(_prefill_s(work, each, matrix_s) for each in work.rollout),
        "decode": work.num_rollouts * sum(_decode_s(work, each, rates) for each in work.rollout),
        "logprobs": 2 * beside * work.tokens * matrix_s,
        "reward": 2 * work.reward_params * work.tokens * matrix_s,
        "update": backward * (met + work.critic_params) * work.tokens * matrix_s * offloading,
        "hand_over": work.num_rollouts * hand_over,
        "evaluation": work.num_evaluations * evaluation,
    }
    return {name: seconds[name] / 3600 for name in PHASES}


def decoding(work: RlWork, batches: Batches) -> Decoding:
    """Choose replicas as small as the weights allow, batches as large as the cache allows."""
    ways = _sampling_gpus(work)
    wanted = batches.sequences * ways
    length = work.prompt_length + work.completion_length
    most = ways * _cache_tokens(work, ways) / length
    batch = max(1.0, min(wanted, most))
    waves = batches.num * max(1.0, wanted / batch)
    return Decoding(ways, batch, waves, work.completion_length * tail(work, batch))


def tail(work: RlWork, batch: float) -> float:
    """Return the longest completion of a batch over the mean, for log-normal lengths cut at the longest."""
    # The largest of n lies about where the distribution function is n / (n + 1) (the mean of the largest of n
    # uniform values); exp(-sd^2 / 2) converts the given mean to the median.
    most = work.max_completion_length / work.completion_length
    if batch <= 1 or most <= 1:
        return 1.0
    extreme = NormalDist().inv_cdf(batch / (batch + 1))
    return min(most, max(1.0, math.exp(LENGTH_SPREAD * extreme - LENGTH_SPREAD**2 / 2)))


def _prefill_s(work: RlWork, batches: Batches, matrix_s: float) -> float:
    """Return the GPU-seconds of a rollout or evaluation; `matrix_s` is the time of a FLOP."""
    sequences = batches.num * batches.sequences * work.num_gpus
    return 2 * work.params_met * sequences * work.prompt_length * matrix_s


def _decode_s(work: RlWork, batches: Batches, rates: RlRates) -> float:
    """Take the longest of reading and computing (Pope et al., arXiv 2211.05102), and launching."""
    plan = decoding(work, batches)
    ways = plan.gpus_per_replica
    context = work.prompt_length + work.completion_length / 2
    read = work.value_bytes * work.params + plan.batch * work.cache_bytes * context
    reading_s = read / (ways * work.gpu.bandwidth_tb_s * 1e12 * rates.bandwidth)
    computing_s = 2 * work.params_met * plan.batch / (ways * work.peak_flops * rates.arithmetic)
    step_s = max(reading_s, computing_s, EAGER_LAYER_S * work.eager_layers)
    return plan.waves * plan.steps * step_s * work.num_gpus


def _gathering(work: RlWork) -> float:
    """Return the slow-down of passes beyond one node if the weights must be sharded."""
    if not work.is_trained or work.num_gpus <= GPUS_PER_NODE or _gpus_per_replica(work) == 1:
        return 1.0
    tokens = work.sequences_per_rollout / work.num_gpus * (work.prompt_length + work.completion_length)
    return _slower(SHARDING_TOKENS, tokens, work)


def _slower(floor: float, tokens: float, work: RlWork) -> float:
    return math.pow(1 + floor * work.gpu.peak_tflops / 312 / tokens, _SEEN)


def _sampling_gpus(work: RlWork) -> int:
    return 1 if work.is_whole else _gpus_per_replica(work)


def _gpus_per_replica(work: RlWork) -> int:
    ways = 1
    most = _MOST_WEIGHTS * work.gpu.memory_gib * 2**30
    while work.value_bytes * work.params / ways > most and ways < work.num_gpus:
        ways *= 2
    return ways


def _cache_tokens(work: RlWork, ways: int) -> float:
    """Return the cache on one card: the memory beside weights and sharded training states, or a quarter of
    that beside the weights if they must be offloaded."""
    if work.cache_tokens is not None:
        return work.cache_tokens
    usable = max(0.0, _USABLE * work.gpu.memory_gib * 2**30 - work.value_bytes * work.params / ways)
    states = _STATE_BYTES * work.params / work.num_gpus if work.is_trained else 0.0
    return max(_LEAST_FREE * usable, usable - states) / work.cache_bytes


def estimate_rl(
    work: RlWork,
    rates: FailureRates | None = None,
    shape: ModelShape | None = None,
    beside: Beside | None = None,
) -> Estimate:
    """Return the phases of a run that samples; if nothing is trained only its sampling.

    Args:
        rates: the site's own failures and preemptions; None takes published ones.
        shape: the model's, for the memory plan of the updates; None guesses a Llama of that size.
        beside: other memory during the updates, beside the training states; None: nothing.
    """
    phases = _phases(work)
    total = math.fsum(phases.values())
    shorter = replace(work, completion_length=max(1.0, work.completion_length / _STEP))
    elasticity = math.log(total / math.fsum(_phases(shorter).values())) / math.log(_STEP)
    known = coefficients().rl
    variances = {  # of ln(hours); the fit's errors cover only one stack
        "software stack and its tuning": known["stack_sd"] ** 2,
        "length of the completions": (elasticity * LENGTH_SD) ** 2,
        "between runs of one stack": known["log_sd"] ** 2,
    }
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
        memory=memory_options(trained, shape, beside) if work.is_trained else None,
    )


def _phases(work: RlWork) -> dict[str, float]:
    known = coefficients().rl
    phases = rl_phases(work, RlRates(known["arithmetic"], known["bandwidth"]))
    return phases if work.is_trained else {name: phases[name] for name in ("prefill", "decode")}


def _as_training(work: RlWork, shape: ModelShape | None) -> Workload:
    """Return the run as training: its tokens, each trained on once, in full-length sequences."""
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
