"""Hold many documents as one array of bytes: words, lines, paragraphs and hashes without a Python loop.

For rules.py, minhash.py and contamination.py:

    batch = TextBatch(texts)
    words = batch.words                 # Segments: start, stop, document of each word
    batch.hashes(words)                 # uint64, equal for equal words
    words.count()                       # words of each document

A word is a run of bytes between white space; with `normal=True` a run of letters and digits of the
lower-cased text. A CJK character is a word by itself. Only ASCII, Latin-1, general and CJK punctuation is
recognised: punctuation of other scripts counts as letters.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from r1hpc.data.read.order import splitmix64

Ints = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]
Bools = npt.NDArray[np.bool_]

_ODD = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd and so invertible modulo 2^64
_INVERSE = pow(_ODD, -1, 2**64)
_BYTES: Hashes = np.random.default_rng(20201).integers(1, 2**63, 256, dtype=np.uint64) * np.uint64(
    2
) + np.uint64(1)
_SPACE: Bools = np.isin(np.arange(256), [9, 10, 11, 12, 13, 28, 29, 30, 31, 32])
_LETTER: Bools = np.array([chr(b).isalnum() or chr(b) == "_" or b > 127 for b in range(256)])
_ALNUM: Bools = np.array([chr(b).isalnum() or b > 127 for b in range(256)])
_BEFORE: Bools = np.isin(np.arange(256), list(b"\\~/@^-|."))
_AFTER: Bools = np.isin(np.arange(256), list(b"\\~/@^-|+=$"))
_JOINED: Bools = np.isin(np.arange(256), list(b"\\~/@^-|.+$"))
_DASH: Bools = np.isin(np.arange(256), list(b"-~,"))
_COMPARE: Bools = np.isin(np.arange(256), list(b":<>=/"))
_ALPHA: Bools = np.array([(b < 128 and chr(b).isalpha()) or b > 127 for b in range(256)])
_powers: list[Hashes] = [np.ones(1, dtype=np.uint64), np.ones(1, dtype=np.uint64)]


@dataclass(frozen=True)
class Segments:
    """Pieces of the batch's bytes, in order."""

    start: Ints
    stop: Ints
    document: Ints
    num_documents: int

    def count(self) -> Ints:
        """Return the number of segments of each document."""
        return np.bincount(self.document, minlength=self.num_documents)

    def total(self, values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Return the sum of a value of each segment over each document."""
        found = np.bincount(self.document, values.astype(np.float64), self.num_documents)
        return found.astype(np.float64)

    def where(self, chosen: Bools) -> "Segments":
        return Segments(self.start[chosen], self.stop[chosen], self.document[chosen], self.num_documents)


class TextBatch:
    """Documents end to end, each closed by a newline that is not its own."""

    def __init__(self, texts: Sequence[str], *, normal: bool = False) -> None:
        raws = [(text.lower() if normal else text).encode("utf-8", "replace") for text in texts]
        self.num_documents = len(raws)
        self._normal = normal
        self.bytes = np.frombuffer(b"\n".join([*raws, b""]), dtype=np.uint8)
        lengths = np.array([len(raw) + 1 for raw in raws], dtype=np.int64)
        self.stop: Ints = np.cumsum(lengths) - 1
        self.start: Ints = self.stop - lengths + 1
        self.num_chars = np.array([len(text) for text in texts], dtype=np.int64)

    @cached_property
    def words(self) -> Segments:
        found = _LETTER[self.bytes] & ~self._wide_signs if self._normal else ~self._space
        cjk = self._cjk & found
        return self._divided(found & (~_shifted(found, 1) | cjk | _shifted(cjk, 3)), ~found)

    @cached_property
    def tokens(self) -> Segments:
        """Return words and separate signs, much as spaCy's English tokenizer divides a text.

        Signs around a word are tokens. Those inside belong to it (don't, 3.14, example.org, any address with
        ://), except a dash between letters, and a slash, colon or comparison before one. Dots, dashes,
        slashes and the like in a row are one token.
        """
        letter = self._letters
        sign = ~letter & ~self._space & ((self.bytes & 0xC0) != 0x80)
        joined = sign & _JOINED[self.bytes]
        cjk = self._cjk & letter
        begins_sign = sign & ~(joined & _shifted(joined, 1))
        begins_word = letter & (~_shifted(letter, 1) | cjk | _shifted(cjk, 3))
        return self._divided(begins_sign | begins_word, self._space)

    def is_sign(self, tokens: Segments) -> Bools:
        """Return for each token: True if it is a sign and no word."""
        return ~self._letters[tokens.start]

    @cached_property
    def cjk_share(self) -> npt.NDArray[np.float64]:
        """Return the share of CJK characters among the words of each document."""
        return self.words.total(self._cjk[self.words.start]) / np.maximum(self.words.count(), 1)

    @cached_property
    def lines(self) -> Segments:
        """Return the non-blank lines, without white space around them."""
        return self._strip(self._all_lines)

    @cached_property
    def paragraphs(self) -> Segments:
        """Return the runs of lines between blank ones."""
        every = self._all_lines
        blank = self._visible[every.stop] == self._visible[every.start]
        first = np.diff(every.document, prepend=-1) > 0
        begin = ~blank & (first | _shifted(blank, 1))
        end = ~blank & (np.append(first[1:], True) | _shifted(blank, -1))
        return self._strip(
            Segments(every.start[begin], every.stop[end], every.document[begin], self.num_documents)
        )

    def chars(self, segments: Segments) -> Ints:
        """Return the characters of each segment."""
        return self._chars[segments.stop] - self._chars[segments.start]

    def has_alpha(self, segments: Segments) -> Bools:
        """Return for each segment: True if it contains a letter."""
        total = np.concatenate([[0], np.cumsum(_ALPHA[self.bytes])])
        return total[segments.stop] > total[segments.start]

    def hashes(self, segments: Segments) -> Hashes:
        """Return a 64-bit hash of each segment's bytes: polynomial modulo 2^64, mixed."""
        _, inverse = _power_table(len(self.bytes))
        return splitmix64(
            (self._prefix[segments.stop] - self._prefix[segments.start]) * inverse[segments.start]
        )

    def ngrams(self, size: int) -> tuple[Hashes, Ints]:
        """Return a hash of each run of `size` words inside one document, and that document."""
        keys, first = ngrams(self._word_hashes, self.words.document, size)
        return keys, self.words.document[first]

    def runs(self, shortest: int, longest: int) -> Iterator[tuple[int, Hashes, Ints]]:
        """Yield size, hashes and documents of the n-grams of `longest` words; a shorter document is one run.

        Documents of fewer than `shortest` words have none.
        """
        count = self.words.count()
        for size in range(shortest, longest + 1):
            chosen = (count >= size if size == longest else count == size)[self.words.document]
            if chosen.any():
                document = self.words.document[chosen]
                keys, first = ngrams(self._word_hashes[chosen], document, size)
                yield size, keys, document[first]

    @cached_property
    def _word_hashes(self) -> Hashes:
        return self.hashes(self.words)

    @cached_property
    def _prefix(self) -> Hashes:
        power, _ = _power_table(len(self.bytes))
        return np.concatenate(
            [np.zeros(1, np.uint64), np.cumsum(_BYTES[self.bytes] * power[: len(self.bytes)])]
        )

    @cached_property
    def _chars(self) -> Ints:
        return np.concatenate([[0], np.cumsum((self.bytes & 0xC0) != 0x80)])

    @cached_property
    def _space(self) -> Bools:
        """Return the bytes of white space: ASCII, and those of a no-break, general or ideographic space."""
        b = self.bytes
        space = _SPACE[b]
        one, two = _shifted(b, -1), _shifted(b, -2)
        wide = (b == 0xE2) & (one == 0x80) & ((two <= 0x8A) | (two == 0xA8) | (two == 0xA9) | (two == 0xAF))
        wide |= (b == 0xE3) & (one == 0x80) & (two == 0x80)
        return space | _spread((b == 0xC2) & (one == 0xA0), 2) | _spread(wide, 3)

    @cached_property
    def _letters(self) -> Bools:
        """Return the bytes of letters and digits, and of signs between or beside them that belong to them."""
        b, place = self.bytes, np.arange(len(self.bytes))
        visible, wide = ~self._space, self._wide_signs
        letter = _ALNUM[b] & visible & ~wide
        chunk = np.cumsum(visible & ~_shifted(visible, 1)) - 1
        count = int(chunk[-1]) + 1
        first, last = np.full(count + 1, len(b)), np.full(count + 1, -1)
        where = np.flatnonzero(letter)
        last[chunk[where]] = where  # the last assignment to an index wins
        first[chunk[where][::-1]] = where[::-1]
        edge = np.maximum.accumulate(np.where(_BEFORE[b], -1, place))
        begin = np.where(first < len(b), edge[np.minimum(np.maximum(first - 1, 0), len(b) - 1)] + 1, first)
        begin = np.where(first == 0, 0, np.minimum(begin, first))
        edge = np.minimum.accumulate(np.where(_AFTER[b], len(b), place)[::-1])[::-1]
        end = np.where(last >= 0, edge[np.minimum(last + 1, len(b) - 1)], 0)
        inside = visible & (place >= begin[chunk]) & (place < end[chunk])
        found: Bools = inside & ~self._splits(letter, wide, chunk, count)
        return found

    def _splits(self, letter: Bools, wide: Bools, chunk: Ints, count: int) -> Bools:
        """Return the signs that divide the word they are in, unless it is an address."""
        b = self.bytes
        alpha = letter & _ALPHA[b]
        after = _shifted(alpha, -1)
        between = _shifted(alpha, 1) & after
        divides = (_DASH[b] & between) | (_COMPARE[b] & _shifted(letter, 1) & after) | wide
        address = np.zeros(count + 1, dtype=bool)
        address[chunk[(b == 58) & (_shifted(b, -1) == 47) & (_shifted(b, -2) == 47)]] = True
        found: Bools = divides & ~address[chunk]
        return found

    @property
    def _wide_signs(self) -> Bools:
        """Return the bytes of Latin-1, general, CJK and full-width punctuation."""
        b, one = self.bytes, _shifted(self.bytes, -1)
        sign = (b == 0xE2) & ((one == 0x80) | (one == 0x81))
        sign |= ((b == 0xE3) & (one == 0x80)) | ((b == 0xEF) & (one == 0xBC))
        return _spread(sign, 3) | _spread((b == 0xC2) & (one < 0xC0), 2)

    @property
    def _cjk(self) -> Bools:
        """Return the bytes at which a CJK character begins."""
        b = self.bytes
        found: Bools = ((b >= 0xE4) & (b <= 0xE9)) | ((b == 0xE3) & (_shifted(b, -1) >= 0x81))
        return found

    @cached_property
    def _visible(self) -> Ints:
        return np.concatenate([[0], np.cumsum(~self._space)])

    @cached_property
    def _all_lines(self) -> Segments:
        stop = np.flatnonzero(self.bytes == 10)
        return self._segments(np.concatenate([[0], stop[:-1] + 1]), stop)

    def _strip(self, segments: Segments) -> Segments:
        """Strip white space from both ends; segments of nothing else are left out."""
        visible = np.flatnonzero(~self._space)
        first = np.searchsorted(visible, segments.start)
        last = np.searchsorted(visible, segments.stop)
        chosen = last > first
        start, stop = visible[first[chosen]], visible[last[chosen] - 1] + 1
        return Segments(start, stop, segments.document[chosen], self.num_documents)

    def _divided(self, begin: Bools, outside: Bools) -> Segments:
        """Return the segments that begin at these bytes; each ends before the next one or a byte outside."""
        start, cuts = np.flatnonzero(begin), np.flatnonzero(begin | outside)
        stop = cuts[np.searchsorted(cuts, start, side="right")] if len(start) else start
        return self._segments(start, stop)

    def _segments(self, start: Ints, stop: Ints) -> Segments:
        document = np.searchsorted(self.start, start, side="right") - 1
        return Segments(start, stop, document, self.num_documents)


def ngrams(hashes: Hashes, document: Ints, size: int) -> tuple[Hashes, Ints]:
    """Return hashes of all runs of `size` words inside one document, and the word each begins at."""
    if len(hashes) < size:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    count = len(hashes) - size + 1
    found = np.zeros(count, dtype=np.uint64)
    for offset in range(size):
        found = longer_ngrams(found, hashes[offset : offset + count])
    inside = np.flatnonzero(document[:count] == document[size - 1 :])
    return splitmix64(found[inside]), inside


def longer_ngrams(rolled: Hashes, words: Hashes) -> Hashes:
    """Return unmixed hashes of n-grams with one more word at the end; 0 stands for no word."""
    return rolled * np.uint64(_ODD) + words


def of_document(hashes: Hashes, document: Ints) -> Hashes:
    """Return hashes that are equal only within one document."""
    return hashes ^ splitmix64(document.astype(np.uint64) + np.uint64(1))


def _shifted(values: npt.NDArray[Any], places: int) -> npt.NDArray[Any]:
    """Return the values so many places later (earlier, if negative); the places left over are 0."""
    found = np.zeros_like(values)
    if places > 0:
        found[places:] = values[:-places]
    else:
        found[:places] = values[-places:]
    return found


def _spread(starts: Bools, width: int) -> Bools:
    found = starts.copy()
    for offset in range(1, width):
        found |= _shifted(starts, offset)
    return found


def _power_table(size: int) -> tuple[Hashes, Hashes]:
    """Return powers of the odd number and of its inverse, at least `size` of each."""
    if len(_powers[0]) < size:
        length = 1 << size.bit_length()
        for number, base in enumerate((_ODD, _INVERSE)):
            table = np.full(length, base, dtype=np.uint64)
            table[0] = 1
            _powers[number] = np.multiply.accumulate(table)
    return _powers[0], _powers[1]
