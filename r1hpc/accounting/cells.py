"""Cells of a table in bytes, a whole column at a time, without an object for any of them.

    for block in read_blocks(file, columns):          # a quarter of a MiB of whole lines
        column = block.column("elapsedraw")
        seconds, odd = number(block, column)

Eight bytes are one machine word: a word is loaded from any address, and digits, separators and texts are
worked on eight at a time. A text becomes its 64-bit hash and that a small number, see `Names`. What does not
look as it nearly always does is marked `odd` and left to the reader in slurm.usage, cell by cell.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from r1hpc.accounting.usage import Columns, RowError

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
Bools = npt.NDArray[np.bool_]
T = TypeVar("T")

_BLOCK_BYTES = 2**21
"""Measured: with 2**19 numpy's calls cost a fifth more, with 2**22 the caches miss as much."""
_MARGIN = 16
"""Bytes around a block, so that a word beside its first or last cell can be loaded too."""
_ZEROS = np.uint64(0x3030303030303030)
_NINES_CARRY = np.uint64(0x7676767676767676)
_HIGH_BITS = np.uint64(0x8080808080808080)
_LOW_BITS = np.uint64(0x0101010101010101)
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_HALF = np.uint64(32)
_KEEP_FIRST = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)
"""Masks for the first n bytes of a word; words are little-endian, as text reads from low to high."""


class BadLineError(Exception):
    """A line that cannot be read, at this offset in the file."""

    def __init__(self, offset: int, why: ValueError) -> None:
        super().__init__(str(why))
        self.offset = offset
        self.why = why


class Column(NamedTuple):
    """Where the cells of one column lie in their block."""

    begin: Ints
    end: Ints

    @property
    def lengths(self) -> Ints:
        return self.end - self.begin

    def pick(self, rows: "Bools | Ints") -> "Column":
        return Column(self.begin[rows], self.end[rows])


@dataclass(frozen=True)
class Block:
    """Whole lines of a dump. One that was read is good until the next one is."""

    offset: int
    """Of the first line in the file."""
    raw: bytearray
    size: int
    """Bytes of lines; they begin at _MARGIN."""
    separators: Ints
    before: Ints
    """For each line the index of the separator before its first cell."""
    after: Ints
    """And of the one after its last."""
    columns: Columns

    @property
    def num_rows(self) -> int:
        return len(self.before)

    def column(self, name: str) -> Column | None:
        """Begin and end of each row's cell; None where the dump has no such column.

        Cells beyond the job name are counted from the right: the name may hold separators.
        """
        at = self.columns.at(name)
        if at is None:
            return None
        name_at = self.columns.at("jobname")
        if name_at is None or at < name_at:
            first = self.before + at
            last = first + 1
        else:
            last = self.after - (len(self.columns.names) - 1 - at)
            first = last - 1 if at > name_at else self.before + at
        return Column(self.separators[first] + 1, self.separators[last])

    def pick(self, rows: "Bools | Ints") -> "Block":
        """The same block with some of its rows."""
        return Block(
            self.offset,
            self.raw,
            self.size,
            self.separators,
            self.before[rows],
            self.after[rows],
            self.columns,
        )

    @property
    def words(self) -> Words:
        """The eight bytes at each address, overlapping."""
        return np.ndarray((len(self.raw) - 7,), "<u8", self.raw, 0, (1,))

    def text(self, column: Column, row: int) -> bytes:
        return bytes(self.raw[column.begin[row] : column.end[row]])

    def line(self, row: int) -> bytes:
        """Without its end."""
        return bytes(self.raw[self._begin(row) : self.separators[self.after[row]]])

    def offset_of(self, row: int) -> int:
        """Of a row in the file."""
        return self._begin(row) - _MARGIN + self.offset

    @property
    def begins(self) -> Ints:
        """Where each row's line begins, from the begin of the block."""
        return self.separators[self.before] + (1 - _MARGIN)

    def _begin(self, row: int) -> int:
        return int(self.separators[self.before[row]]) + 1


def read_blocks(file: IO[bytes], columns: Columns, size: int = _BLOCK_BYTES) -> Iterator[Block]:
    """The rest of a file as blocks of whole lines; a last line without its end is one too.

    Raises:
        BadLineError: a line longer than a block, or with other than the header's number of cells.
    """
    raw = bytearray(_MARGIN + size + 1 + _MARGIN)
    offset, held = file.tell(), 0
    while True:
        read = file.readinto(memoryview(raw)[_MARGIN + held : _MARGIN + size])  # type: ignore[attr-defined]
        held += read
        if not read and held and raw[_MARGIN + held - 1] != ord("\n"):
            raw[_MARGIN + held] = ord("\n")
            held += 1
        end = raw.rfind(b"\n", _MARGIN, _MARGIN + held) + 1 - _MARGIN
        if end > 0:
            _without_returns(raw, end)
            yield _block(raw, end, offset, columns)
            raw[_MARGIN : _MARGIN + held - end] = raw[_MARGIN + end : _MARGIN + held]
            offset, held = offset + end, held - end
        elif held >= size:
            raise BadLineError(offset, RowError(0, f"is longer than {size} bytes: not from sacct -P"))
        elif not read:
            return


