"""Weights are judged by the headers of their files: what the ranks would refuse is refused before a queue."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from r1hpc.base.errors import ConfigError
from r1hpc.config.schema.run import ModelConfig
from r1hpc.plan.model.weights import check_headers, check_tensors, read_tensors
from tests.plan.tensorfiles import write_header

_HEADER = b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}'


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1\n", "git lfs pull"),
        (b"", "is no safetensors file"),
        (b"<html>404 Not Found</html>", "is no safetensors file .*: copy it again"),
        (struct.pack("<Q", 4) + b"none", "is no safetensors file"),
        (struct.pack("<Q", 2) + b"[]", "is no safetensors file"),
        (struct.pack("<Q", len(_HEADER)) + _HEADER + bytes(15), "is cut off: it has .* copy it again"),
    ],
)
def test_a_file_that_is_none_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"{tmp_path}/model\.safetensors {said}|{said}"):
        read_tensors(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(_HEADER)) + _HEADER + bytes(16))
    assert read_tensors(tmp_path) == {"a": (4,)}


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_file_of_pytorch_that_is_none_is_named(tmp_path: Path, is_zip: bool) -> None:
    torch = pytest.importorskip("torch")
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.zeros(4)}, file, _use_new_zipfile_serialization=is_zip)
    assert read_tensors(tmp_path) == {}
    whole = file.read_bytes()
    for content in (b"", b"<html>404 Not Found</html>", *([whole[:-40]] if is_zip else [])):
        file.write_bytes(content)
        with pytest.raises(
            ConfigError, match=r"pytorch_model\.bin is no weights file of PyTorch, or is cut off"
        ):
            read_tensors(tmp_path)


def test_lora_targets_are_names_of_modules(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    layer = "model.layers.0"
    shapes = {f"{layer}.self_attn.q_proj.weight": (16, 16), f"{layer}.input_layernorm.weight": (16,)}
    write_header(tmp_path / "model.safetensors", shapes)
    model: dict[str, Any] = {"path": str(tmp_path), "lora_rank": 2}
    with pytest.raises(ConfigError, match=r"\['c_attn'\]: no module .* there are q_proj$"):
        check_tensors(ModelConfig(**model, lora_targets=["c_attn"]), {"model_type": "llama"})
    for targets in ([], ["q_proj"], ["c_attn", "self_attn.q_proj"]):
        check_tensors(ModelConfig(**model, lora_targets=targets), {"model_type": "llama"})
    check_tensors(ModelConfig(**model, lora_targets=["c_attn"]), {"model_type": "of_nobody"})
    tied = ModelConfig(**model, lora_targets=["q_proj", "lm_head"])
    with pytest.raises(ConfigError, match=r"names lm_head, and the embedding and output head of .* share"):
        check_tensors(tied, {"model_type": "llama"})
    write_header(tmp_path / "model.safetensors", shapes | {"lm_head.weight": (40, 16)})
    check_tensors(tied, {"model_type": "llama"})


_LLAMA = {"model_type": "llama", "num_hidden_layers": 2, "vocab_size": 32, "hidden_size": 16}
_LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 24}


def _tensors_of_llama() -> dict[str, tuple[int, ...]]:
    names = [
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.{n}_proj" for n in ("gate", "up", "down")),
    ]
    names += ["input_layernorm", "post_attention_layernorm"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (32, 16), "model.norm.weight": (16,)}
    return found | {f"model.layers.{n}.{name}.weight": (16, 16) for n in range(2) for name in names}


@pytest.mark.parametrize(
    ("changes", "renamed", "said"),
    [
        ({"num_hidden_layers": 3}, None, "have 2 layers, config.json says num_hidden_layers=3"),
        ({"num_hidden_layers": 1}, None, "have 2 layers, config.json says num_hidden_layers=1"),
        ({"vocab_size": 320}, None, r"embed_tokens.weight is \(32, 16\) there and \(320, 16\) in the config"),
        ({"model_type": "gpt2"}, None, "lack layers.0.ln_1.weight"),
        ({"model_type": "qwen3"}, None, "lack layers.0.self_attn.q_norm.weight"),
        ({}, "model.layers.1.mlp.up_proj.weight", r"lack layers.1.mlp.up_proj.weight of a llama model"),
    ],
)
def test_weights_that_contradict_the_config_are_named(
    tmp_path: Path, changes: dict[str, Any], renamed: str | None, said: str
) -> None:
    shapes = _tensors_of_llama()
    write_header(tmp_path / "model.safetensors", shapes)
    check_headers(tmp_path, _LLAMA)
    if renamed:
        shapes[f"{renamed}_"] = shapes.pop(renamed)
        write_header(tmp_path / "model.safetensors", shapes)
    with pytest.raises(ConfigError, match=said):
        check_headers(tmp_path, {**_LLAMA, **changes})
