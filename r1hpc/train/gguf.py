"""A model in GGUF (llama.cpp's format) as a Hugging Face folder, where transformers reads its architecture.

convert_gguf(Path("SmolLM2-135M-Instruct.Q4_1.gguf"), Path("models/SmolLM2-135M-Instruct"))

Needs the package gguf (the optional extra of that name). Quantised weights are multiplied out and kept in
bf16: what quantisation took is gone, so the folder is something to train from, no benchmark of the original.
"""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from r1hpc.base.errors import R1hpcError, UsageError


def convert_gguf(file: Path, folder: Path) -> None:
    """Write config.json, safetensors in bf16, the tokenizer and its chat template into `folder`.

    Raises:
        R1hpcError: the package gguf is not installed.
        UsageError: transformers cannot read the file.
    """
    try:
        import gguf  # noqa: F401 (transformers needs it, and says so at length)
    except ImportError:
        raise R1hpcError("reading GGUF needs the package gguf: pip install 'r1hpc[gguf]'") from None
    try:
        packed = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, local_files_only=True
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    # Whatever its reader meets: a torn file, an architecture or a tokenizer that it does not know.
    except Exception as error:
        raise UsageError(f"transformers cannot read {file}: {error}") from None
    config = packed.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # with it transformers refuses to save
    network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    network.load_state_dict(packed.state_dict())
    network.generation_config = packed.generation_config
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
