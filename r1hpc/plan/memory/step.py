"""Compute the GPU memory of a training step, and the bytes of a checkpoint.

States after ZeRO (Rajbhandari et al., arXiv 1910.02054, section 3.1 and figure 1). Activations by the method
of Korthikanti et al. (arXiv 2205.05198, section 4): every tensor that a layer keeps for its backward pass.
Their 34 s b h is for GELU, LayerNorm and dropout; here it is what transformers' own layers keep, without
dropout, and without the scores (5as/h), which fused attention (sdpa, flash) never stores. It is within 6 % of
what autograd saves (OLMo 2 in bf16: 12 % low; Gemma 2's attention is not fused, so its scores come on top).
Inside the optimizer's step DeepSpeed expands the gradients, after activations are freed. Not counted: the
CUDA context, communication buckets, fragmentation.
"""

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from typing import Any

from r1hpc.base.units import GIB
from r1hpc.config.schema.run import Precision, RunConfig
from r1hpc.config.stages import is_rl
from r1hpc.plan.model.shape import ModelShape

WEIGHT_BYTES = {Precision.bf16: 2, Precision.fp16: 2, Precision.fp32: 4, Precision.fp8: 2}
_MOMENT_BYTES = 8
"""Adam's two moments, fp32."""
_MASTER_BYTES = 4
"""The fp32 copy of the weights."""
_BUCKET_ELEMENTS = 5e8
"""DeepSpeed's default reduce_bucket_size."""
_LIVE_ELEMENTS = 1e9
"""DeepSpeed's default stage3_max_live_parameters."""
_SUB_GROUP_ELEMENTS = 1e9
"""DeepSpeed's default sub_group_size: what a rank updates at a time under ZeRO 3."""
_FP32_BYTES, _NORM_BYTES = 4, 8
"""The master weights, and their gradients, are fp32; norms are computed in fp64."""
_UNFUSED_BYTES = 8
"""Working memory of torch's unfused AdamW, as on a CPU: two fp32 tensors of the largest's size."""
LOSS_TENSORS = 3
"""Tensors as large as the logits, in fp32, in the backward pass of cross-entropy: log-softmax, the incoming
and the outgoing gradient."""
_ENTROPY_TENSORS = 2
"""More if the loss also gets the entropy; like the next two measured (tests/plan/test_logits_peak.py), for
full logits in bf16: for a chunk it is one less."""
_DIVERGENCE_TENSORS, _MIXTURE_TENSORS = 3, 7
"""More for the divergence to a teacher, pure or mixed."""
_LOGITS_BYTES = 256 * 2**20
"""Default of a chunk of fp32 logits: large enough to keep a GPU busy."""


class Peak(Enum):
    """The phase with the most memory on a GPU."""

    passes = "in a backward pass"
    step = "in the optimizer's step"
    sampling = "while completions are sampled"


