"""Quantise a model's weights to 4 bits by GPTQ (Frantar et al., arXiv 2210.17323, algorithm 1).

    python -m experiments.gptq MODEL OUT --run runs/r1/grpo     # on the run's questions

`compensate` runs after the scales are set, in place. A layer's weights are rounded input by input; each error
is spread over the inputs still to come, weighted by how the inputs of calibration texts correlate (H = X Xᵀ).
Each decoder layer sees the outputs of the rounded layers before it.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from r1hpc.base.cli import ArgumentParser, run_command
from r1hpc.base.run_dir import open_run
from r1hpc.config.load import read
from r1hpc.train.quantize.measure import open_bench
from r1hpc.train.quantize.quantize import check_installed, check_source, quantize

_DAMPENING = 0.01
"""Added to H's diagonal, relative to its mean: as in the paper."""
_BLOCK = 128
"""Inputs per block, whose errors reach the inputs behind it in one product: as in the paper."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m experiments.gptq", description=__doc__)
    parser.add_argument("model", type=Path, metavar="MODEL", help="a Hugging Face folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to make")
    parser.add_argument(
        "--run", type=Path, metavar="RUN", required=True, help="the run whose questions are used"
    )
    parser.add_argument("--texts", type=int, default=128, metavar="N", help="to calibrate on (128)")
    arguments = parser.parse_args(argv)
    check_installed()
    check_source(arguments.model, calibrated=True)
    run = open_run(arguments.run)
    with open_bench(read(run.config), arguments.model, run.code if run.code.is_dir() else None) as bench:
        texts = bench.training_texts(arguments.texts)
        arguments.out.mkdir()
        quantize(arguments.model, arguments.out, "w4a16", texts, bench.device, compensate)
        for folder in (arguments.model, arguments.out):
            found = bench.measure(folder)
            right = sum(line["greedy_correct"] for line in found.answers)
            print(f"{folder}: perplexity {found.perplexity:.3f}, {right} of {len(found.answers)} right")
    return 0


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
    """Return the arguments of the first decoder layer, for each text."""
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
    """Return X Xᵀ of each layer, summed over the tokens of all texts: (inputs, inputs)."""
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
    """Return the weight, (outputs, inputs), on the grid of its scale."""
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
    """Return the upper Cholesky factor of H⁻¹; an input that never occurs counts by itself."""
    moment = moment.double()
    diagonal = moment.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += _DAMPENING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
    root: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    return root.float()


if __name__ == "__main__":
    sys.exit(run_command(main))
