"""GPTQ: what one weight loses by rounding, the weights after it make up for.

    compensate(network, texts)         # in place, after the scales are set: every weight lies on its grid

A layer's weights are rounded input by input; each error is spread over the inputs still to come, weighted by
how the inputs of calibration texts go together (H = X Xᵀ): Frantar et al., arXiv 2210.17323, algorithm 1. One
decoder layer after the other, each on what the layers before it give once they are rounded.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

_DAMPENING = 0.01
"""Of the mean of H's diagonal, added to it: as in the paper."""
_BLOCK = 128
"""Inputs whose errors reach those behind the block in one product: as in the paper."""


@torch.no_grad()
def compensate(network: Any, texts: Sequence[Sequence[int]]) -> None:
    """Round the weights of every layer that has a scale to that scale's grid, in place."""
    calls = _first_calls(network, texts)
    for block in network.model.layers:
        layers = [module for module in block.modules() if hasattr(module, "weight_scale")]
        moments = _second_moments(block, layers, calls)
        for layer in layers:
            layer.weight.copy_(_rounded(layer, moments[layer]))
        calls = [(block(hidden, **rest), rest) for hidden, rest in calls]


class _Caught(Exception):  # noqa: N818 (no error: it ends a forward pass)
    pass


def _first_calls(network: Any, texts: Sequence[Sequence[int]]) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    """What the first decoder layer is called with, for each text."""
    calls: list[tuple[torch.Tensor, dict[str, Any]]] = []

    def catch(module: nn.Module, arguments: tuple[torch.Tensor, ...], rest: dict[str, Any]) -> None:
        calls.append((arguments[0], rest))
        raise _Caught

    hook = network.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for text in texts:
            try:
                network(input_ids=torch.tensor([list(text)], device=network.device), use_cache=False)
            except _Caught:
                continue
    finally:
        hook.remove()
    return calls


def _second_moments(
    block: Any, layers: Sequence[Any], calls: Sequence[tuple[torch.Tensor, dict[str, Any]]]
) -> dict[Any, torch.Tensor]:
    """Of each layer X Xᵀ, summed over the tokens of all texts: (inputs, inputs)."""
    moments = {layer: layer.weight.new_zeros(layer.in_features, layer.in_features) for layer in layers}

    def look(layer: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        rows = inputs[0].flatten(0, -2).float()
        moments[layer].addmm_(rows.T, rows)

    hooks = [layer.register_forward_pre_hook(look) for layer in layers]
    for hidden, rest in calls:
        block(hidden, **rest)
    for hook in hooks:
        hook.remove()
    return moments


def _rounded(layer: Any, moment: torch.Tensor) -> torch.Tensor:
    """The weight, (outputs, inputs), on the grid of its scale."""
    from compressed_tensors.quantization.utils import calculate_range

    weight: torch.Tensor = layer.weight.clone()
    form = layer.quantization_scheme.weights
    low, high = (float(end) for end in calculate_range(form, weight.device))
    size = form.group_size or layer.in_features
    inverse = _inverse_root(moment)
    for start in range(0, layer.in_features, _BLOCK):
        end = min(start + _BLOCK, layer.in_features)
        errors = weight.new_zeros(layer.out_features, end - start)
        for i in range(start, end):
            scale = layer.weight_scale[:, i // size]
            rounded = (weight[:, i] / scale).round().clamp(low, high) * scale
            error = (weight[:, i] - rounded) / inverse[i, i]
            weight[:, i] = rounded
            weight[:, i + 1 : end] -= torch.outer(error, inverse[i, i + 1 : end])
            errors[:, i - start] = error
        weight[:, end:] -= errors @ inverse[start:end, end:]
    return weight


def _inverse_root(moment: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of H⁻¹; an input that is never there counts by itself."""
    moment = moment.double()
    diagonal = moment.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += _DAMPENING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
    root: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    return root.float()
