"""GPU-hours of reinforcement learning, phase by phase.

    phases = rl_phases(work, rates)      # {"prefill": ..., "decode": ..., "logprobs": ..., ...}, GPU-hours

    prefill      2N FLOPs a prompt token, at the rate of large matrices; N is what one token meets
    decode       every step reads all weights and the cache of every sequence: bound by memory bandwidth
                 unless many sequences decode together, or by the launch of kernels where a small model
                 decodes without vLLM; a batch runs until its longest completion ends
    logprobs     2N FLOPs a token for each forward pass of old policy, reference, teacher or critic
    reward       a reward model's forward passes; what GPUs wait for verifiers is not in it
    update       6N FLOPs a token (8N with recomputation), once for each pass over the rollout; so a critic
    hand_over    before each rollout the new weights go to whoever decodes
    evaluation   the same three of answers that nobody trains on, at every evaluation

Two efficiencies are fitted on the runs of DeepSpeed-Chat, the only published ones that give their tokens.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

from r1hpc.base.errors import UsageError
from r1hpc.estimator.features import GPUS_PER_NODE, OFFLOAD_TOKENS, SHARDING_TOKENS, USUAL_MICRO_TOKENS
from r1hpc.estimator.mfu import SLOWER
from r1hpc.estimator.workload import check_amount, check_precision
from r1hpc.plan.hardware import Gpu

PHASES = ("prefill", "decode", "logprobs", "reward", "update", "hand_over", "evaluation")
_USABLE = 0.9
"""Part of the card's memory; the rest is the CUDA context and fragmentation. Assumed."""
_STATE_BYTES = 16
_MOST_WEIGHTS = 0.35
"""A replica is spread over more GPUs when its weights fill more of a card than this."""
_LEAST_FREE = 0.25
"""Part of what the weights leave: assumed for the cache where the training states fill the card."""
_NETWORK_BYTES_S = 25e9
"""Per GPU between nodes: 200 Gbit/s."""
_SEEN = 0.6
"""Part of the losses by gathering and offloading in published pretraining (docs/estimator.md: 0.52, 0.62)."""
EAGER_LAYER_S = 0.8e-3
"""What a layer of a model takes to decode one token of each sequence, however little it computes, where its
kernels are launched one by one (rollout.engine=sampler; vLLM replays graphs). On an A100-80GB with
transformers, at batch size 1: 0.83 ms (Qwen2-0.5B, 24 layers, 49.94 tokens/s; Qwen's documentation, v2.0,
"Speed Benchmark"), 0.77, 0.76 and 0.78 ms (Qwen-1.8B, 7B and 14B of 24, 32 and 40 layers, 54.09, 40.93 and
32.22 tokens/s; QwenLM/Qwen, "Performance")."""
LENGTH_SPREAD = 0.5
"""Standard deviation of ln(completion length), assumed where only the mean is known."""


_LIMITS = {
    "params": ("--params", 1, 1e14),
    "num_gpus": ("--num-gpus", 1, 10**6),
    "num_rollouts": ("the number of rollouts, --rl-sequences over --sequences-per-rollout,", 1, 10**12),
    "sequences_per_rollout": ("--sequences-per-rollout", 1, 10**9),
    "prompt_length": ("--prompt-length", 1, 1 << 24),
    "completion_length": ("--completion-length", 1, 1 << 24),
    "max_completion_length": ("--max-completion-length", 1, 1 << 24),
    "cache_bytes_per_token": ("the bytes of a token's keys and values", 1, 1e9),
    "logprob_passes": ("--logprob-passes", 0, 100),
    "num_iterations": ("the number of passes over a rollout", 1, 10**6),
    "critic_params": ("--critic-params", 0, 1e14),
    "reward_params": ("the parameters of the reward model", 0, 1e14),
    "critic_passes": ("the number of the critic's forward passes", 0, 100),
    "reference_params": ("the parameters of the reference or teacher", 0, 1e14),
    "num_evaluations": ("the number of evaluations", 0, 10**12),
}
"""By field of RlWork: what a person knows it by, the least and the most it may be. A nan lies in no range."""


@dataclass(frozen=True)
class Batches:
    """What each GPU decodes: so many batches, one after the other, of so many sequences each.

    One that gets fewer waits for the others, and is paid for like them.
    """

    num: int
    sequences: float