def _without_returns(raw: bytearray, size: int) -> None:
    """Make of each line end of Windows one of Unix and a blank line, so that no line moves."""
    if raw.find(b"\r\n", _MARGIN, _MARGIN + size) >= 0:
        raw[_MARGIN : _MARGIN + size] = raw[_MARGIN : _MARGIN + size].replace(b"\r\n", b"\n\n")


def make_block(lines: bytes, offset: int, columns: Columns) -> Block:
    """A block of lines that are at hand.

    Raises:
        BadLineError: see read_blocks.
    """
    return _block(bytearray(bytes(_MARGIN) + lines + bytes(_MARGIN)), len(lines), offset, columns)


def _block(raw: bytearray, size: int, offset: int, columns: Columns) -> Block:
    """Find the cells; blank lines are left out."""
    raw[_MARGIN - 1] = ord("\n")  # so that every cell lies between two separators
    content = np.frombuffer(raw, np.uint8, _MARGIN + size)
    ends = content == ord("\n")
    separators = np.flatnonzero((content == ord("|")) | ends)
    line_ends = np.flatnonzero(ends[separators])
    before, after = line_ends[:-1], line_ends[1:]
    block = Block(offset, raw, size, separators, before, after, columns)
    surplus = block.after - block.before - len(columns.names)
    if surplus.any():
        block = _check(block, surplus)
    return block


def _check(block: Block, surplus: Ints) -> Block:
    """Only a job name explains more cells than the header's."""
    count = len(block.columns.names)
    bad = surplus < 0 if "jobname" in block.columns.names else surplus != 0
    for row in map(int, np.flatnonzero(bad)):
        if block.line(row).strip():
            found = int(surplus[row]) + count
            words = f"has {found} fields and its header {count}: torn or not from sacct -P"
            raise BadLineError(block.offset_of(row), RowError(0, words))
    return block.pick(~bad)


def load(block: Block, column: Column, at: int = 0) -> Words:
    """Bytes at..at+8 of each cell; what is beyond its end reads as zero."""
    lengths = column.lengths
    words = block.words
    if len(lengths) and at + 8 <= int(lengths.min()):
        return words[column.begin + at]
    left = np.minimum(lengths - at, 8)
    if at <= 8:  # of an empty cell the bytes after it are looked at, and masked away
        return words[column.begin + at] & _KEEP_FIRST[np.maximum(left, 0)]
    return words[np.minimum(column.begin + at, block.size + _MARGIN)] & _KEEP_FIRST[np.maximum(left, 0)]


def hash_of(block: Block, column: Column) -> Words:
    """64 bits of each text, never 0."""
    lengths = column.lengths
    hashes = np.zeros(len(lengths), np.uint64)
    for at in range(0, int(lengths.max(initial=0)), 8):
        longer = lengths > at
        count = np.count_nonzero(longer)
        if 2 * count > len(lengths):
            mixed = mix(hashes, load(block, column, at))
            hashes = mixed if count == len(lengths) else np.where(longer, mixed, hashes)
        else:  # a few are longer than the others, such as CANCELLED by 1000
            rows = np.flatnonzero(longer)
            hashes[rows] = mix(hashes[rows], load(block, column.pick(rows), at))
    return hashes | np.uint64(1)


def mix(hashes: Words, words: Words) -> Words:
    """One round: fold the upper half into the lower, then multiply, so that each bit reaches the others."""
    mixed = hashes ^ words
    mixed ^= mixed >> _HALF
    mixed *= _FACTOR
    mixed ^= mixed >> np.uint64(29)
    return mixed


def holds(block: Block, column: Column, character: str) -> Bools:
    """Which cells have this character in them."""
    found = np.zeros(len(column.begin), np.bool_)
    pattern = _LOW_BITS * np.uint64(ord(character))
    for at in range(0, int(column.lengths.max(initial=0)), 8):
        words = load(block, column, at) ^ pattern
        # A byte that is zero borrows from its high bit (H. S. Warren, Hacker's Delight, 6-1).
        found |= ((words - _LOW_BITS) & ~words & _HIGH_BITS) != 0
    return found


