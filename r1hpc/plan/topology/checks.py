"""Check settings that exclude each other: precision, adapters in 4 bits, gradient compression, and ranks that
share a sequence.

Most depend on the run's GPUs or model, so the schema cannot check them: the plan and train/workload.py do.
"""

from collections.abc import Mapping
from typing import Any

from r1hpc.base.errors import ConfigError, UsageError
from r1hpc.config.schema.run import OWN_ATTENTIONS, Precision, RunConfig
from r1hpc.config.stages import is_supervised, samples, trains
from r1hpc.plan.model.families import UnknownModelError
from r1hpc.plan.model.shape import ModelShape, model_shape
from r1hpc.plan.topology.gpus import gpu_type_of, known_card

_ATTENTIONS = ("sdpa", "softmax", *OWN_ATTENTIONS)
"""Attentions called with complete heads and a mask."""
_LENGTH_BOUND_ROPE = ("dynamic", "longrope", "su")
"""Rotary frequencies that depend on the longest current position, which differs between ranks; `su` is an
older name for longrope."""
_QUANTIZED_WEIGHTS = ("zero_quantized_weights", "zero_quantized_nontrainable_weights")
"""ZeRO++'s keys for sending weights in 8 bits."""
NF4_BLOCK = 64
"""Weights per scale."""


def check_layout(config: RunConfig) -> None:
    """Raise UsageError for settings that exclude each other; resources.gpus_per_node must be decided."""
    check_precision(config)
    if is_quantized(config):
        _check_base(config)
    if config.deepspeed.extra:
        _check_hpz(config)
    if config.train.gradient_compression != "none":
        _check_compression(config)


def check_precision(config: RunConfig) -> None:
    """Raise UsageError for a precision that the run cannot have; resources.gpus_per_node must be decided."""
    precision, on_gpus = config.train.precision, bool(config.resources.gpus_per_node)
    if trains(config.stage) and not on_gpus and precision is Precision.fp16:
        raise UsageError(
            "train.precision=fp16 trains on GPUs only, and resources.gpus_per_node is 0: take "
            "train.precision=bf16 or fp32"
        )
    if precision is not Precision.fp8:
        return
    if not is_supervised(config.stage):
        raise UsageError(
            f"train.precision=fp8 is for the stages pretrain and sft: a model samples in bf16, "
            f"and {config.stage} would compare one with the other; take train.precision=bf16"
        )
    if config.model.lora_rank:
        raise UsageError(
            "train.precision=fp8 trains whole weights, and model.lora_rank asks for adapters: take "
            "train.precision=bf16 with them, or model.lora_rank=0"
        )
    if config.deepspeed.zero_stage == 3 and not config.model.activation_checkpointing:
        # Seen in torchao 0.18: each Float8Linear saves the gathered weight for its backward pass.
        raise UsageError(
            "train.precision=fp8 under deepspeed.zero_stage=3 would keep every layer's whole weights on each "
            "GPU until the backward pass: add model.activation_checkpointing=true, or take zero_stage=2"
        )
    if not config.train.fp8_emulate:
        _check_card(config)


def check_new_precision(config: RunConfig) -> None:
    """Raise UsageError for what works badly in a new run: fp16 without ZeRO, and bf16 on a card without it,
    where torch emulates it and no fused attention accepts it. An older run cannot change either."""
    precision, has_own_scale = config.train.precision, "fp16" in config.deepspeed.extra
    without_zero = trains(config.stage) and config.deepspeed.zero_stage == 0
    if precision is Precision.fp16 and without_zero and not has_own_scale:
        # Its FP16_UnfusedOptimizer divides the gradients by a scale that the loss never had (0.19.8, run).
        raise UsageError(
            "train.precision=fp16 hardly learns under deepspeed.zero_stage=0, where DeepSpeed scales no "
            "loss: take deepspeed.zero_stage=1"
        )
    if precision is not Precision.bf16 or not (trains(config.stage) or samples(config.stage)):
        return
    card = known_card(gpu_type_of(config)) if config.resources.gpus_per_node else None
    if card is not None and not card.has_bf16:
        raise UsageError(
            f"{card.name} has no bf16 arithmetic (that begins with Ampere), and would emulate it slowly: "
            "take train.precision=fp16 with deepspeed.zero_stage=1 or higher, or fp32"
        )


