"""Safetensors files in tests: the header is what it says, the data are zeros that the disk does not hold."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_header(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """A file of bytes (U8) of these names and shapes."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, size = end, 1
        for length in shape:
            size *= length
        end = begin + size
        header[name] = {"dtype": "U8", "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + end)
    return path


def llama_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors that a Llama or Qwen2 of this config.json has; those of its layers have one number each."""
    attention = [f"self_attn.{name}_proj.weight" for name in "qkvo"]
    mlp = [f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    attention += [f"self_attn.{name}_proj.bias" for name in "qkv" if config["model_type"] == "qwen2"]
    names = [*attention, *mlp, "input_layernorm.weight", "post_attention_layernorm.weight"]
    layers = range(config["num_hidden_layers"])
    embedding = {"model.embed_tokens.weight": (config["vocab_size"], config["hidden_size"])}
    return {**embedding, **{f"model.layers.{layer}.{name}": (1,) for layer in layers for name in names}}
