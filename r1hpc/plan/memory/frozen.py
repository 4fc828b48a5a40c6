"""Compute the memory of the frozen weights under adapters, and check whether 4 bits are possible.

frozen_bytes(config, shape, world_size=8)      # on one rank; 0 without adapters
check_base(config)                             # at submission
check_base_shape(config, hf_config)
"""

from collections.abc import Mapping
from typing import Any

from r1hpc.base.errors import ConfigError, UsageError
from r1hpc.config.schema.run import RunConfig
from r1hpc.plan.memory.step import WEIGHT_BYTES
from r1hpc.plan.model.families import UnknownModelError
from r1hpc.plan.model.shape import ModelShape, model_shape

QUANTIZED_WEIGHTS = ("zero_quantized_weights", "zero_quantized_nontrainable_weights")
"""ZeRO++'s keys for sending weights in 8 bits."""
_NF4_BYTES = 0.5
NF4_BLOCK = 64
"""Weights per scale."""
_SCALE_BYTES = 4 / NF4_BLOCK
"""Per weight in NF4: an fp32 number for each block. Under ZeRO 3 every rank has all of them."""


def is_quantized(config: RunConfig) -> bool:
    """True if the frozen weights are in 4 bits, and in no checkpoint."""
    return config.model.base_quantization == "nf4"


def frozen_bytes(config: RunConfig, shape: ModelShape, world_size: int = 1) -> float:
    """Return the bytes on each of `world_size` ranks that share them; 0 without adapters."""
    if not config.model.lora_rank:
        return 0.0
    width = WEIGHT_BYTES[config.train.precision]
    if not is_quantized(config):
        return shape.num_parameters * width / world_size
    layers = shape.num_matmul_parameters - shape.vocab_size * shape.hidden_size
    rest = shape.num_parameters - layers
    return (layers * _NF4_BYTES + rest * width) / world_size + layers * _SCALE_BYTES


def check_base(config: RunConfig) -> None:
    """Refuse settings that conflict with a base in 4 bits.

    Raises:
        UsageError: names an alternative.
    """
    if not is_quantized(config):
        return
    zero = config.deepspeed.extra.get("zero_optimization")
    for key in QUANTIZED_WEIGHTS:
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
    """Refuse a base in 4 bits if `check_nf4` refuses its model; unknown families pass.

    Args:
        hf_config: its config.json as a dictionary.

    Raises:
        ConfigError: as `check_nf4`.
    """
    if not is_quantized(config):
        return
    try:
        shape = model_shape(hf_config)
    except UnknownModelError:
        return
    check_nf4(shape)


def check_nf4(shape: ModelShape) -> None:
    """Refuse a model that would mostly stay unquantised, or would be read wrongly.

    Raises:
        ConfigError: a mixture of experts, or widths that are no multiples of 64.
    """
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
