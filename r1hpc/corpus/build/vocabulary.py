"""Make a dataset's tokenizer (a byte-level BPE trained here, bytes, or an existing one) and encode texts.

The result is always a Hugging Face tokenizer.json, so transformers can load the data's tokenizer. Text that
spells a special token, or an EOS or BOS token that is not special in its vocabulary, is encoded as text,
never as that token: a text cannot forge the end of its document. Traces and rendered chats may spell them.

A tokenizer divides a text into words before its model sees them. A long text is encoded in pieces that give
the ids of the whole text: it is cut between a letter or digit and a blank, line feed or comma, if the
tokenizer begins a new word there at any number of characters before it.
"""

import codecs
import contextlib
import functools
import json
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from r1hpc.base.errors import UsageError
from r1hpc.base.names import nearest
from r1hpc.base.units import format_bytes
from r1hpc.corpus.recipe import TokenizerRecipe

TOKENIZER_FILE = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
FILES = (TOKENIZER_FILE, _CONFIG, "special_tokens_map.json", "chat_template.jinja")
_TRAINING_BYTES = 2**16
"""Bytes of a long text's pieces: the library counts several at once."""
PIECE_BYTES = 2**20
MOST_BYTES = 6 * 2**20
"""Bytes of text encoded at once if there is no place to cut: the library takes 130 bytes for each."""
NO_CUT = "it is too long: "

_PLACE = re.compile("(?<=[A-Za-z0-9\u4e00-\u9fa5])(?=[ \n,\uff0c\u3002])")
_ANY_PLACE = re.compile(r"(?<=\S)(?=\S)")
_AROUND = 128
"""Characters on each side of a place that the tokenizer is shown."""
_STARTS = 24
"""A word that begins at any of so many characters before a place must end there."""
_NEAR = 2**16
_MOST_TRIES = 200


class NoCutError(Exception):
    """A text has no place to cut where one is needed."""


class Cuts:
    """The places where one tokenizer begins a new word."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def pieces(self, raw: bytes, piece_bytes: int = PIECE_BYTES) -> Iterator[str]:
        """Yield the text of UTF-8 bytes in pieces of `piece_bytes`, or up to six megabytes if necessary.

        Raise NoCutError if six megabytes have no place to cut.
        """
        at = 0
        while at < len(raw):
            text = self._piece(raw, at, piece_bytes) or self._piece(raw, at, MOST_BYTES)
            if not text:
                length, most = format_bytes(len(raw)), format_bytes(MOST_BYTES)
                raise NoCutError(
                    f"{NO_CUT}{length} of text, with no place in the {most} from byte {at} where this "
                    "tokenizer surely begins a new word"
                )
            at += len(text.encode())
            yield text

    def _piece(self, raw: bytes, at: int, size: int) -> str:
        """Return the text up to the last place to cut in `size` bytes, or to the end; empty without one."""
        text = _decode(raw, at, size)
        if at + size >= len(raw):
            return text
        return text[: self._last_place(text, _decode(raw, at + len(text.encode()), 4 * _AROUND)) or 0]

    def _last_place(self, text: str, after: str) -> int | None:
        """Return the last place to cut a text, or None; `after` is what follows the text."""
        pattern = _ANY_PLACE if self._is_by_byte else _PLACE
        for begin in (max(1, len(text) - _NEAR), 1):
            last = deque((found.start() for found in pattern.finditer(text, begin)), _MOST_TRIES)
            if last:
                break
        return next((place for place in reversed(last) if self._divides(text, after, place)), None)

    def _divides(self, text: str, after: str, place: int) -> bool:
        left, right = text[max(0, place - _AROUND) : place], (text[place : place + _AROUND] + after)[:_AROUND]
        if self._ids(left + right) != self._ids(left) + self._ids(right):  # an added token, for instance
            return False
        if self._is_by_byte:
            return True
        words = self._words(right)
        starts = (left, *(left[-count:] for count in range(1, _STARTS)))
        return all(self._words(start + right) == self._words(start) + words for start in starts)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _words(self, text: str) -> list[str]:
        """Return the words of a text as the tokenizer's model sees them."""
        normalizer, pre_tokenizer = self._tokenizer.normalizer, self._tokenizer.pre_tokenizer
        text = normalizer.normalize_str(text) if normalizer is not None else text
        if pre_tokenizer is None:
            return [text]
        return [word for word, _ in pre_tokenizer.pre_tokenize_str(text)]

    @functools.cached_property
    def _is_by_byte(self) -> bool:
        """True if each byte has its own id, as with tokenizer.kind bytes: a word is all of the text."""
        is_byte_level = type(self._tokenizer.pre_tokenizer).__name__ == "ByteLevel"
        return is_byte_level and self._tokenizer.get_vocab_size(with_added_tokens=False) == 256


