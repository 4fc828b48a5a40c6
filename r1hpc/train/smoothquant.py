"""SmoothQuant: outliers move out of the activations, which are rounded at 8 bits, into the weights.

    smooth(network, texts)         # in place; it computes to the bit what it computed

A few channels of what goes into a layer are tens of times larger than the rest, and a token has one scale
for all of them. Channel j is divided by s_j before the layer, in the norm or the layer that makes it, and the
layer's weights for it are multiplied: s_j = max|X_j|^0.5 / max|W_j|^0.5 (Xiao et al., arXiv 2211.10438, eq.
4), the maxima over calibration texts. Here s_j is the nearest power of two, so that both are exact in any
floating-point precision; and the step from up_proj to down_proj is smoothed too, as AWQ does (2306.00978).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from r1hpc.base.errors import UsageError

_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Whose norms multiply by their weight, and whose layers are called so:"""
_PAIRS = (
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ("mlp.up_proj", ("mlp.down_proj",)),
)
"""What makes a channel, and who reads it, in a decoder layer."""
_LEAST = 1e-5
"""Of a maximum: a channel that is always zero needs no scale."""


def check_family(model_type: str) -> None:
    """Raise UsageError where the layers of this family are not known."""
    if model_type not in _FAMILIES:
        raise UsageError(
            f"--calibrate knows the layers of {', '.join(_FAMILIES)}; this is {model_type}: export it without"
        )


@torch.no_grad()
def smooth(network: Any, texts: Sequence[Sequence[int]]) -> None:
    """Move outliers into the weights, in place; the network's output stays as it is."""
    pairs = list(_pairs(network))
    largest = _largest_inputs(network, [readers[0] for _, readers in pairs], texts)
    for maker, readers in pairs:
        weights = torch.stack([reader.weight.abs().amax(0) for reader in readers]).amax(0)
        factors = _factors(largest[readers[0]], weights)
        maker.weight.div_(factors if maker.weight.ndim == 1 else factors[:, None])
        if getattr(maker, "bias", None) is not None:
            maker.bias.div_(factors)
        for reader in readers:
            reader.weight.mul_(factors)


def _pairs(network: Any) -> Iterator[tuple[Any, list[Any]]]:
    for layer in network.model.layers:
        for maker, readers in _PAIRS:
            yield layer.get_submodule(maker), [layer.get_submodule(reader) for reader in readers]


def _factors(inputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    logs = (inputs.clamp_min(_LEAST).log2() - weights.clamp_min(_LEAST).log2()) / 2
    return torch.exp2(logs.round())


def _largest_inputs(
    network: Any, modules: Sequence[nn.Module], texts: Sequence[Sequence[int]]
) -> dict[nn.Module, torch.Tensor]:
    """Of each module, the largest magnitude of every channel that goes in, over all texts."""
    largest: dict[nn.Module, torch.Tensor] = {}

    def look(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen = inputs[0].abs().flatten(0, -2).amax(0)
        largest[module] = torch.maximum(largest[module], seen) if module in largest else seen

    hooks = [module.register_forward_pre_hook(look) for module in modules]
    try:
        for text in texts:
            network(input_ids=torch.tensor([list(text)], device=network.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return largest