def _check_card(config: RunConfig) -> None:
    instead = (
        "take train.precision=bf16, or train.fp8_emulate=true to see what FP8's rounding does to the loss "
        "(slower than bf16)"
    )
    if not config.resources.gpus_per_node:
        raise UsageError(f"train.precision=fp8 computes on GPUs, and resources.gpus_per_node is 0: {instead}")
    gpu_type = gpu_type_of(config)
    if gpu_type is None:
        raise UsageError(
            "train.precision=fp8: not every card has it (it begins with Ada and Hopper, an A100 has none); "
            "say which there are, for example cluster.gpu_type=h100"
        )
    card = known_card(gpu_type)  # None: the node checks
    if card is not None and not card.has_fp8:
        raise UsageError(f"{card.name} has no FP8 arithmetic (that begins with Ada and Hopper): {instead}")


def is_quantized(config: RunConfig) -> bool:
    """True if the frozen weights are in 4 bits, and in no checkpoint."""
    return config.model.base_quantization == "nf4"


def _check_base(config: RunConfig) -> None:
    zero = config.deepspeed.extra.get("zero_optimization")
    for key in _QUANTIZED_WEIGHTS:
        if isinstance(zero, Mapping) and zero.get(key):
            raise UsageError(
                f"deepspeed.extra.zero_optimization.{key} would round what model.base_quantization=nf4 has "
                "packed into 4 bits: leave one out"
            )
    if config.deepspeed.zero_stage == 3 and not config.model.activation_checkpointing:
        # Seen in bitsandbytes 0.50.2: MatMul4Bit keeps the gathered weight for its backward pass.
        raise UsageError(
            "model.base_quantization=nf4 under deepspeed.zero_stage=3 would keep every layer's whole weights "
            "on each GPU until the backward pass: add model.activation_checkpointing=true, or take "
            "zero_stage=2, which divides the adapters' states and leaves the weights whole"
        )


def check_base_shape(config: RunConfig, hf_config: Mapping[str, Any]) -> None:
    """Refuse a base in 4 bits if `check_nf4` refuses its model; unknown families pass."""
    try:
        shape = model_shape(hf_config)
    except UnknownModelError:
        return
    check_nf4(shape)


def check_nf4(shape: ModelShape) -> None:
    """Raise ConfigError for a model that would mostly stay unquantised (a mixture of experts), or would be
    read wrongly (widths that are no multiples of 64)."""
    if shape.num_active_parameters < shape.num_parameters:
        raise ConfigError(
            f"model.base_quantization=nf4 rounds linear layers, and the experts of a {shape.model_type} are "
            "none: transformers holds those of a layer in one tensor; take model.base_quantization=none"
        )
    for width in (shape.hidden_size, shape.num_attention_heads * shape.head_dim, shape.intermediate_size):
        if width % NF4_BLOCK:
            raise ConfigError(refused_width(width))


def refused_width(width: int) -> str:
    """Explain why a linear layer with so many inputs cannot be in 4 bits."""
    # On a CPU bitsandbytes 0.50.2 silently makes other weights of it: the wrong block's scale.
    return (
        f"model.base_quantization=nf4 rounds rows in blocks of {NF4_BLOCK}, and the model has linear layers "
        f"of {width} inputs: bitsandbytes reads such rows wrongly on a CPU, where exports are made; take "
        "model.base_quantization=none"
    )


def _check_compression(config: RunConfig) -> None:
    setting = f"train.gradient_compression={config.train.gradient_compression}"
    if not trains(config.stage):
        raise UsageError(f"{setting} has no use in stage {config.stage}, which has no gradients: remove it")
    if config.deepspeed.zero_stage:
        raise UsageError(
            f"{setting} is for deepspeed.zero_stage=0, and this run has {config.deepspeed.zero_stage}, where "
            "DeepSpeed averages gradients in parts of its own: take zero_stage=0 if the memory plan allows, "
            "or train.gradient_compression=none; for ZeRO 3 see ZeRO++ in docs/training.md"
        )
    if config.model.lora_rank:
        raise UsageError(
            f"{setting}: the gradients of adapters (model.lora_rank={config.model.lora_rank}) are small as "
            "they are: take train.gradient_compression=none"
        )
    if config.train.precision is Precision.fp16:
        raise UsageError(
            f"{setting} does not go with train.precision=fp16: what a step leaves to the next is of the loss "
            "scale of the moment, and an overflow would stay in it; take bf16 or fp32"
        )