def equals(block: Block, column: Column, texts: "frozenset[bytes] | set[bytes]") -> Bools:
    """Which cells hold one of these texts of at most eight bytes."""
    found = np.zeros(len(column.begin), np.bool_)
    short = np.flatnonzero(column.lengths <= 8)
    words = np.array([int.from_bytes(text, "little") for text in texts], np.uint64)
    found[short] = np.isin(load(block, column.pick(short)), words)
    return found


def number(block: Block, column: Column) -> tuple[Ints, Bools]:
    """Decimal numbers of one to sixteen digits; odd: any other cell."""
    lengths = column.lengths
    value, odd = _digits(block, column.end, np.clip(lengths, 0, 8))
    if int(lengths.max(initial=0)) > 8:
        upper, odd_upper = _digits(block, column.end - 8, np.clip(lengths - 8, 0, 8))
        value = value + np.where(lengths > 8, upper, 0) * 10**8
        odd = odd | ((lengths > 8) & odd_upper)
    return value, odd | (lengths <= 0) | (lengths > 16)


def _digits(block: Block, ends: Ints, lengths: Ints) -> tuple[Ints, Bools]:
    """Numbers of at most eight digits before each of `ends`."""
    outside = _KEEP_FIRST[8 - lengths]
    words = (block.words[ends - 8] & ~outside) | (_ZEROS & outside)
    words = words ^ _ZEROS  # the digits become 0..9, and anything else a byte above that
    odd = ((words + _NINES_CARRY) | words) & _HIGH_BITS != 0
    ten, hundred = np.uint64(10), np.uint64(100)
    words = (words * ten + (words >> np.uint64(8))) & np.uint64(0x00FF00FF00FF00FF)
    words = (words * hundred + (words >> np.uint64(16))) & np.uint64(0x0000FFFF0000FFFF)
    words = (words * np.uint64(10**4) + (words >> _HALF)) & np.uint64(0xFFFFFFFF)
    return words.astype(np.int64), odd


def clock(block: Block, ends: Ints) -> tuple[Ints, Bools]:
    """Seconds of the HH:MM:SS before each of `ends`."""
    colons, places = np.uint64(0x00003A00003A0000), np.uint64(0x0000FF0000FF0000)
    words = block.words[ends - 8]
    digits = (words ^ _ZEROS) & ~places
    odd = (words & places != colons) | (((digits + _NINES_CARRY) | digits) & _HIGH_BITS != 0)
    tens = (digits * np.uint64(10) + (digits >> np.uint64(8))).astype(np.int64)
    hours, minutes, seconds = tens & 0xFF, (tens >> 24) & 0xFF, (tens >> 48) & 0xFF
    return 3600 * hours + 60 * minutes + seconds, odd


class Names(Generic[T]):
    """A small number for each text that occurs, with what was made of it.

    Two texts are one where their 64-bit hashes are: with a thousand names that happens once in 4e13 dumps.
    """

    _SLOTS_LOG2 = 14

    def __init__(self, make: Callable[[bytes], T], most: int | None = None) -> None:
        self._make = make
        self._most = most
        self._forget()

    def _forget(self) -> None:
        self.values: list[T] = []
        self._table = np.zeros(0, np.int64)
        self._known: dict[int, int] = {}
        self._hashes = np.zeros(2**self._SLOTS_LOG2, np.uint64)
        self._numbers = np.zeros(2**self._SLOTS_LOG2, np.int64)

    def numbers(self, block: Block, column: Column) -> Ints:
        """The number of each cell's text, an index of `values`.

        With `most`, what is known is forgotten once there is more of it: then only the numbers of this call
        are indices.
        """
        if self._most is not None and len(self.values) > self._most:
            self._forget()
        hashes = hash_of(block, column)
        slots = (hashes >> np.uint64(64 - self._SLOTS_LOG2)).astype(np.int64)
        numbers = self._numbers[slots]
        strange = np.flatnonzero(self._hashes[slots] != hashes)
        if len(strange):
            distinct, first, which = np.unique(hashes[strange], return_index=True, return_inverse=True)
            rows = zip(distinct, strange[first], strict=True)
            found = [self._number(int(hashed), block, column, int(row)) for hashed, row in rows]
            numbers[strange] = np.array(found, np.int64)[which]
        return numbers

    def looked_up(self, block: Block, column: Column) -> Ints:
        """The value of each cell's text, where values are integers or rows of them."""
        numbers = self.numbers(block, column)
        if len(self._table) != len(self.values):
            self._table = np.array(self.values, np.int64)
        return self._table[numbers]

    def _number(self, hashed: int, block: Block, column: Column, row: int) -> int:
        if hashed in self._known:
            return self._known[hashed]
        number = self._known[hashed] = len(self.values)
        self.values.append(self._make(block.text(column, row)))
        slot = hashed >> (64 - self._SLOTS_LOG2)
        if not self._hashes[slot]:
            self._hashes[slot], self._numbers[slot] = hashed, number
        return number
