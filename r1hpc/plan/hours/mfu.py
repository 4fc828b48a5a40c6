"""Predict MFU as a distribution fitted on published runs, from the known facts of a run.

It reads coefficients.json, made by `python -m research.estimator.fit`. MFU counts no recomputation and the
full square of attention, against the dense bf16 peak; a run in FP8 may therefore exceed what bf16 could
reach.

The features (NAMES) are numbers, mostly near 0, that enter the logarithm of MFU. One is the stack, and how
much FP8 gains with it. Six are losses whose form
and size follow from physics; the fit (research/estimator) only finds how much of them published runs show.
They have the form log(1 + t_loss / t_compute), with the step's arithmetic at half of the card's peak, which
large matrices reach:

    launch     a kernel's floor against the FLOPs of one layer and micro batch on one GPU
    sharding   ZeRO-3 gathers weights for each micro batch: 6 bytes a parameter against 6 FLOPs for each
               parameter and token
    reduction  gradients are reduced once a step, against the tokens of one GPU in a step
    tensor     four all-reduces of activations a layer against its FLOPs, over NVLink or beyond the node
    bubble     (stages - 1) / micro batches
    offload    Adam on the CPU, once a step

Unknown facts count as 0 or their usual value: the coefficient of `one`, or of `recompute_unknown`, then
carries the average.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from r1hpc.base.errors import StateError
from r1hpc.plan.hours.workload import STACKS, Workload

NAMES = (
    *("one", "size", "recompute", "recompute_unknown", "attention", "scale", "gpu_ridge", "fp8", "fp16"),
    *("sharding", "bubble", "tensor", "offload", "launch", "reduction", "experts", "run"),
    *("deepspeed", "torch", "megatron", "fp8_stack", "fp8_experts", "fp4", "experts_apart"),
)

_A100_TFLOPS = 312.0
_A100_RIDGE = 153.0
"""FLOPs per byte of an A100-80GB at its peaks."""
_LAUNCH_FLOPS = 1e11
"""FLOPs an A100 could do while it waits for one layer's kernels, forward and backward: 0.6 ms."""
SHARDING_TOKENS = 3000.0
"""Half of 6240 (= peak / 2 over 25 GB/s per GPU between nodes), since transfers overlap with arithmetic."""
_REDUCTION_TOKENS = 4000.0
"""4 bytes per parameter (a ring moves 16-bit gradients twice) at 25 GB/s, against 6 FLOPs per token at half
of the peak: 4160, rounded."""
_REDUCTION_TOKENS_ONE_NODE = 1000.0
"""The same at 100 GB/s, a third of NVLink's rate each way. Assumed."""
_TENSOR_WIDTH = 170.0
"""In (ways - 1) / hidden size: 4 all-reduces of 2 bytes, each moved 2 (ways - 1) / ways times, over NVLink at
200 GB/s, against the 72 hidden^2 / ways FLOPs of a layer and token (Megatron-LM, arXiv 1909.08053)."""
_BETWEEN_NODES = 4.0
"""Factor if tensor parallelism leaves the node. Assumed."""
OFFLOAD_TOKENS = 16000.0
"""0.6 ns of Adam on the CPU per parameter of each GPU, against 6 FLOPs per token: 28 bytes of states read and
written at 45 GB/s (ZeRO-Offload, arXiv 2101.06840). Assumed."""
GPUS_PER_NODE = 8
USUAL_MICRO_TOKENS = 8192.0
_USUAL_ATTENTION = 0.08
_ATTENTION_SD = 0.6
"""Chosen: a kernel that skips the masked half of the scores does up to twice the counted work; some are
slower."""
_STACK_SD = 0.14
_FP8_STACK_SD = 0.45
_EXPERTS_SD = 0.2
"""Differences between stacks, those in FP8, and teams' exchange between experts; ln(MFU). Chosen."""
_FEW_SD = 0.3
"""Between families of a class without published runs; ln(MFU). Chosen."""
_FP8_OF_STACK = {"megatron": 0.5, "torch": -0.5, "deepspeed": -0.5}
_FP4_OF_EXPERTS = 0.2
"""Part of FP4's gain in a mixture of experts, whose matrix products are small. Assumed."""
_RACKS = ("GB200", "GB300")
_GPUS_PER_RACK = 72
"""These cards share NVLink across a rack."""
_BYTES_OF_STATE = 18
"""Per parameter: weights, gradients and Adam in mixed precision, as in Megatron-LM."""
_SMALLEST = 5e7
COEFFICIENTS = Path(__file__).resolve().parent / "coefficients.json"
_REACHABLE = 0.87
"""Part of the dense peak reached by the best large matrix products on an A100 (stas00/ml-engineering, MAMF:
271 of 312)."""
_PEAK_FACTORS = {"fp8": 2.0, "fp4": 4.0}
SLOWER = {"tf32": 1 / 2, "fp32": 1 / 15}
"""Peaks relative to bf16's, of an A100 (156 and 19.5 of 312) and an H100 (495 and 67 of 989). Not fitted:
nobody publishes such runs."""
_LONG_RUN_HOURS = 48.0
"""A run of this many wall hours has met most losses of a long run; a scale, assumed."""


