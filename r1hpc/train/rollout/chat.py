"""Talk to a Hugging Face folder in the terminal (`r1hpc chat`): stream one answer at a time.

Prompts have the form of training (tasks/text/format.py), and tokens are drawn by the same functions
(torch_engine.py): on the first GPU in the folder's own precision, else on the CPU in fp32.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.utils import logging

from r1hpc.base.errors import UsageError
from r1hpc.config.schema.run import ModelConfig, RunConfig
from r1hpc.plan.model.shape import load_model_config
from r1hpc.tasks.text.format import decode, encode
from r1hpc.tasks.text.tokenizer import form_of, load_tokenizer, special_ids, vocabulary_size
from r1hpc.train.model.model import build_model, cast_parameters
from r1hpc.train.parallel.distributed import attend_at_any_length
from r1hpc.train.rollout.torch_engine import cache_argument, choose, streams


@dataclass(frozen=True)
class Limits:
    max_tokens: int
    temperature: float
    """0: greedy."""
    seed: int


class ChatModel:
    """The model of a Hugging Face folder. The caller keeps the conversation."""

    def __init__(self, model: ModelConfig) -> None:
        """Raise ConfigError or UsageError if the folder cannot be used."""
        self._tokenizer = load_tokenizer(model)
        self._form = form_of(self._tokenizer, model)
        self._stops = frozenset(special_ids(self._tokenizer, model).stops)
        hf_config = load_model_config(RunConfig(model=model), vocabulary_size(self._tokenizer))
        logging.disable_progress_bar()
        self._network = build_model(model, hf_config, seed=0).eval()
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        attend_at_any_length()
        if self._device.type == "cuda":
            named = hf_config.get("dtype") or hf_config.get("torch_dtype") or "float32"
            cast_parameters(self._network, getattr(torch, str(named)))
        self._network.to(self._device)
        positions = getattr(self._network.config.get_text_config(), "max_position_embeddings", None)
        self._positions: int = positions or sys.maxsize
        self.keeps_turns = self._form.template is not None
        """True if it sees earlier messages; without a template each message stands alone."""

    def answer(self, messages: Sequence[Mapping[str, str]], limits: Limits) -> Iterator[str]:
        """Yield the text as it is generated, an opened `<think>` included."""
        prompt = encode(self._tokenizer, self._form.conversation(messages))
        if len(prompt) >= self._positions:
            raise UsageError(
                f"the conversation has {len(prompt)} tokens, and the model {self._positions} positions: "
                "begin another (/new)"
            )
        yield self._form.said("")
        said: list[int] = []
        shown = 0
        for token in self._tokens(prompt, limits):
            said.append(token)
            (text,) = decode(self._tokenizer, [said])
            if not text.endswith("\ufffd"):  # half of a character of several tokens
                yield text[shown:]
                shown = len(text)

    @torch.no_grad()
    def _tokens(self, prompt: list[int], limits: Limits) -> Iterator[int]:
        cache: Any = {cache_argument(self._network): DynamicCache()}
        key = streams(limits.seed, [len(prompt)], 1)
        ids = torch.tensor([prompt], device=self._device)
        for position in range(min(limits.max_tokens, self._positions - len(prompt))):
            out = self._network(input_ids=ids, use_cache=True, logits_to_keep=1, **cache)
            chosen, _ = choose(out.logits[:, -1].float(), limits.temperature, key, position)
            if int(chosen) in self._stops:
                return
            yield int(chosen)
            ids = chosen[:, None]
