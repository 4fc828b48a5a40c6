"""GPTQ: the paper's formula, and what it gains over rounding to the nearest."""

import json
from pathlib import Path

import pytest
import torch

from experiments.gptq import compensate, main
from r1hpc.base.run_dir import RunDir
from r1hpc.train.quantize.quantize import load_folder, quantize
from tests.commands.test_export_quantized import run as finished_run
from tests.train.test_quantize import TEXTS, logits, made, written

pytestmark = pytest.mark.slow
run = finished_run


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("original"), tie_word_embeddings=True)


def test_gptq_loses_less_than_rounding_to_the_nearest(original: Path, tmp_path: Path) -> None:
    """On texts that it was not calibrated on."""
    texts = torch.randint(0, 27, (24, 24), generator=torch.Generator().manual_seed(2))
    written(original, tmp_path / "nearest", "w4a16")
    (tmp_path / "gptq").mkdir()
    quantize(original, tmp_path / "gptq", "w4a16", texts.tolist(), compensate=compensate)
    before = logits(original)
    nearest, compensated = ((logits(tmp_path / name) - before).norm() for name in ("nearest", "gptq"))
    assert compensated < 0.9 * nearest


def test_gptq_of_one_layer_is_the_paper_s_formula(original: Path) -> None:
    """Column by column with the inverse of what is left of H, eq. 2 and 3 of arXiv 2210.17323."""
    from compressed_tensors.quantization import (
        QuantizationConfig,
        apply_quantization_config,
        preset_name_to_scheme,
    )

    network = load_folder(original)
    name = "model.layers.0.self_attn.q_proj"
    form = preset_name_to_scheme("W4A16", [f"re:{name}$"])
    form.weights.group_size = 64
    layer = network.get_submodule(name)
    weight = layer.weight.detach().double().clone()
    inputs: list[torch.Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0].detach().flatten(0, 1)))
    network(input_ids=TEXTS)
    hook.remove()
    apply_quantization_config(network, QuantizationConfig(config_groups={"g": form}))
    scale = weight.abs().amax(1) / 7.5
    layer.weight_scale.data = scale[:, None].float()
    compensate(network, TEXTS.tolist())
    rows = inputs[0].double()
    hessian = rows.T @ rows
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(64)
    for i in range(64):
        inverse = torch.linalg.inv(hessian[i:, i:])
        rounded = (weight[:, i] / scale).round().clamp(-8, 7) * scale
        error = (weight[:, i] - rounded) / inverse[0, 0]
        weight[:, i] = rounded
        weight[:, i + 1 :] -= torch.outer(error, inverse[0, 1:])
    same = (layer.weight.double() - weight).abs() < 1e-4 * scale[:, None]
    assert same.double().mean() > 0.99  # fp32 rounds some the other way, and what follows them


def test_the_command_writes_the_folder_and_measures_both_models(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main([str(run.model), str(out), "--run", str(run.path), "--texts", "8"]) == 0
    before, after = capsys.readouterr().out.splitlines()[-2:]
    assert before.startswith(f"{run.model}: perplexity ")
    assert before.endswith(", 60 of 60 right")
    assert after.startswith(f"{out}: perplexity ")
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] == 4
