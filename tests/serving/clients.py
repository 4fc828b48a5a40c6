"""What a client of a server does, in tests: ask, with a key or without."""

import json
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from r1hpc.base.run_dir import RunDir

SMALL_SERVER = f"{sys.executable} {Path(__file__).with_name('small_server.py')}"
"""For serve.python."""
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def ask(url: str, path: str, key: str | None, body: dict[str, Any] | None = None, method: str = "") -> int:
    """The HTTP status of one request; a POST where there is a body."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    headers |= {} if key is None else {"Authorization": f"Bearer {key}"}
    asked = urllib.request.Request(url + path, data, headers, method=method or None)
    try:
        with _OPENER.open(asked, timeout=60) as answer:
            answer.read()
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.read()
        return error.code


def key_of(run: RunDir) -> str:
    return run.server_key.read_text().strip()


def make_model(folder: Path) -> Path:
    """A folder that looks like a model, with weights of the shapes its config.json says; it knows nothing."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    config = {
        "model_type": "gpt2",
        "n_layer": 1,
        "n_embd": 8,
        "n_head": 2,
        "n_positions": 32,
        "vocab_size": 16,
    }
    (folder / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"], **config}))
    (folder / "tokenizer.json").write_text("{}")
    shapes = {"wte.weight": (16, 8), "wpe.weight": (32, 8), "ln_f.weight": (8,), "ln_f.bias": (8,)}
    for name, shape in {
        "ln_1.weight": (8,),
        "ln_1.bias": (8,),
        "attn.c_attn.weight": (8, 24),
        "attn.c_attn.bias": (24,),
        "attn.c_proj.weight": (8, 8),
        "attn.c_proj.bias": (8,),
        "ln_2.weight": (8,),
        "ln_2.bias": (8,),
        "mlp.c_fc.weight": (8, 32),
        "mlp.c_fc.bias": (32,),
        "mlp.c_proj.weight": (32, 8),
        "mlp.c_proj.bias": (8,),
    }.items():
        shapes[f"h.0.{name}"] = shape
    tensors = {f"transformer.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