@dataclass(frozen=True)
class MemoryPlan:
    """GiB on one GPU."""

    parameters_gib: float
    gradients_gib: float
    optimizer_gib: float
    activations_gib: float
    logits_gib: float
    buffers_gib: float = 0.0
    """DeepSpeed's: a bucket to reduce gradients in, and under ZeRO 3 the weights gathered at a time."""
    step_gib: float = 0.0
    """The optimizer step's memory beside the states: fp32 gradients, and buffers to copy them."""
    released_gib: float = 0.0
    """The part of the buffers that is free in that step."""
    reference_gib: float = 0.0
    """Stage rl: the reference of the KL, placed by rl.reference."""
    sampler_gib: float = 0.0
    """During sampling: the cache and, under ZeRO 3, a full policy; or vLLM's share, or its minimum if the
    share is too small."""
    sampler_stays: bool = False
    """True if it stays during the updates: vLLM that does not sleep."""
    host_gib: float = 0.0
    """A node's memory, not the GPU's: its ranks, and copied or offloaded data."""
    vllm_given_gib: float = 0.0
    """The memory rollout.vllm_options give it."""
    vllm_least_gib: float = 0.0
    """The least memory in which it starts."""
    way_out: str = ""
    """A sentence on how to make the run fit, if it does not."""

    @property
    def total_gib(self) -> float:
        """Return the peak. Forward and backward passes, the optimizer's step and sampling alternate; the
        states and the reference stay."""
        turns = (self.update_gib, self.sampler_gib)
        return self.staying_gib + (sum(turns) if self.sampler_stays else max(turns))

    @property
    def peak(self) -> Peak | None:
        """Return the phase of the peak; None if nothing is trained or sampled."""
        if not self.update_gib or (self.sampler_gib > self.update_gib and not self.sampler_stays):
            return Peak.sampling if self.sampler_gib else None
        in_passes = self.activations_gib + self.logits_gib
        return Peak.step if self.step_gib - self.released_gib > in_passes else Peak.passes

    @property
    def update_gib(self) -> float:
        """Return an update's memory beside what stays, in its larger phase."""
        return max(self.activations_gib + self.logits_gib, self.step_gib - self.released_gib)

    @property
    def staying_gib(self) -> float:
        """Return the memory used in every phase, except the released part of the buffers."""
        return self.states_gib + self.buffers_gib + self.reference_gib

    @property
    def states_gib(self) -> float:
        """Return the weights, gradients and moments."""
        return self.parameters_gib + self.gradients_gib + self.optimizer_gib

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "total_gib": self.total_gib, "peak": self.peak.name if self.peak else None}


