"""A real model whose every word is known: a Llama without attention that says what follows the last token.

write_teacher(folder)       # asked "2+3=", says <think></think><answer>D</answer>, D any digit from 0 to 3
"""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from r1hpc.tasks.text.tokenizer import character_tokenizer

_FOLLOWS = {
    "=": ["<think>"],
    "?": ["<answer>"],
    "<think>": ["</think>"],
    "</think>": ["<answer>"],
    "<answer>": ["0", "1", "2", "3"],
    **{digit: ["</answer>"] for digit in "0123"},
    "</answer>": ["<eos>"],
}
"""After anything else a digit follows for ever."""


def write_teacher(folder: Path) -> Path:
    """The folder of the model with its tokenizer."""
    tokenizer = character_tokenizer()
    size = tokenizer.get_vocab_size()
    width = size + size % 2
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=width,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    network = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in network.model.layers.parameters():
            parameter.zero_()  # what each layer adds is nothing
        network.model.embed_tokens.weight.copy_(torch.eye(size, width))
        network.lm_head.weight.copy_(_logits(tokenizer.get_vocab(), size, width))
    network.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def _logits(ids: dict[str, int], size: int, width: int) -> torch.Tensor:
    """(next token, this token): a likely next token has the logit 30."""
    likely = torch.zeros(size, width)
    likely[ids["7"], :] = 1.0
    for token, followers in _FOLLOWS.items():
        likely[:, ids[token]] = 0.0
        for follower in followers:
            likely[ids[follower], ids[token]] = 1.0
    # The last norm makes each one-hot as long as the square root of its width.
    return torch.mul(likely, 30 / width**0.5)