def is_utf8(raw: bytes) -> bool:
    """True if the bytes are valid UTF-8, checked piece by piece."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for at in range(0, len(raw), PIECE_BYTES):
            decoder.decode(raw[at : at + PIECE_BYTES], final=at + PIECE_BYTES >= len(raw))
    except UnicodeDecodeError:
        return False
    return True


def _decode(raw: bytes, at: int, size: int) -> str:
    """Return at most `size` bytes from `at`, complete characters only."""
    stop = min(at + size, len(raw))
    while stop < len(raw) and raw[stop] & 0xC0 == 0x80:
        stop -= 1
    return raw[at:stop].decode()


def train_byte_bpe(texts: Iterable[str | bytes], vocab_size: int, eos_token: str) -> str:
    """Return the tokenizer.json of a byte-level BPE. The same texts in the same order give the same file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[eos_token],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    same = Tokenizer(models.BPE())  # the trained one is locked
    same.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(_training_pieces(texts, Cuts(same)), trainer)
    return str(tokenizer.to_str())


def _training_pieces(texts: Iterable[str | bytes], cuts: Cuts) -> Iterator[str]:
    """Yield the texts, long ones in pieces, which contain the same words."""
    for text in texts:
        if isinstance(text, str) and len(text) <= PIECE_BYTES:
            yield text
            continue
        with contextlib.suppress(NoCutError):  # reported when it is encoded
            yield from cuts.pieces(text if isinstance(text, bytes) else text.encode(), _TRAINING_BYTES)


def byte_tokenizer(eos_token: str) -> str:
    """Return a tokenizer.json in which byte b has id b, and the EOS token id 256."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    # The printable stand-in of each byte in byte-level BPE (GPT-2's `bytes_to_unicode`, 2019).
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = [byte for byte in range(256) if byte not in plain]
    alphabet = {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(shifted)}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(eos_token, special=True, normalized=False)])
    return str(tokenizer.to_str())


def tokenizer_files(
    recipe: TokenizerRecipe, path: Path | None, texts: Iterable[str | bytes]
) -> dict[str, bytes]:
    """Return the files of DIR/tokenizer by name; UsageError if there is none to copy."""
    if recipe.kind == "path":
        assert path is not None, "the recipe requires a path with kind: path"
        return existing_files(path)
    if recipe.kind == "bytes":
        text = byte_tokenizer(recipe.eos_token)
    else:
        text = train_byte_bpe(texts, recipe.vocab_size or 0, recipe.eos_token)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": recipe.eos_token}
    return {TOKENIZER_FILE: text.encode(), _CONFIG: json.dumps(config).encode()}


def existing_files(path: Path) -> dict[str, bytes]:
    """Return a tokenizer.json, given as a file or its folder, and its companions; UsageError if missing."""
    folder = path if path.is_dir() else path.parent
    main = path / TOKENIZER_FILE if path.is_dir() else path
    if not main.is_file():
        raise UsageError(f"tokenizer.path: {main} is not there; give a folder that holds {TOKENIZER_FILE}")
    files = {TOKENIZER_FILE: main.read_bytes()}
    return files | {name: (folder / name).read_bytes() for name in FILES[1:] if (folder / name).is_file()}


def _read_model(path: Path) -> dict[str, Any]:
    """Return the `model` block. For the usual wrong file the tokenizers library raises a bare Exception."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UsageError(f"{path} cannot be read as {TOKENIZER_FILE}: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise UsageError(
            f"{path} is not a tokenizer.json of the tokenizers library (it has no `model` block)"
        )
    model: dict[str, Any] = content["model"]
    return model