@dataclass(frozen=True)
class Zero:
    """Adam's states on one rank under DeepSpeed's ZeRO. Counts are of parameters, results in bytes.

    Read from DeepSpeed 0.19.8 and measured (tests/plan/deepspeed_states.py). Pinned host memory, which torch
    allocates in powers of two, can take up to twice as much as counted here.
    """

    num_trained: int
    stage: int
    world_size: int
    precision: Precision
    largest: int
    """Parameters of the largest tensor."""
    num_frozen: int = 0
    together: int | None = None
    """Parameters of the largest group, since groups are updated one after the other; None: all."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """zero_optimization of DeepSpeed's config."""
    fused: bool = True
    """Adam is fused, as on a GPU."""

    @property
    def width(self) -> int:
        return WEIGHT_BYTES[self.precision]

    @property
    def states(self) -> tuple[float, float, float]:
        """Return (parameters, gradients, optimizer states). ZeRO paper, figure 1."""
        weights, optimizer = self.num_trained * self.width, _optimizer_bytes(self.precision, self.stage)
        return (
            weights / (self.world_size if self.stage >= 3 else 1),
            weights / (self.world_size if self.stage >= 2 else 1),
            self.num_trained * optimizer / (self.world_size if self.stage >= 1 else 1),
        )

    @property
    def buffers(self) -> float:
        """Return DeepSpeed's memory beside the states. ZeRO 1 and 2 hold the full bucket during a backward
        pass, ZeRO 3 always, however small the model; with overlap_comm two below ZeRO 3."""
        if self.stage == 0:
            return 0.0
        bucket = float(self.options.get("reduce_bucket_size", _BUCKET_ELEMENTS))
        if self.stage < 3:
            return self.width * bucket * (2 if self.options.get("overlap_comm") else 1)
        # ZeRO++'s hpZ: the weights once more, divided over a few ranks.
        near = int(self.options.get("zero_hpz_partition_size") or 1)
        second = (self.num_trained + self.num_frozen) / near if near > 1 else 0
        return self.width * (bucket + second) + self._gathered

    @property
    def released(self) -> float:
        """Return the part of the buffers free in the optimizer's step: all, or ZeRO 3's gathered weights."""
        return self.buffers if self.stage < 3 else self._gathered

    @property
    def _gathered(self) -> float:
        """Return the weights that ZeRO 3 gathers: it keeps them as long as it may."""
        most = float(self.options.get("stage3_max_live_parameters", _LIVE_ELEMENTS))
        return self.width * min(most, self.num_trained + self.num_frozen)

    @property
    def step(self) -> float:
        """Return the peak inside the optimizer's step, beside the states.

        Without ZeRO bf16 gradients get fp32 copies (runtime/fp16/unfused_optimizer.py, step). With it those
        of the rank's part, under ZeRO 3 of a sub group, are laid into one tensor that is then made fp32,
        while they are still there (zero/stage_1_and_2.py, step; zero/stage3.py,
        _prepare_fp32_grad_for_sub_group); ZeRO 1 has freed the rest by then. Before that the norm makes an
        fp64 copy of one gradient after the other (get_grad_norm_direct).
        """
        converted = 0 if self.width == _FP32_BYTES else _FP32_BYTES
        if self.stage == 0:
            return self.num_trained * converted + (0 if self.fused else _UNFUSED_BYTES * self.largest)
        part = (self.num_trained if self.together is None else self.together) / self.world_size
        largest_part = min(part, self.largest / (self.world_size if self.stage == 3 else 1))
        if self.stage == 3:  # the tensor that fills it closes a sub group
            part = min(part, float(self.options.get("sub_group_size", _SUB_GROUP_ELEMENTS)) + largest_part)
        copies = self.width + converted
        if not self.fused:
            copies = max(copies, _FP32_BYTES + _UNFUSED_BYTES)
        others = self.num_trained - self.num_trained / self.world_size
        freed = self.width * others if self.stage == 1 else 0.0
        return max(_NORM_BYTES * largest_part, copies * part - freed)

    @property
    def offloaded(self) -> float:
        """Return the host memory of an offloaded optimizer.

        It holds fp32 gradients beside master weights and moments, and incoming gradients: of one tensor and
        those of earlier micro batches (ZeRO 1 leaves these on the GPU), or under ZeRO 3 all; below it new
        weights go through a buffer.
        """
        part = self.num_trained / self.world_size
        held = part * (_MASTER_BYTES + _MOMENT_BYTES + _FP32_BYTES + self.width)
        if self.stage == 3:
            return held
        return held + self.width * self.largest + (self.width * part if self.stage == 2 else 0.0)

    @property
    def offload_buffers(self) -> float:
        """Return the GPU memory for that: below ZeRO 3 a gradient on its way, and its part in fp64 for the
        norm, taken in the backward pass (async_accumulate_grad_in_cpu_via_gpu,
        set_norm_for_param_grad_in_gpu)."""
        if self.stage == 3:
            return _NORM_BYTES * self.largest / self.world_size
        return self.width * self.largest + _NORM_BYTES * min(self.largest, self.num_trained / self.world_size)


def memory_per_gpu(
    shape: ModelShape,
    zero: Zero,
    *,
    micro_batch_size: int,
    seq_len: float,
    activation_checkpointing: bool,
    logits_chunk_tokens: int | None = None,
    is_offloaded: bool = False,
) -> MemoryPlan:
    """Return one GPU's memory at the peak of a step with Adam; `host_gib` is what the rank has offloaded."""
    tokens = micro_batch_size * seq_len
    parameters, gradients, optimizer = zero.states
    layer = zero.width * shape.saved_values + 4 * shape.saved_fp32_values
    kept = shape.num_layers * layer
    if activation_checkpointing:
        # Full recomputation keeps each layer's input, and rebuilds one layer at a time.
        kept = shape.num_layers * zero.width * shape.hidden_size + layer
    plan = MemoryPlan(
        parameters_gib=parameters / GIB,
        gradients_gib=gradients / GIB,
        optimizer_gib=optimizer / GIB,
        activations_gib=tokens * kept / GIB,
        logits_gib=logits_bytes(shape, tokens, logits_chunk_tokens, LOSS_TENSORS) / GIB,
        buffers_gib=zero.buffers / GIB,
        step_gib=zero.step / GIB,
        released_gib=zero.released / GIB,
    )
    if not is_offloaded:
        return plan
    return replace(
        plan,
        gradients_gib=plan.gradients_gib if zero.stage < 2 else 0.0,
        optimizer_gib=0.0,
        step_gib=0.0,
        buffers_gib=plan.buffers_gib + zero.offload_buffers / GIB,
        host_gib=zero.offloaded / GIB,
    )


