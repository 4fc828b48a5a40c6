"""A teacher for on-policy distillation: a small GPT-2 with the tokens of the arithmetic tasks.

folder = write_teacher(tmp_path / "teacher")        # another width than jobs/rl_smoke.yaml's student
"""

from pathlib import Path
from typing import Any

NUM_PARAMETERS = 87_744
DISTILL = ("rl.algorithm=distill", "rl.kl_coef=0", "rollout.num_generations=1", "rollout.num_prompts=16")
"""Overrides for jobs/rl_smoke.yaml, beside rl.teacher."""


def write_teacher(folder: Path, seed: int = 7, **shape: Any) -> Path:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from r1hpc.config.schema.run import ModelConfig
    from r1hpc.tasks.text.tokenizer import exported_tokenizer

    made = {"vocab_size": 27, "n_layer": 3, "n_head": 3, "n_embd": 48, "n_positions": 32}
    made |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} | shape
    torch.manual_seed(seed)
    ids = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    network = GPT2LMHeadModel(GPT2Config(initializer_range=0.2, **made, **ids))
    network.save_pretrained(folder)
    for name, content in exported_tokenizer(ModelConfig(tokenizer="characters")).files.items():
        (folder / name).write_bytes(content)
    return folder