@dataclass(frozen=True)
class RlWork:
    """All of a run's rollouts. Tokens are totals over the run; lengths are of one completion."""

    params: float
    """All parameters: what is held, read and handed over."""
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
    """Those one token meets, which its arithmetic grows with; None: all of them."""
    eager_layers: int = 0
    """Layers of a model that decodes by kernels launched one by one; 0: it does not."""
    precision: str = "bf16"
    logprob_passes: int = 2
    """Forward passes over a rollout beside the updates: old policy and reference."""
    num_iterations: int = 1
    critic_params: float = 0.0
    """Those one token meets."""
    critic_passes: int = 0
    """Forward passes of the critic over a rollout beside the updates."""
    reward_params: float = 0.0
    reference_params: float = 0.0
    """Those one token meets, of a reference or teacher that is asked in every pass over a rollout."""
    recompute: bool = False
    rollout_batches: tuple[Batches, ...] = ()
    """How a rollout is decoded; empty: spread evenly over the GPUs, and as much together as memory allows."""
    num_evaluations: int = 0
    evaluation_batches: tuple[Batches, ...] = ()
    """How the answers of one evaluation are decoded, each kind by itself."""
    is_trained: bool = True
    """Training states lie beside what samples."""
    is_whole: bool = False
    """Every GPU samples with a whole model, as in r1hpc; else one is spread over as many as its weights
    need."""
    cache_tokens: float | None = None
    """Tokens whose keys and values each GPU has room for; None: what else is not in memory."""

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
        """Parameters that one token meets."""
        return self.params if self.active_params is None else self.active_params

    @property
    def value_bytes(self) -> int:
        """Bytes of a weight, and of a number in the cache."""
        return 4 if self.precision in SLOWER else 2

    @property
    def cache_bytes(self) -> float:
        """Bytes of a token's keys and values, in the precision it is."""
        return self.cache_bytes_per_token * self.value_bytes / 2

    @property
    def peak_flops(self) -> float:
        return self.gpu.peak_flops * SLOWER.get(self.precision, 1.0)

    @property
    def rollout(self) -> tuple[Batches, ...]:
        """How a rollout is decoded."""
        return self.rollout_batches or (Batches(1, self.sequences_per_rollout / self.num_gpus),)

    @property
    def num_sequences(self) -> int:
        return self.num_rollouts * self.sequences_per_rollout

    @property
    def tokens(self) -> float:
        """Prompts and completions together."""
        return self.num_sequences * (self.prompt_length + self.completion_length)


@dataclass(frozen=True)
class RlRates:
    """Parts of the card's peaks that are reached."""

    arithmetic: float
    bandwidth: float


@dataclass(frozen=True)
class Decoding:
    """How completions are decoded: replicas of the model and sequences in each."""

    gpus_per_replica: int
    batch: float
    """Sequences that one replica decodes together."""
    waves: float
    """Batches one after the other for a rollout."""
    steps: float
    """Tokens until the longest sequence of a batch ends."""


def rl_phases(work: RlWork, rates: RlRates) -> dict[str, float]:
    """GPU-hours of each of PHASES."""
    # 2 FLOPs a weight and token forward, 4 backward, 2 for the second forward pass of recomputation (Kaplan
    # et al., arXiv 2001.08361, table 1; arXiv 2104.04473, section 5.1). Attention scores are left out.
    matrix_s = _gathering(work) / (work.peak_flops * rates.arithmetic)
    backward = (8 if work.recompute else 6) * work.num_iterations
    met = work.params_met
    beside = work.logprob_passes * met + work.critic_passes * work.critic_params
    beside += work.num_iterations * work.reference_params
    sampling = {
        "prefill": sum(_prefill_s(work, each, matrix_s) for each in work.rollout),
        "decode": sum(_decode_s(work, each, rates) for each in work.rollout),
    }
    evaluation = _hand_over_s(work) + sum(
        _prefill_s(work, each, matrix_s) + _decode_s(work, each, rates) for each in work.evaluation_batches
    )
    seconds = {
        **{name: work.num_rollouts * spent for name, spent in sampling.items()},
        "logprobs": 2 * beside * work.tokens * matrix_s,
        "reward": 2 * work.reward_params * work.tokens * matrix_s,
        "update": backward * (met + work.critic_params) * work.tokens * matrix_s * _offloading(work),
        "hand_over": work.num_rollouts * _hand_over_s(work),
        "evaluation": work.num_evaluations * evaluation,
    }
    return {name: seconds[name] / 3600 for name in PHASES}


