"""Between a task's text and a model's tokens."""

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import tokenizers

from r1hpc.base.errors import ConfigError
from r1hpc.tasks.task import Item
from r1hpc.tasks.tokenizer import encode


class Prompts:
    """Encodes prompts and decodes completions for one model."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, max_prompt_length: int) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_prompt_length
        self._encode = lru_cache(maxsize=4096)(self._encoded)

    def ids(self, item: Item) -> tuple[int, ...]:
        """The prompt's tokens.

        Raises:
            ConfigError: longer than rollout.max_prompt_length.
            UsageError: a character that the vocabulary lacks.
        """
        return self._encode(item.prompt)

    def texts(self, tokens: npt.NDArray[np.int32], lengths: npt.NDArray[np.int32]) -> list[str]:
        """The completions as text, without the end token."""
        rows = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
        texts: list[str] = self._tokenizer.decode_batch(rows)
        return texts

    def _encoded(self, text: str) -> tuple[int, ...]:
        ids = tuple(encode(self._tokenizer, text))
        if len(ids) > self._max_length:
            raise ConfigError(
                f"a prompt has {len(ids)} tokens: raise rollout.max_prompt_length, now {self._max_length}"
            )
        return ids
