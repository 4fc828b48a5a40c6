"""The integers of a quantised export, its reading by transformers, and what calibration changes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from r1hpc.base.errors import UsageError
from r1hpc.config.schema.run import ModelConfig
from r1hpc.tasks.text.tokenizer import exported_tokenizer
from r1hpc.train.quantize.quantize import check_source, load_folder, quantize, smooth

SHAPE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 27}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2}
TEXTS = torch.randint(0, 27, (12, 24), generator=torch.Generator().manual_seed(1))


def made(folder: Path, model_type: str = "llama", **other: Any) -> Path:
    """A model in bf16 with an outlier channel, as large models have them, in a folder with a tokenizer."""
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(SHAPE | other)))
    with torch.no_grad():
        for layer in network.model.layers if hasattr(network, "model") else ():
            layer.input_layernorm.weight[5] = 40.0
            layer.post_attention_layernorm.weight[7] = 40.0
    network.to(torch.bfloat16).save_pretrained(folder)
    for name, content in exported_tokenizer(ModelConfig(tokenizer="characters")).files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("original"), tie_word_embeddings=True)


def written(original: Path, out: Path, scheme: str, texts: Any = None) -> dict[str, torch.Tensor]:
    out.mkdir()
    quantize(original, out, scheme, texts)
    return load_file(out / "model.safetensors")


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    found: torch.Tensor = load_folder(folder)(input_ids=TEXTS).logits
    return found


def test_eight_bits_are_a_scale_a_channel_and_the_nearest_integers(original: Path, tmp_path: Path) -> None:
    """In Python's own arithmetic: the largest of 255 steps covers the largest weight of each channel."""
    before = load_file(original / "model.safetensors")
    after = written(original, tmp_path / "out", "int8")
    integers = [name for name, tensor in after.items() if tensor.dtype == torch.int8]
    assert len(integers) == 2 * 7
    for name in integers:
        assert after[f"{name}_scale"].shape == (len(before[name]), 1)
        rows = zip(before[name].tolist(), after[f"{name}_scale"].tolist(), after[name].tolist(), strict=True)
        for weights, (scale,), found in rows:
            exact = max(map(abs, weights)) / 127.5
            assert scale == torch.tensor(exact).bfloat16().item()
            assert found == [max(-128, min(127, round(weight / scale))) for weight in weights]
    left = set(before) - set(integers)
    assert left == {name for name in after if name not in integers and not name.endswith("_scale")}
    assert all(torch.equal(before[name], after[name]) for name in left)


def test_four_bits_are_packed_in_groups(original: Path, tmp_path: Path) -> None:
    """Of 32, which divides 64 and 96."""
    before = load_file(original / "model.safetensors")
    after = written(original, tmp_path / "out", "w4a16")
    name = "model.layers.1.mlp.down_proj.weight"
    weight, scale, packed = before[name].float(), after[f"{name}_scale"].float(), after[f"{name}_packed"]
    assert (weight.shape, scale.shape, packed.shape) == ((64, 96), (64, 3), (64, 12))
    groups = weight.reshape(64, 3, 32)
    assert torch.equal(scale, (groups.abs().amax(-1) / 7.5).bfloat16().float())
    assert torch.equal(unpacked(packed), (groups / scale[..., None]).round().clamp(-8, 7).int().flatten(1))