def features(work: Workload, run_weight: float = 1.0) -> dict[str, float]:
    """Return the numbers of NAMES.

    Args:
        run_weight: the share of a long run's losses that applies: 0 for a measured step, 1 for weeks.
    """
    gpus = num_gpus_of(work)
    speed = work.gpu.peak_tflops / _A100_TFLOPS
    tokens = None if work.tokens_per_step is None else work.tokens_per_step / gpus  # of one GPU in a step
    micro_tokens = tokens or USUAL_MICRO_TOKENS
    if work.micro_batch_size is not None:
        micro_tokens = work.micro_batch_size * work.seq_len
    near = _GPUS_PER_RACK if work.gpu.family in _RACKS else GPUS_PER_NODE  # GPUs that share NVLink
    is_sharded = work.zero_stage == 3 and gpus > near
    ways = work.tensor_parallel or 1
    slower = 1.0 if ways <= near else _BETWEEN_NODES
    reduction = 0.0
    if tokens is not None and not is_sharded:
        floor = _REDUCTION_TOKENS if gpus > near else _REDUCTION_TOKENS_ONE_NODE
        reduction = math.log1p(floor * speed / (tokens * _ways(work)))
    return {
        "one": 1.0,
        "size": 1e3 * max(work.active_params, _SMALLEST) ** (-1 / 3) - 0.5,
        # The repeated part; selective recomputation repeats only attention's core: 2.7 % of the step
        # (arXiv 2205.05198, table 4).
        "recompute": {"full": 1.0, "selective": 0.1}.get(work.recompute or "", 0.0),
        "recompute_unknown": float(work.recompute is None),
        "attention": work.attention_share - _USUAL_ATTENTION,
        "scale": math.log10(gpus / 64),
        "gpu_ridge": math.log(work.gpu.peak_tflops / work.gpu.bandwidth_tb_s / _A100_RIDGE),
        "fp8": float(is_low_precision(work)),
        "fp16": float(work.precision == "fp16"),
        "sharding": math.log1p(SHARDING_TOKENS * speed / micro_tokens) if is_sharded else 0.0,
        "bubble": _bubble(work, gpus),
        "tensor": math.log1p(_TENSOR_WIDTH * (ways - 1) / work.hidden_size * slower),
        "offload": math.log1p(OFFLOAD_TOKENS * speed / (tokens or micro_tokens)) if work.offload else 0.0,
        "launch": _launch(work, speed),
        "reduction": reduction,
        "experts": float(work.is_moe),
        "run": run_weight,
        **{name: float(work.stack == name) for name in STACKS},
        "fp8_stack": _FP8_OF_STACK.get(work.stack or "", 0.0) * is_low_precision(work),
        "fp8_experts": float(is_low_precision(work) and work.is_moe),
        "fp4": (_FP4_OF_EXPERTS if work.is_moe else 1.0) * (work.precision == "fp4"),
        "experts_apart": float(work.is_moe and gpus > GPUS_PER_NODE and work.gpu.family not in _RACKS),
    }


def class_of(work: Workload) -> str:
    """Return the class whose published families are counted, for example `Hopper, fp8, dense, torch`.

    An unknown stack counts the families of all stacks.
    """
    precision = work.precision if is_low_precision(work) else "16 bits or more"
    parts = [work.gpu.generation, precision, "experts" if work.is_moe else "dense"]
    return ", ".join([*parts, work.stack] if work.stack else parts)


def few_variance(num_families: int) -> float:
    """Return the variance of ln(MFU) in a class from which few families are published."""
    return _FEW_SD**2 / (1 + num_families)


def is_low_precision(work: Workload) -> bool:
    return work.precision in ("fp8", "fp4")


def shared_effects(work: Workload, family_sd: float) -> tuple[float, ...]:
    """Return the effects common to the runs of one team.

    Its general level, its attention kernel, its experts, and its FP8 where the stack is unknown.
    """
    level, fp8 = family_sd, 0.0
    if work.stack is None:
        level, fp8 = math.hypot(family_sd, _STACK_SD), _FP8_STACK_SD * is_low_precision(work)
    attention = _ATTENTION_SD * (work.attention_share - _USUAL_ATTENTION)
    return level, attention, _EXPERTS_SD * work.is_moe, fp8


def num_gpus_of(work: Workload) -> int:
    """Return the given GPUs, else the usual number, rounded up to complete copies of a model."""
    ways = work.model_parallel or 1
    # As in published pretraining runs of this size, roughly: 64 for 1 B parameters, 250 for 10 B.
    usual = min(1024.0, max(8.0, 64 * math.pow(work.active_params / 1e9, 0.6)))
    return work.num_gpus or ways * math.ceil(round(usual) / ways)


def _bubble(work: Workload, gpus: float) -> float:
    stages = work.pipeline_parallel or 1
    if stages == 1 or work.tokens_per_step is None:
        return 0.0
    replicas = gpus / (stages * (work.tensor_parallel or 1))
    micro_batches = work.tokens_per_step / (replicas * (work.micro_batch_size or 1) * work.seq_len)
    return math.log1p((stages - 1) / max(micro_batches, 1.0))


