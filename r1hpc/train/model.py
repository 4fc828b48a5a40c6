"""Any Hugging Face causal language model, from a config or from local weights."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from r1hpc.base.errors import ConfigError
from r1hpc.config.schema import ModelConfig


def build_model(model: ModelConfig, hf_config: dict[str, Any], seed: int) -> PreTrainedModel:
    """The model on CPU in fp32, the same on every rank for the same seed.

    Args:
        hf_config: a config.json as a dictionary, vocabulary included (plan.shape.load_model_config).

    Raises:
        ConfigError: an unknown model_type, or a weights file that does not fit the config.
    """
    torch.manual_seed(seed)
    config = _auto_config(hf_config)
    config.use_cache = False
    folder = Path(model.path) if model.path else None
    if folder is not None and not model.from_scratch and has_weights(folder):
        network = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            attn_implementation=model.attn_implementation,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
        )
    else:
        network = AutoModelForCausalLM.from_config(config, attn_implementation=model.attn_implementation)
    if model.activation_checkpointing:
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    network.train()
    return network


def has_weights(folder: Path) -> bool:
    """Whether the folder holds safetensors weights."""
    return any(folder.glob("*.safetensors"))


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in fp32 of logits (batch, seq_len, vocab) and labels (batch, seq_len)."""
    return F.cross_entropy(logits.float().view(-1, logits.shape[-1]), labels.reshape(-1))


def _auto_config(hf_config: dict[str, Any]) -> Any:
    values = dict(hf_config)
    model_type = values.pop("model_type", None)
    try:
        return AutoConfig.for_model(model_type, **values)
    except ValueError as error:
        raise ConfigError(f"model_type {json.dumps(model_type)}: {str(error).splitlines()[0]}") from None
