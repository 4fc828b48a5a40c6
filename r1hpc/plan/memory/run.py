"""Compute a run's peak memory on each GPU and node, whether it fits, and what a checkpoint takes.

step.py counts one step of full training; this adds adapters, reference, sampler and host memory.

A step of stage rl has three phases: sampling, with the cache and the sampling model; the passes of the
update, with activations and logits; and the optimizer's step, with fp32 gradients. Training states and the
reference are there in all of them. Weights under adapters (LoRA) have neither gradients nor moments, and may
be in 4 bits.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from r1hpc.base.units import GIB, parse_memory_gib
from r1hpc.config.schema.run import SDPA, RunConfig
from r1hpc.config.stages import is_rl, is_server, samples, trains
from r1hpc.plan.memory.step import (
    WEIGHT_BYTES,
    MemoryPlan,
    Peak,
    Zero,
    checkpoint_bytes,
    largest_tensor,
    logits_bytes,
    memory_per_gpu,
    reference_place,
    rl_tensors,
)
from r1hpc.plan.memory.vllm import vllm_memory
from r1hpc.plan.model.shape import ModelShape
from r1hpc.plan.topology.batch import Topology
from r1hpc.plan.topology.checks import NF4_BLOCK, is_quantized
from r1hpc.plan.topology.parts import rows_together

USABLE = 0.95
"""Part of a card that PyTorch's allocator can really use; assumed."""
CONTEXT_GIB = 1.0
"""CUDA context, NCCL and cuBLAS workspaces; assumed."""
_PROCESS_GIB = 3.0
"""A rank's own in host memory: Python, torch, CUDA. Assumed for a GPU; 0.6 was measured on a CPU."""

_NF4_BYTES = 0.5
_SCALE_BYTES = 4 / NF4_BLOCK
"""Per weight in NF4: an fp32 number for each block. Under ZeRO 3 every rank has all of them."""
COMMON_CARD_GIB = 80.0
"""An A100's or H100's, used if the GPU type is unknown."""


