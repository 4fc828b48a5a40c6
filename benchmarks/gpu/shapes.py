"""Models by shape, as settings: random weights, since speed and memory do not ask what they say."""

import json

WIDE_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
"""As wide as a 7B, four layers of it: what a layer takes, on one card."""
QWEN_05B = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
}
QWEN_15B = {
    "model_type": "qwen2",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
}
TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
_LONGEST = 32768


def config_of(shape: dict[str, object], vocab_size: int = 151_936) -> dict[str, object]:
    """A config.json, with Qwen2.5's vocabulary."""
    named = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    return {**shape, **named, "vocab_size": vocab_size, "max_position_embeddings": _LONGEST}


def model_words(shape: dict[str, object], vocab_size: int = 151_936) -> list[str]:
    """The same as an override; on the command line `=` replaces the preset's model."""
    return [f"model.config={json.dumps(config_of(shape, vocab_size))}"]