def _check_hpz(config: RunConfig) -> None:
    zero, key = config.deepspeed.extra.get("zero_optimization"), "zero_hpz_partition_size"
    near = int(zero.get(key) or 1) if isinstance(zero, Mapping) else 1
    if near <= 1:
        return
    if config.deepspeed.zero_stage != 3:
        raise UsageError(
            f"deepspeed.extra.zero_optimization.{key} is of deepspeed.zero_stage=3, and this run has "
            f"{config.deepspeed.zero_stage}: remove it"
        )
    resources = config.resources
    ranks = resources.nodes * (resources.gpus_per_node or resources.ranks_per_node)
    if ranks % near:
        raise UsageError(
            f"deepspeed.extra.zero_optimization.{key}: {near} does not divide the run's {ranks} ranks: take "
            "the number of ranks on a node"
        )


def check_sequence_parallel(config: RunConfig, ranks_per_node: int) -> None:
    """Raise ConfigError for what settings and ranks do not allow if ranks share a sequence."""
    size = config.train.sequence_parallel
    asked = f"train.sequence_parallel={size}"
    if not is_supervised(config.stage):
        raise ConfigError(
            f"{asked} is for pretraining and fine-tuning only (stages pretrain and sft), and the "
            f"stage is {config.stage}: leave it out"
        )
    if ranks_per_node % size:
        raise ConfigError(
            f"{asked} must divide the {ranks_per_node} ranks of a node, because those that share a sequence "
            f"are on one node: {_choices(ranks_per_node)}"
        )
    if config.data.seq_len % size:
        up = -(-config.data.seq_len // size) * size
        raise ConfigError(f"{asked} must divide data.seq_len={config.data.seq_len}: take data.seq_len={up}")
    if config.train.precision is Precision.fp8 and config.train.fp8_recipe == "tensorwise":
        raise ConfigError(
            f"{asked} does not go with train.fp8_recipe=tensorwise, whose scales are of the tokens that a "
            "rank holds: take train.fp8_recipe=rowwise"
        )
    if config.data.packing:
        raise ConfigError(f"{asked} does not go with data.packing: set data.packing=false, or {asked[:-1]}1")
    if config.model.attn_implementation not in _ATTENTIONS:
        raise ConfigError(
            f"{asked} does not go with model.attn_implementation={config.model.attn_implementation}: take "
            f"one of {', '.join(_ATTENTIONS)} (on GPUs sdpa is torch's own flash attention)"
        )


def check_model_divides(config: RunConfig, model: Mapping[str, Any]) -> None:
    """Raise ConfigError for heads or positions that do not divide; works on any model_type.

    What a config does not show, such as a state along the sequence, is tried on the ranks. `model` is a
    config.json under Llama's names (plan.model.shape.canonical).
    """
    size = config.train.sequence_parallel
    heads = model.get("num_attention_heads")
    groups = model.get("num_key_value_heads") or heads
    if isinstance(heads, int) and isinstance(groups, int) and (heads % size or groups % size):
        raise ConfigError(
            f"train.sequence_parallel={size} must divide the model's {heads} attention heads and {groups} "
            f"key-value heads: {_choices(groups)}"
        )
    found = [name for name in _LENGTH_BOUND_ROPE if name in rope_types(model)]
    if found:
        raise ConfigError(
            f"train.sequence_parallel={size}: the model's rotary frequencies ({found[0]}) follow from the "
            "length of what a rank holds, and would differ between the ranks: set train.sequence_parallel=1"
        )


def _choices(number: int) -> str:
    return f"take one of {', '.join(str(n) for n in range(1, number + 1) if number % n == 0)}"


def rope_types(values: Any) -> set[str]:
    """Return the rope types of a config.json, wherever they are in it."""
    if not isinstance(values, Mapping):
        return set()
    own = {str(values[key]) for key in ("rope_type", "type") if key in values}
    return own.union(*map(rope_types, values.values()))
