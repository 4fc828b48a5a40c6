"""Matrix products in FP8, by torchao (Micikevicius et al., arXiv 2209.05433): train.precision=fp8.

    network = compute_in_fp8(network, config.train)

Weights stay bf16 and the optimizer's fp32. Each linear layer rounds its input, its weight and the gradient of
its output to 8 bits for each product, scaled by the largest value of the moment: nothing is remembered from
one step to the next, so a checkpoint holds nothing more. The output head stays as it is, as in torchao's own
recipes, and so do layers with a side that is no multiple of 16, which the hardware does not multiply.
"""

from dataclasses import replace
from typing import Any

from torch import nn

from r1hpc.base.errors import ConfigError
from r1hpc.config.schema import TrainConfig

_SIDE = 16
"""torch._scaled_mm takes multiples of it."""


def compute_in_fp8(network: Any, train: TrainConfig) -> Any:
    """The network, its linear layers exchanged in place; parameters, their names and ZeRO's shares stay.

    Raises:
        ConfigError: torchao is not installed, or no layer can be exchanged.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise ConfigError("train.precision=fp8 needs torchao: pip install 'r1hpc[fp8]'") from error
    head = network.get_output_embeddings()
    # Padded: the gradient of a weight is a product over the tokens of a micro batch, in any number.
    recipe = replace(
        Float8LinearConfig.from_recipe_name(train.fp8_recipe), emulate=train.fp8_emulate, pad_inner_dim=True
    )
    convert_to_float8_training(
        network, config=recipe, module_filter_fn=lambda module, name: module is not head and _fits(module)
    )
    if not any(is_fp8(module) for module in network.modules()):
        raise ConfigError(
            f"train.precision=fp8: no layer of {type(network).__name__} has sides that are multiples of "
            f"{_SIDE}; take train.precision=bf16"
        )
    return network


def is_fp8(module: nn.Module) -> bool:
    """Whether it is one of torchao's layers."""
    return type(module).__name__ == "Float8Linear"


def _fits(module: nn.Module) -> bool:
    sides = (getattr(module, "in_features", 0), getattr(module, "out_features", 0))
    return all(side and side % _SIDE == 0 for side in sides)