class Encoder:
    """A loaded tokenizer.json. `vocab_size` is one more than the largest id."""

    def __init__(self, path: Path, eos: str | int, *, parse_special: bool = False) -> None:
        """Raise UsageError if the file is no tokenizer or has no such token.

        Args:
            eos: the token that closes a document, or its id.
            parse_special: text that spells a special token becomes that token, as in a chat template's
                output; else it stays text.
        """
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception for a file of a newer one
            _read_model(path)
            raise UsageError(f"{path} cannot be read as {TOKENIZER_FILE}: {error}") from None
        self._cuts = Cuts(self._tokenizer)
        self._parse_special = parse_special
        self._tokenizer.encode_special_tokens = not parse_special
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.eos_id = self._find_eos(path, eos, vocabulary)
        self._is_guarded = np.zeros(self.vocab_size, dtype=bool)
        """The ids that text must not spell: EOS, BOS and special tokens of more than one character."""
        self._is_guarded[self._guarded(path, vocabulary)] = True
        model = self._tokenizer.model
        is_unigram = type(model).__name__ == "Unigram"
        unknown = _read_model(path).get("unk_id") if is_unigram else vocabulary.get(model.unk_token)
        if unknown is not None:  # any text may produce it
            self._is_guarded[unknown] = False

    def _guarded(self, path: Path, vocabulary: dict[str, int]) -> list[int]:
        added = self._tokenizer.get_added_tokens_decoder().items()
        special = [number for number, token in added if token.special and len(token.content) > 1]
        bos = None
        with contextlib.suppress(OSError, ValueError, AttributeError):
            named = json.loads(path.with_name(_CONFIG).read_text(encoding="utf-8")).get("bos_token")
            bos = named.get("content") if isinstance(named, Mapping) else named
        return [self.eos_id, *special, *([vocabulary[bos]] if bos in vocabulary else [])]

    def _find_eos(self, path: Path, eos: str | int, vocabulary: dict[str, int]) -> int:
        if isinstance(eos, int):
            if self._tokenizer.id_to_token(eos) is None:
                raise UsageError(f"{path} has no token of id {eos}; set tokenizer.eos_id or eos_token")
            return eos
        if eos not in vocabulary:
            special = [token.content for token in self._tokenizer.get_added_tokens_decoder().values()]
            raise UsageError(f"{path} has no token {eos!r}{nearest(eos, special)}; set eos_token")
        return vocabulary[eos]

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint32]]:
        """Return the ids of each text, without any special token it does not spell.

        Raise UsageError if a text spells EOS or BOS in a way that cannot be cut.
        """
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        found = [np.array(item.ids, dtype=np.uint32) for item in encoded]
        if not self._tokenizer.encode_special_tokens:  # spelled tokens are intended
            return found
        return [
            self._encode_cut(text) if self._is_guarded[ids].any() else ids
            for text, ids in zip(texts, found, strict=True)
        ]

    def _encode_cut(self, text: str) -> npt.NDArray[np.uint32]:
        """Return the ids of a text cut in two within each spelling of a token that it must not spell.

        This is for tokens that are not special, and for those the model knows as pieces of text:
        encode_special_tokens (the library's option to treat special tokens as text) does not cover them. A
        tokenizer that starts each text with a blank puts one between the two.
        """
        encoded = self._tokenizer.encode(text, add_special_tokens=False)
        found = zip(encoded.ids, encoded.offsets, strict=True)
        spelled = [span for number, span in found if self._is_guarded[number]]
        cuts = [(start + stop) // 2 for start, stop in spelled if stop - start > 1]
        if not cuts:
            start, stop = spelled[0]
            raise UsageError(
                f"{text[start:stop]!r} is a token that must not stand in a text (EOS or BOS), and cannot be "
                "cut: take another tokenizer.eos_token"
            )
        pieces = [text[start:stop] for start, stop in pairwise([0, *cuts, len(text)])]
        return np.concatenate(self.encode(pieces))

    def encode_mixed(self, texts: Sequence[str], chats: Sequence[bool]) -> list[npt.NDArray[np.uint32]]:
        """Do as encode, but special tokens spelled by chats become themselves."""
        if not any(chats):
            return self.encode(texts)
        found: list[npt.NDArray[np.uint32]] = []
        try:
            for text, is_chat in zip(texts, chats, strict=True):
                self._tokenizer.encode_special_tokens = not (is_chat or self._parse_special)
                found.extend(self.encode([text]))
        finally:  # encode_known goes on after a text that has no tokens
            self._tokenizer.encode_special_tokens = not self._parse_special
        return found

    def encode_known(
        self, texts: Sequence[str | bytes], chats: Sequence[bool] = ()
    ) -> list[npt.NDArray[Any] | str]:
        """Do as encode_mixed, with an error in place of a text that the vocabulary cannot spell.

        A long text, which may be bytes, is encoded in pieces; without a cut the error begins with NO_CUT.
        """
        chats = chats or [False] * len(texts)
        if len(texts) == 1 and len(texts[0]) > PIECE_BYTES:
            return [self._encode_long(texts[0], chats[0])]
        if all(isinstance(text, str) and len(text) <= PIECE_BYTES for text in texts):
            try:
                return list(self.encode_mixed(texts, chats))  # type: ignore[arg-type]
            except UsageError:
                raise
            # The library raises plain Exception if a model without an unknown token needs one.
            except Exception as error:
                if len(texts) == 1:
                    return [str(error)]
        half = len(texts) // 2  # avoid a separate call for every good line
        return self.encode_known(texts[:half], chats[:half]) + self.encode_known(texts[half:], chats[half:])

    def _encode_long(self, text: str | bytes, is_chat: bool) -> npt.NDArray[Any] | str:
        """Return the ids of a long text, encoded in pieces, in the smallest type that holds them."""
        dtype = np.uint16 if self.vocab_size <= 2**16 else np.uint32
        ids = bytearray()
        try:
            for piece in self._cuts.pieces(text.encode() if isinstance(text, str) else text):
                (found,) = self.encode_mixed([piece], [is_chat])
                ids += found.astype(dtype).tobytes()
        except UsageError:
            raise
        except Exception as error:
            return str(error)
        return np.frombuffer(ids, dtype)

    def decode(self, ids: Any) -> str:
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False))