@pytest.mark.parametrize("texts", [None, TEXTS.tolist()], ids=["nearest", "calibrated"])
@pytest.mark.parametrize(("scheme", "most"), [("int8", 0.1), ("w4a16", 0.5)])
def test_transformers_reads_it_back(
    original: Path, tmp_path: Path, scheme: str, most: float, texts: list[list[int]] | None
) -> None:
    """It computes with integers times scales and, at 8 bits, with every token rounded before each layer."""
    tensors = written(original, tmp_path / "out", scheme, texts)
    network = load_folder(original)
    state = {name: tensor for name, tensor in tensors.items() if name in network.state_dict()}
    network.load_state_dict(state | multiplied_out(tensors), strict=False)
    for name, layer in network.named_modules():
        if scheme == "int8" and isinstance(layer, torch.nn.Linear) and name != "lm_head":
            layer.register_forward_pre_hook(lambda _, given: rounded(given[0]))
    before, after = logits(original), logits(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(after, network(input_ids=TEXTS).logits, rtol=1e-3, atol=1e-4)
    assert 1e-4 < float((after - before).norm() / before.norm()) < most
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (original / "tokenizer.json").read_bytes()


def multiplied_out(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights that the integers and scales stand for."""
    weights = {}
    for name in [name.removesuffix("_scale") for name in tensors if name.endswith("_scale")]:
        integers = tensors[name] if name in tensors else unpacked(tensors[f"{name}_packed"])
        scale = tensors[f"{name}_scale"].float()
        weights[name] = (integers.float().reshape(*scale.shape, -1) * scale[..., None]).flatten(1)
    return weights


def unpacked(packed: torch.Tensor) -> torch.Tensor:
    """Eight integers of 4 bits to a word, the first in its lowest bits, shifted by 8."""
    return torch.stack([(packed >> 4 * i & 15) - 8 for i in range(8)], -1).flatten(1)


def rounded(rows: torch.Tensor) -> torch.Tensor:
    scale = rows.abs().amax(-1, keepdim=True) / 127.5
    return (rows / scale).round().clamp(-128, 127) * scale


def test_smoothing_changes_no_bit_and_makes_int8_better(original: Path, tmp_path: Path) -> None:
    network = load_folder(original)
    before = network(input_ids=TEXTS).logits
    smooth(network, TEXTS.tolist())
    assert network.model.layers[0].input_layernorm.weight[5] < 40.0
    assert torch.equal(network(input_ids=TEXTS).logits, before)
    written(original, tmp_path / "plain", "int8")
    written(original, tmp_path / "smooth", "int8", TEXTS.tolist())
    plain, smoothed = ((logits(tmp_path / name) - before).norm() for name in ("plain", "smooth"))
    assert smoothed < 0.8 * plain


def test_what_cannot_be_quantised_is_named(original: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no model folder"):
        check_source(tmp_path, calibrated=False)
    gpt2 = made(tmp_path / "gpt2", "gpt2", n_embd=32, n_head=2, n_layer=1)
    with pytest.raises(UsageError, match="knows the layers of llama, mistral"):
        check_source(gpt2, calibrated=True)
    check_source(gpt2, calibrated=False)
    with pytest.raises(UsageError, match="GPT2LMHeadModel has no linear layers"):
        written(gpt2, tmp_path / "out", "int8")
    experts = made(
        tmp_path / "experts", "mixtral", num_local_experts=2, num_experts_per_tok=1, sliding_window=None
    )
    with pytest.raises(UsageError, match="MixtralForCausalLM has experts in one tensor"):
        written(experts, tmp_path / "out8", "int8")
    narrow = made(tmp_path / "narrow", hidden_size=24, num_attention_heads=2, num_key_value_heads=1)
    with pytest.raises(
        UsageError, match=r"none of these divides the widths of all layers \(24, 96\): take int8"
    ):
        written(narrow, tmp_path / "out4", "w4a16")
    written(original, tmp_path / "int8", "int8")
    with pytest.raises(UsageError, match="quantised already"):
        check_source(tmp_path / "int8", calibrated=False)


def test_an_export_that_lost_a_tensor_is_not_read(original: Path, tmp_path: Path) -> None:
    tensors = written(original, tmp_path / "out", "int8")
    del tensors["model.layers.0.mlp.up_proj.weight_scale"]
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"lacks 1 tensors, among them model\.layers\.0\.mlp\.up_proj"):
        load_folder(tmp_path / "out")