def _launch(work: Workload, speed: float) -> float:
    if work.micro_batch_size is None:
        return 0.0
    layer = 24 * work.micro_batch_size * work.seq_len * work.hidden_size**2 / (work.tensor_parallel or 1)
    return math.log1p(_LAUNCH_FLOPS * speed / layer)


def _ways(work: Workload) -> float:
    if work.model_parallel is not None:
        return work.model_parallel
    if work.zero_stage is not None:
        return 1.0
    return max(1.0, _BYTES_OF_STATE * work.params / (0.6 * work.gpu.memory_gib * 2**30))


@dataclass(frozen=True)
class Posterior:
    """Mean and covariance of the coefficients, in the order of NAMES."""

    mean: tuple[float, ...]
    covariance: tuple[tuple[float, ...], ...]

    def variance(self, x: Sequence[float]) -> float:
        """Return the variance from the coefficients' own uncertainty."""
        return math.fsum(
            x[i] * x[j] * self.covariance[i][j] for i in range(len(x)) for j in range(len(x)) if x[i] and x[j]
        )


@dataclass(frozen=True)
class Coefficients:
    """The result of the fit: everything an estimate needs."""

    posterior: Posterior
    family_sd: float
    noise_sd: float
    run_noise_sd: float
    run_share: float
    """Part of published long runs' excess over their steps that a run planned now should expect."""
    run_spread: float
    """Standard deviation of that, in ln(hours)."""
    width_scale: float
    families: Mapping[str, int]
    """Published families by class_of."""
    rl: Mapping[str, float]
    scored: Mapping[str, float]


@dataclass(frozen=True)
class MfuBelief:
    """ln(MFU) is normal. `effects` add up to its mean, `variances` to its variance."""

    log_mean: float
    log_sd: float
    effects: Mapping[str, float]
    variances: Mapping[str, float]
    num_families: int
    """Published families in the class of the run."""

    @property
    def median(self) -> float:
        return math.exp(self.log_mean)


@cache
def coefficients() -> Coefficients:
    """Return the packaged coefficients. Raise StateError if the file is from another version."""
    value = json.loads(COEFFICIENTS.read_text())
    if value.get("features") != list(NAMES):
        raise StateError(f"{COEFFICIENTS} is from another version; run: python -m research.estimator.fit")
    return parse_coefficients(value)


def parse_coefficients(value: Mapping[str, Any]) -> Coefficients:
    posterior = Posterior(tuple(value["mean"]), tuple(tuple(line) for line in value["covariance"]))
    names = {field.name for field in fields(Coefficients)} - {"posterior"}
    return Coefficients(posterior, **{name: value[name] for name in names})


def data_notes(work: Workload) -> list[str]:
    """Return what the user should know about the published runs behind an estimate."""
    notes = []
    if class_of(work) not in coefficients().families:
        notes.append(f"no data: no published run is in the class ({class_of(work)}); the interval is wider")
    if work.stack is None and is_low_precision(work):
        notes.append(f"{work.precision} gains more with some stacks: give --stack {', '.join(STACKS)}")
    return notes


def run_weight(wall_hours: float) -> float:
    """Return the share of long runs' losses for a run of this length: 0 at once, 1 after weeks."""
    return -math.expm1(-wall_hours / _LONG_RUN_HOURS)


def mfu_belief(work: Workload, weight: float = 1.0, known: Coefficients | None = None) -> MfuBelief:
    """Return the expected MFU of `work`.

    Args:
        weight: run_weight of its length; 1 for a long run, 0 for a measured step.
        known: coefficients to use instead of the packaged ones.
    """
    known = known or coefficients()
    families = known.families.get(class_of(work), 0)
    values = features(work, weight * known.run_share)
    x = [values[name] for name in NAMES]
    effects = {name: b * v for name, b, v in zip(NAMES, known.posterior.mean, x, strict=True) if v}
    if work.precision in SLOWER:
        effects["precision"] = math.log(SLOWER[work.precision])
    mean = math.fsum(effects.values())
    # A second forward pass lowers the reachable maximum.
    passes = 4 / 3 if work.recompute == "full" else 1
    most = math.log(_REACHABLE * _PEAK_FACTORS.get(work.precision, 1.0) / passes)
    scale = known.width_scale**2  # widens by the errors on left-out families
    level, attention, experts, fp8 = shared_effects(work, known.family_sd)
    variances = {
        "software stack and its tuning": scale * (level**2 + fp8**2),
        "attention kernel": scale * attention**2,
        "exchange between experts": scale * experts**2,
        "between runs of one team": scale * (known.noise_sd**2 + weight * known.run_noise_sd**2),
        "few published runs like this one": scale * (known.posterior.variance(x) + few_variance(families)),
        "what goes wrong in a long run": (weight * known.run_spread) ** 2,
    }
    return MfuBelief(min(mean, most), math.sqrt(math.fsum(variances.values())), effects, variances, families)
