"""Compute in low precision: frozen weights in 4 bits under adapters, and matrix products in FP8.

Both are for training; quantize/ makes the integers of an export.

QLoRA (arXiv 2305.14314), model.base_quantization=nf4:

bitsandbytes rounds every linear layer but the output head to NF4 in blocks of 64; embeddings, norms and the
head keep the training precision. A block's scale is its largest magnitude, and each weight the nearest of 16
values, so every attempt makes the same bits from the same files, and checkpoints hold adapters alone. The
paper's second quantisation, of the scales, is left out: it subtracts a mean of fp32 numbers, whose last bit
depends on the number of threads.

FP8 by torchao (Micikevicius et al., arXiv 2209.05433), train.precision=fp8:

Weights stay bf16 and the optimizer's fp32. Each linear layer rounds its input, its weight and its output's
gradient to 8 bits for each product, scaled by the current largest value: no state, so a checkpoint holds
nothing more. The output head is not rounded, as in torchao's own recipes, nor are layers with a side that is
no multiple of 16, which the hardware does not multiply.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from r1hpc.base.errors import ConfigError
from r1hpc.config.schema.run import TrainConfig
from r1hpc.plan.topology.checks import NF4_BLOCK, refused_width
from r1hpc.train.model.placement import Placement
from r1hpc.train.parallel.errors import ResumeError

_SIDE = 16
"""torch._scaled_mm takes multiples of it."""


def four_bits(place: Placement) -> dict[str, Any]:
    """Return arguments for from_pretrained to round each tensor as it is read, on its device."""
    from transformers import BitsAndBytesConfig

    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"model.base_quantization=nf4 needs bitsandbytes: pip install 'r1hpc[qlora]' ({error})"
        ) from None
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=False,
        bnb_4bit_compute_dtype=place.dtype,
        # ZeRO 3 gathers a layer's parameters in one tensor, which has one dtype.
        bnb_4bit_quant_storage=torch.uint8 if place.sharding is None else place.dtype,
    )
    return {"quantization_config": config, "device_map": {"": place.device}}


def finish(network: Any, dtype: torch.dtype) -> None:
    """Make what from_pretrained loaded ready: layers multiply in `dtype` and never repack, and the state
    holds each weight under one name. Raise ConfigError if no layer was rounded, or one whose blocks would be
    read wrongly."""
    layers = [module for module in network.modules() if is_nf4(getattr(module, "weight", None))]
    if not layers:
        raise ConfigError(
            f"model.base_quantization=nf4: {type(network).__name__} has no linear layer beside its head; "
            "take model.base_quantization=none"
        )
    odd = next((layer.in_features for layer in layers if layer.in_features % NF4_BLOCK), None)
    if odd is not None:
        raise ConfigError(refused_width(odd))
    for layer in layers:
        layer.weight.quant_state.dtype = dtype
        # On a CPU with AVX512-BF16 a layer in eval mode would repack its weight for a kernel without a
        # backward pass, and train on that (bitsandbytes 0.50.2).
        layer.support_avx512bf16_for_cpu = False
        # The scales come from the weights again, like the weight itself.
        layer.register_state_dict_post_hook(_without_scales)
    del network.config.quantization_config  # only this process uses it: an export is complete


def is_nf4(tensor: Any) -> bool:
    """True for a parameter of bitsandbytes."""
    return type(tensor).__name__ == "Params4bit"


def holds_nf4(network: nn.Module) -> bool:
    """True if each attempt makes the frozen weights anew, and no checkpoint holds them."""
    return any(map(is_nf4, network.parameters()))


def unsaved(network: nn.Module) -> set[str]:
    """Return every name of a frozen weight; exclude_frozen_parameters misses a tied one's second."""
    named = network.named_parameters(remove_duplicate=False)
    return {name for name, parameter in named if not parameter.requires_grad}


def dequantized(tensor: Any) -> torch.Tensor:
    """Return the weight (out, in) that four bits stand for, in the precision its layer multiplies in."""
    from bitsandbytes.functional import dequantize_4bit

    value: torch.Tensor = dequantize_4bit(tensor.data, tensor.quant_state)
    return value


def whole_size(tensor: Any) -> tuple[int, int]:
    """Return (elements, bytes of each) of `dequantized`."""
    state = tensor.quant_state
    return state.shape.numel(), state.dtype.itemsize


def is_turned(layer: Any) -> bool:
    """True if the original layer holds (in, out), as GPT-2's."""
    return getattr(layer, "source_cls", None) is Conv1D


def load_adapters(src: Mapping[str, torch.Tensor], dst: nn.Module) -> None:
    """Load a checkpoint's weights, by DeepSpeed's names; raise ResumeError for those of another network."""
    missing, unexpected = dst.load_state_dict(src, strict=False)
    lacking = sorted({*missing} - unsaved(dst))
    if lacking or unexpected:
        name = (lacking or sorted(unexpected))[0]
        raise ResumeError(
            f"the checkpoint is not of these adapters: it {'lacks' if lacking else 'holds'} {name}"
        )


def _without_scales(layer: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}weight.")]:
        del state[name]


def compute_in_fp8(network: Any, train: TrainConfig) -> Any:
    """Return the network with its linear layers replaced in place; names and ZeRO's shares stay."""
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise ConfigError("train.precision=fp8 needs torchao: pip install 'r1hpc[fp8]'") from error
    head = network.get_output_embeddings()
    # Padded, since a weight's gradient is a product over any number of tokens of a micro batch.
    recipe = replace(
        Float8LinearConfig.from_recipe_name(train.fp8_recipe), emulate=train.fp8_emulate, pad_inner_dim=True
    )

    def fits(module: nn.Module, name: str) -> bool:
        sides = (getattr(module, "in_features", 0), getattr(module, "out_features", 0))
        return module is not head and all(side and side % _SIDE == 0 for side in sides)

    convert_to_float8_training(network, config=recipe, module_filter_fn=fits)
    if not any(is_fp8(module) for module in network.modules()):
        raise ConfigError(
            f"train.precision=fp8: no layer of {type(network).__name__} has sides that are multiples of "
            f"{_SIDE}; take train.precision=bf16"
        )
    return network


def is_fp8(module: nn.Module) -> bool:
    """True for a layer of torchao."""
    return type(module).__name__ == "Float8Linear"