def decoding(work: RlWork, batches: Batches) -> Decoding:
    """Replicas as small as the weights allow, batches as large as the cache allows."""
    ways = _sampling_gpus(work)
    wanted = batches.sequences * ways
    length = work.prompt_length + work.completion_length
    most = ways * _cache_tokens(work, ways) / length
    batch = max(1.0, min(wanted, most))
    waves = batches.num * max(1.0, wanted / batch)
    return Decoding(ways, batch, waves, work.completion_length * tail(work, batch))


def tail(work: RlWork, batch: float) -> float:
    """The longest completion of a batch over the mean, for lengths that are log-normal and cut at the
    longest."""
    # The largest of n lies about where the distribution function is n / (n + 1) (the mean of the
    # largest of n uniform values); exp(-sd^2 / 2) takes the median to the mean, which is what is given.
    most = work.max_completion_length / work.completion_length
    if batch <= 1 or most <= 1:
        return 1.0
    extreme = NormalDist().inv_cdf(batch / (batch + 1))
    return min(most, max(1.0, math.exp(LENGTH_SPREAD * extreme - LENGTH_SPREAD**2 / 2)))


def _prefill_s(work: RlWork, batches: Batches, matrix_s: float) -> float:
    """GPU-seconds of one rollout or evaluation, as in the next two; `matrix_s` are those of a FLOP."""
    sequences = batches.num * batches.sequences * work.num_gpus
    return 2 * work.params_met * sequences * work.prompt_length * matrix_s


def _decode_s(work: RlWork, batches: Batches, rates: RlRates) -> float:
    """A step takes the longest of reading and computing (Pope et al., arXiv 2211.05102), and launching."""
    plan = decoding(work, batches)
    ways = plan.gpus_per_replica
    context = work.prompt_length + work.completion_length / 2
    read = work.value_bytes * work.params + plan.batch * work.cache_bytes * context
    reading_s = read / (ways * work.gpu.bandwidth_tb_s * 1e12 * rates.bandwidth)
    computing_s = 2 * work.params_met * plan.batch / (ways * work.peak_flops * rates.arithmetic)
    step_s = max(reading_s, computing_s, EAGER_LAYER_S * work.eager_layers)
    return plan.waves * plan.steps * step_s * work.num_gpus


def _hand_over_s(work: RlWork) -> float:
    replicas = work.num_gpus / _sampling_gpus(work)
    return work.value_bytes * work.params * replicas / _NETWORK_BYTES_S


def _gathering(work: RlWork) -> float:
    """How much longer passes take beyond one node where weights are sharded: where a card cannot hold
    them."""
    if not work.is_trained or work.num_gpus <= GPUS_PER_NODE or _gpus_per_replica(work) == 1:
        return 1.0
    tokens = work.sequences_per_rollout / work.num_gpus * (work.prompt_length + work.completion_length)
    return _slower(SHARDING_TOKENS, tokens, work)


def _offloading(work: RlWork) -> float:
    """How much longer an update takes where the training states must lie in the host's memory."""
    fits = _STATE_BYTES * work.params / work.num_gpus < _USABLE * work.gpu.memory_gib * 2**30
    return 1.0 if fits else _slower(OFFLOAD_TOKENS, USUAL_MICRO_TOKENS, work)


def _slower(floor: float, tokens: float, work: RlWork) -> float:
    return math.pow(1 + floor * work.gpu.peak_tflops / 312 / tokens, _SEEN)


def _sampling_gpus(work: RlWork) -> int:
    """Of a replica."""
    return 1 if work.is_whole else _gpus_per_replica(work)


def _gpus_per_replica(work: RlWork) -> int:
    ways = 1
    most = _MOST_WEIGHTS * work.gpu.memory_gib * 2**30
    while work.value_bytes * work.params / ways > most and ways < work.num_gpus:
        ways *= 2
    return ways


def _cache_tokens(work: RlWork, ways: int) -> float:
    """On one card, in what is free beside the weights and the sharded training states; a quarter of it where
    they must be offloaded."""
    if work.cache_tokens is not None:
        return work.cache_tokens
    usable = max(0.0, _USABLE * work.gpu.memory_gib * 2**30 - work.value_bytes * work.params / ways)
    states = _STATE_BYTES * work.params / work.num_gpus if work.is_trained else 0.0
    return max(_LEAST_FREE * usable, usable - states) / work.cache_bytes