def memory_of_run(
    config: RunConfig,
    shape: ModelShape,
    topology: Topology,
    seq_len: int,
    card_gib: float = COMMON_CARD_GIB,
    teacher_parameters: int | None = None,
) -> MemoryPlan:
    """Return the memory at the peak, in GiB; raise ConfigError as vllm_memory.

    Args:
        seq_len: of the longest sequence.
        card_gib: memory of a GPU, of which vLLM takes a share.
        teacher_parameters: of rl.teacher, if there is one.
    """
    train, width = config.train, WEIGHT_BYTES[config.train.precision]
    stage, world = config.deepspeed.zero_stage, topology.world_size
    if samples(config.stage) and not trains(config.stage):
        weights = shape.num_parameters * width / GIB  # a complete model on each rank
        plan = _with_sampler(_weights_alone(weights), config, shape, topology, card_gib)
        return replace(plan, host_gib=topology.ranks_per_node * _PROCESS_GIB)
    if is_server(config.stage):
        weights = shape.num_parameters * (4 if config.serve.dtype == "float32" else 2) / GIB
        host = topology.num_gpus * _PROCESS_GIB if topology.num_gpus else _PROCESS_GIB + weights
        return replace(_weights_alone(weights / max(1, topology.num_gpus)), host_gib=host)
    trained, whole, frozen = num_trained(config, shape), 0.0, 0.0
    if config.model.lora_rank:
        whole = frozen_bytes(config, shape)
        frozen = frozen_bytes(config, shape, world) if stage == 3 else whole
    options = _zero_options(config)
    zero = Zero(
        trained,
        stage,
        world,
        train.precision,
        largest=min(largest_tensor(shape), trained),
        num_frozen=int(whole / width),
        together=min(trained, shape.num_parameters),  # a critic is a separate group
        options=options,
        fused=bool(topology.num_gpus),
    )
    base = memory_per_gpu(
        shape,
        zero,
        micro_batch_size=train.micro_batch_size,
        seq_len=-(-seq_len // train.sequence_parallel),
        activation_checkpointing=config.model.activation_checkpointing,
        logits_chunk_tokens=train.logits_chunk_tokens,
        is_offloaded=_optimizer_is_away(config),
    )
    weights_gib, away = base.parameters_gib + frozen / GIB, base.host_gib * GIB
    if stage == 3 and _is_off_gpu(options, "offload_param"):
        weights_gib, away = 0.0, away + weights_gib * GIB
    packed = _packed_bytes(config, shape, seq_len) if topology.num_gpus else 0.0
    plan = replace(
        base,
        parameters_gib=weights_gib,
        gradients_gib=base.gradients_gib + error_bytes(config, shape) / GIB,
        buffers_gib=base.buffers_gib + exchange_bytes(config, shape) / GIB,
        activations_gib=base.activations_gib * (2 if _has_critic(config) else 1) + packed / GIB,
    )
    if is_rl(config.stage):
        on_device, on_host = _reference(config, shape, world, teacher_parameters)
        away += on_host
        logits_gib = _rl_logits_bytes(config, shape) / GIB
        plan = replace(plan, logits_gib=logits_gib, reference_gib=on_device / GIB)
        plan = _with_sampler(plan, config, shape, topology, card_gib)
    host = _host_gib(config, shape, topology, away)
    if not topology.num_gpus:
        host += topology.ranks_per_node * plan.total_gib
    return replace(plan, host_gib=host)


def _packed_bytes(config: RunConfig, shape: ModelShape, seq_len: int) -> float:
    """Return the bytes that sdpa keeps for the backward pass if documents share a row.

    It turns the mask into numbers in each layer (torch, convert_boolean_attn_mask), and with a mask it groups
    no heads, so keys and values are repeated (transformers, use_gqa_in_sdpa). Read, not measured.
    """
    model, rows = config.model, config.train.micro_batch_size
    if not config.data.packing or model.attn_implementation not in SDPA:
        return 0.0
    repeated = 2 * (shape.num_attention_heads - shape.num_key_value_heads) * shape.head_dim
    layer = rows * seq_len * (seq_len + repeated) * WEIGHT_BYTES[config.train.precision]
    return float(layer * (1 if model.activation_checkpointing else shape.num_layers))


def frozen_bytes(config: RunConfig, shape: ModelShape, world_size: int = 1) -> float:
    """Return the bytes of the weights under adapters on each of `world_size` ranks that share them."""
    width = WEIGHT_BYTES[config.train.precision]
    if not is_quantized(config):
        return shape.num_parameters * width / world_size
    layers = shape.num_matmul_parameters - shape.vocab_size * shape.hidden_size
    rest = shape.num_parameters - layers
    return (layers * _NF4_BYTES + rest * width) / world_size + layers * _SCALE_BYTES


def is_offloaded(config: RunConfig) -> bool:
    """True if DeepSpeed keeps states or weights in host memory or on NVMe, which costs time."""
    return _optimizer_is_away(config) or _is_off_gpu(_zero_options(config), "offload_param")


def misfits(plan: MemoryPlan, *, gpu_gib: float | None, host_gib: float | None) -> Iterator[str]:
    """Yield sentences: what does not fit, what uses the memory, and what would help. None: memory unknown."""
    found = []
    if gpu_gib is not None and plan.total_gib > usable_gib(gpu_gib):
        card = f"a card of {gpu_gib:.0f} GiB has {usable_gib(gpu_gib):.0f}"
        found.append(f"each GPU would hold {held(plan, 0)}, and {card}")
    if gpu_gib is not None and plan.vllm_given_gib < plan.vllm_least_gib:
        found.append(
            f"vLLM starts in no less than {plan.vllm_least_gib:.1f} GiB of each GPU (the weights, what it "
            f"works in and a cache of one sequence), and has {plan.vllm_given_gib:.1f} by "
            "rollout.vllm_options (gpu_memory_utilization, 0.3 if not given, or kv_cache_memory_bytes)"
        )
    if found:
        yield "; ".join(["does not fit: " + ", and ".join(found), *filter(None, [plan.way_out])])
    if host_gib is not None and plan.host_gib > host_gib:
        yield (
            f"does not fit: a node would hold {plan.host_gib:.0f} GiB in its own memory, and the job asks "
            f"for {host_gib:.0f}: raise resources.mem"
        )


def asked_host_gib(config: RunConfig) -> float | None:
    """Return the GiB that a job requests per node; None if unknown, or all of the node's (--mem=0)."""
    asked = config.resources.mem or config.cluster.mem
    try:
        return (parse_memory_gib(asked) or None) if asked else None
    except ValueError:  # left for sbatch to refuse
        return None


def usable_gib(card_gib: float) -> float:
    """Return the part of a card's memory that a run can use."""
    return card_gib * USABLE - CONTEXT_GIB


def held(plan: MemoryPlan, digits: int = 1) -> str:
    """Describe a GPU's peak: its size, when it occurs, and its parts, largest first."""
    parts = {
        "weights, gradients and moments": plan.states_gib,
        "reference": plan.reference_gib,
        "DeepSpeed's buffers": plan.buffers_gib,
    }
    if plan.peak is Peak.step:
        parts["DeepSpeed's buffers"] -= plan.released_gib
        parts["copies of gradients"] = plan.step_gib
    if plan.peak is Peak.passes:
        parts["activations and logits"] = plan.activations_gib + plan.logits_gib
    if plan.peak is Peak.sampling or plan.sampler_stays:
        parts["sampler"] = plan.sampler_gib
    told = ", ".join(
        f"{name} {gib:.1f}" for name, gib in sorted(parts.items(), key=lambda part: -part[1]) if gib >= 0.05
    )
    when = f" {plan.peak.value}" if plan.peak else ""
    return f"{plan.total_gib:.{digits}f} GiB{when} ({told})"


def _weights_alone(gib: float) -> MemoryPlan:
    return MemoryPlan(gib, gradients_gib=0.0, optimizer_gib=0.0, activations_gib=0.0, logits_gib=0.0)


def num_trained(config: RunConfig, shape: ModelShape) -> int:
    """Count all parameters, and under PPO the critic's body and value head; with LoRA the adapters of all
    linear layers."""
    if config.model.lora_rank:
        return config.model.lora_rank * adapter_widths(shape)
    if _has_critic(config):
        return shape.num_parameters + shape.num_body_parameters + shape.hidden_size + 1
    return shape.num_parameters


def _has_critic(config: RunConfig) -> bool:
    return is_rl(config.stage) and config.rl.algorithm == "ppo"


def error_bytes(config: RunConfig, shape: ModelShape) -> int:
    """Return the fp32 bytes that a rank holds, and saves, of train.gradient_compression's error."""
    return 0 if config.train.gradient_compression == "none" else 4 * num_trained(config, shape)


def exchange_bytes(config: RunConfig, shape: ModelShape) -> int:
    """Return the bytes a rank holds while gradients are compressed, read from train/parallel/compression.py.

    int8: some 6 bytes per value of the largest bucket, or of a larger tensor; powersgd: of the largest
    matrix.
    """
    largest = shape.vocab_size * shape.hidden_size
    if config.train.gradient_compression == "int8":
        return 6 * min(num_trained(config, shape), max(1 << 25, largest))
    return 4 * largest if config.train.gradient_compression == "powersgd" else 0


def saved_bytes(config: RunConfig, shape: ModelShape, world_size: int) -> int:
    """Return the bytes of a checkpoint, over all ranks."""
    return world_size * error_bytes(config, shape) + checkpoint_bytes(
        num_trained(config, shape),
        config.train.precision,
        config.deepspeed.zero_stage,
        0 if not config.model.lora_rank or is_quantized(config) else shape.num_parameters,
    )


def copied_bytes(config: RunConfig, shape: ModelShape, topology: Topology) -> tuple[int, int]:
    """Return the host memory for an asynchronous save's copy (of one rank, of one node).

    Each rank copies what it writes: an equal part, but without ZeRO rank 0 copies nearly all, the optimizer's
    state, and is counted with all. On a GPU the copies are in pinned memory, which torch allocates in powers
    of two: that can take up to twice as much.
    """
    world, ranks = topology.world_size, topology.ranks_per_node
    errors = error_bytes(config, shape)
    rest = saved_bytes(config, shape, world) - world * errors
    if config.deepspeed.zero_stage == 0:
        return rest + errors, rest + ranks * errors
    rank = -(-rest // world) + errors
    return rank, ranks * rank


def _rl_logits_bytes(config: RunConfig, shape: ModelShape) -> float:
    """Return the logits of an update: of scored completions, and all of a teacher's."""
    tokens = config.train.micro_batch_size * config.rollout.max_completion_length
    width = WEIGHT_BYTES[config.train.precision]
    taught = 0 if config.rl.teacher is None else tokens * shape.vocab_size * width
    return taught + logits_bytes(shape, tokens, config.train.logits_chunk_tokens, rl_tensors(config))


def adapter_widths(shape: ModelShape) -> int:
    """Return inputs plus outputs of all linear layers; a gated MLP's width follows from the parameters."""
    heads, shared = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    hidden = shape.hidden_size
    attention = 2 * hidden * (heads + shared)
    rest = (shape.num_matmul_parameters - shape.vocab_size * hidden) // shape.num_layers - attention
    mlp = 3 * (hidden + max(0, rest) // (3 * hidden))
    return shape.num_layers * (2 * (hidden + heads) + 2 * (hidden + shared) + mlp)


def _reference(
    config: RunConfig, shape: ModelShape, world_size: int, teacher_parameters: int | None
) -> tuple[float, float]:
    """Return the bytes of the reference or teacher on a rank's device and in its host memory."""
    whole = (teacher_parameters or shape.num_parameters) * WEIGHT_BYTES[config.train.precision]
    where = reference_place(config)
    if where == "whole":
        return whole, 0.0
    # Gathered layers of the reference and of the policy exist at different times.
    part = whole / world_size
    return part if where == "divided" else 0.0, part if where == "host" else 0.0


def _with_sampler(
    plan: MemoryPlan, config: RunConfig, shape: ModelShape, topology: Topology, card_gib: float
) -> MemoryPlan:
    vllm = vllm_memory(config, shape, topology, card_gib)
    if vllm is None:
        return replace(plan, sampler_gib=_sampler_gib(config, shape, topology))
    return replace(
        plan,
        sampler_gib=vllm.taken_gib,
        sampler_stays=not vllm.sleeps,
        vllm_given_gib=vllm.given_gib,
        vllm_least_gib=vllm.least_gib,
    )


def _sampler_gib(config: RunConfig, shape: ModelShape, topology: Topology) -> float:
    """Return the memory for the rows decoded together and, in stage rl under ZeRO 3, a full policy. For each
    row keys and values of a full-length sequence, one layer's twice, and logits."""
    width = WEIGHT_BYTES[config.train.precision]
    length = config.rollout.max_prompt_length + config.rollout.max_completion_length
    layer = 2 * shape.num_key_value_heads * shape.head_dim * width * length
    # fp32 logits of the next token, their probabilities and the running sums for choosing a token.
    row = layer * (shape.num_layers + 1) + 3 * 4 * shape.vocab_size
    cache = rows_together(config, topology.world_size) * row / GIB
    if not is_rl(config.stage) or config.deepspeed.zero_stage != 3:
        return cache
    if config.model.lora_rank:
        return frozen_bytes(config, shape) / GIB + cache
    return shape.num_parameters * width / GIB + cache


def _host_gib(config: RunConfig, shape: ModelShape, topology: Topology, offloaded: float) -> float:
    """Return a node's memory: its ranks, a full tensor each while a model is built, a save's copy, and
    `offloaded` bytes of each rank."""
    precision, ranks = config.train.precision, topology.ranks_per_node
    largest = shape.vocab_size * shape.hidden_size * (4 + WEIGHT_BYTES[precision])
    saved = copied_bytes(config, shape, topology)[1] if config.checkpoint.asynchronous else 0
    return ranks * _PROCESS_GIB + (ranks * (largest + offloaded) + saved) / GIB


def _zero_options(config: RunConfig) -> dict[str, Any]:
    found = config.deepspeed.extra.get("zero_optimization", {})
    return found if isinstance(found, dict) else {}


def _optimizer_is_away(config: RunConfig) -> bool:
    """True if the optimizer is offloaded; without ZeRO DeepSpeed ignores zero_optimization."""
    return config.deepspeed.zero_stage > 0 and _is_off_gpu(_zero_options(config), "offload_optimizer")


def _is_off_gpu(zero: dict[str, Any], what: str) -> bool:
    part = zero.get(what)
    return isinstance(part, dict) and part.get("device") in ("cpu", "nvme")
