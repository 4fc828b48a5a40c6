"""The tokenizer of a model: a tokenizer.json, or the small built-in one of the arithmetic tasks.

tokenizer = load_tokenizer(config.model)        # tokenizers.Tokenizer
ids = encode(tokenizer, "224538=")
special_ids(tokenizer).eos
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from r1hpc.base.errors import UsageError
from r1hpc.config.schema import ModelConfig
from r1hpc.tasks.completion import TAGS

CHARACTERS = "characters"
ALPHABET = "0123456789+-*/=,:?() "
_EOS_NAMES = (
    "<eos>",
    "</s>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",  # DeepSeek's
)
_PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>")


@dataclass(frozen=True)
class SpecialIds:
    """`pad` fills rows up, `eos` ends a completion."""

    pad: int
    eos: int


def character_tokenizer() -> tokenizers.Tokenizer:
    """27 tokens: <pad> <eos>, the four tags, then ALPHABET, one id a character.

    Decoding keeps the tags, also with skip_special_tokens. `encode` of this module names a character that
    it does not know; the tokenizer's own encode raises too, in fewer words.
    """
    words = ["<pad>", "<eos>", *TAGS, *ALPHABET]
    tokenizer = tokenizers.Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<pad>", "<eos>"])
    tokenizer.add_tokens([tokenizers.AddedToken(tag, normalized=False) for tag in TAGS])
    return tokenizer


def load_tokenizer(model: ModelConfig) -> tokenizers.Tokenizer:
    """What `model.tokenizer` names: `characters`, a tokenizer.json, its folder, or None for model.path.

    Raises:
        UsageError: there is none, or it is no tokenizer.
    """
    if model.tokenizer == CHARACTERS:
        return character_tokenizer()
    path = tokenizer_file(model)
    try:
        return tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    # The library raises plain Exception for a file of another form.
    except Exception as error:
        raise UsageError(f"{path} is not a tokenizer.json that `tokenizers` can read: {error}") from None


def tokenizer_file(model: ModelConfig) -> Path:
    """Where the tokenizer.json is.

    Raises:
        UsageError: nowhere.
    """
    named = model.tokenizer or model.path
    if named is None:
        raise UsageError(
            "no tokenizer: give model.tokenizer=characters (the arithmetic tasks), model.tokenizer=FILE "
            "(a tokenizer.json), or model.path=DIR of a model that has one"
        )
    path = Path(named)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise UsageError(
            f"{path} does not exist: give model.tokenizer=FILE. Where a model has only the older files, "
            "transformers' AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) writes tokenizer.json"
        )
    return path


def encode(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    """Ids of `text`, without the special tokens a tokenizer may add around it.

    Raises:
        UsageError: a character that is not in the vocabulary.
    """
    try:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    # The library raises plain Exception for a token that is missing.
    except Exception as error:
        unknown = sorted({char for char in text if not _known(tokenizer, char)})
        raise UsageError(
            f"the tokenizer has no token for {unknown or error} in {text[:80]!r}; "
            "the built-in `characters` holds digits, + - * / = , : ? ( ) and space: give model.tokenizer"
        ) from None
    return ids


def special_ids(tokenizer: tokenizers.Tokenizer, model: ModelConfig | None = None) -> SpecialIds:
    """Ids of the end and of the padding; where a model has no padding, its end serves.

    With `model`, tokenizer_config.json beside the tokenizer decides; else well-known names do.

    Raises:
        UsageError: no end token.
    """
    named = _named_tokens(model)
    eos = _token(tokenizer, named.get("eos_token"), _EOS_NAMES)
    if eos is None:
        raise UsageError(
            "the tokenizer does not say which token ends a text: put tokenizer_config.json with "
            '"eos_token" beside tokenizer.json'
        )
    pad = _token(tokenizer, named.get("pad_token"), _PAD_NAMES)
    return SpecialIds(eos if pad is None else pad, eos)


def _known(tokenizer: tokenizers.Tokenizer, char: str) -> bool:
    return tokenizer.token_to_id(char) is not None


def _token(tokenizer: tokenizers.Tokenizer, named: str | None, usual: tuple[str, ...]) -> int | None:
    found = [tokenizer.token_to_id(word) for word in ([named] if named else usual)]
    ids: list[int] = [index for index in found if index is not None]
    return ids[0] if ids else None


def _named_tokens(model: ModelConfig | None) -> dict[str, str]:
    if model is None or model.tokenizer == CHARACTERS:
        return {}
    path = tokenizer_file(model).with_name("tokenizer_config.json")
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON ({error}); restore it") from None
    return {name: _content(config[name]) for name in ("eos_token", "pad_token") if config.get(name)}


def _content(token: Any) -> str:
    """Hugging Face writes a token as a string, or as an object with `content`."""
    return str(token["content"]) if isinstance(token, dict) else str(token)