def logits_bytes(shape: ModelShape, tokens: float, chunk_tokens: int | None, tensors: int) -> float:
    """Return the peak of a loss over `tokens`, with one chunk's logits at once in so many fp32 `tensors`."""
    if shape.changes_logits:  # the loss reads them after the cap, whose result is kept too
        return 4.0 * tokens * shape.vocab_size * (tensors + 1)
    return 4.0 * min(tokens, logits_at_once(chunk_tokens, shape.vocab_size)) * shape.vocab_size * tensors


def logits_at_once(chunk_tokens: int | None, vocab_size: int) -> int:
    """Return the tokens whose logits are held together (train.logits_chunk_tokens; None: 256 MiB; 0: all)."""
    if chunk_tokens is None:
        return max(1, _LOGITS_BYTES // (4 * vocab_size))
    return chunk_tokens or sys.maxsize


def rl_tensors(config: RunConfig) -> int:
    """Return logits_bytes' `tensors` for an update of stage rl."""
    tensors = LOSS_TENSORS + _ENTROPY_TENSORS
    if config.rl.teacher is None:
        return tensors
    return tensors + (_DIVERGENCE_TENSORS if config.rl.jsd_beta in (0, 1) else _MIXTURE_TENSORS)


def largest_tensor(shape: ModelShape) -> int:
    """Return the parameters of the largest tensor: the embedding, or in a mixture the first projections of a
    layer's experts, which transformers holds together, counted as two thirds of a layer."""
    table = shape.vocab_size * shape.hidden_size
    if shape.num_active_parameters == shape.num_parameters:
        return table
    return max(table, 2 * (shape.num_body_parameters - table) // (3 * shape.num_layers))


def reference_place(config: RunConfig) -> str:
    """Return the place of the reference or teacher: none, whole, divided or host (rl.reference)."""
    is_own = config.rl.teacher is None
    if not is_rl(config.stage) or (is_own and (config.rl.kl_coef == 0 or config.model.lora_rank)):
        return "none"
    if config.rl.reference != "auto":
        return config.rl.reference
    return "divided" if config.deepspeed.zero_stage == 3 else "whole"


def checkpoint_bytes(num_trained: int, precision: Precision, zero_stage: int, num_frozen: int = 0) -> int:
    """Return the bytes DeepSpeed writes, over all ranks: optimizer states, the weights below ZeRO 3, and the
    frozen weights under adapters.

    Per parameter 14 for bf16 and fp16, 12 with ZeRO 3 (its weights come back from the fp32 copy); for fp32
    12 without ZeRO or with ZeRO 3, 16 with ZeRO 1 and 2. Measured with DeepSpeed 0.19.8, one rank, 5.3 M
    parameters: 14.01, 12.01, 12.01 and 16.01 (fp16 not measured: DeepSpeed refuses it on a CPU).
    """
    weights = 0 if zero_stage == 3 else WEIGHT_BYTES[precision]
    trained = num_trained * (weights + _optimizer_bytes(precision, zero_stage))
    return trained + num_frozen * WEIGHT_BYTES[precision]


def _optimizer_bytes(precision: Precision, zero_stage: int) -> int:
    """Return bytes per parameter. ZeRO keeps a copy even of fp32 weights; plain fp32 Adam keeps none."""
    if precision is Precision.fp32 and zero_stage == 0:
        return _MOMENT_BYTES
    return _MASTER_BYTES + _MOMENT_BYTES
