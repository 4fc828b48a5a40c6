"""Cut a long text where its tokenizer begins a new word: the pieces give the ids of the whole text.

    for piece in Cuts(tokenizer).pieces(raw): ...

A tokenizer divides a text into words before its model sees them. A text is cut between a letter or digit and
a blank, line feed or comma, if the tokenizer begins a new word there at any number of characters before it.
"""

import codecs
import functools
import re
from collections import deque
from collections.abc import Iterator
from typing import Any

from r1hpc.base.units import format_bytes

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

        Raises:
            NoCutError: six megabytes without a place to cut.
        """
        at = 0
        while at < len(raw):
            for size in (piece_bytes, MOST_BYTES):
                text = _decode(raw, at, size)
                if at + size >= len(raw):
                    break
                if place := self._last_place(text, _decode(raw, at + len(text.encode()), 4 * _AROUND)):
                    text = text[:place]
                    break
            else:
                length, most = format_bytes(len(raw)), format_bytes(MOST_BYTES)
                raise NoCutError(
                    f"{NO_CUT}{length} of text, with no place in the {most} from byte {at} where this "
                    "tokenizer surely begins a new word"
                )
            at += len(text.encode())
            yield text

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
        return (
            [word for word, _ in pre_tokenizer.pre_tokenize_str(text)]
            if pre_tokenizer is not None
            else [text]
        )

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
