"""Read cells of lines with a separator by column with numpy: as hashes, as whole numbers, or by a rule.

Nothing is made for each cell: a column is its places in the bytes of the lines, and equal texts are known by
a 64-bit hash.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from r1hpc.slurm.sacct import BOM, Columns

Hashes = npt.NDArray[np.uint64]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.integer[Any]]
_MOST_TEXTS = 2**16
_MOST_DIGITS = 18
_PADDING = 64
_MASKS = np.array([2 ** (8 * count) - 1 for count in range(9)], np.uint64)
_ONES, _HIGH = np.uint64(0x0101010101010101), np.uint64(0x8080808080808080)
_ODD_NUMBER = np.uint64(0x9E3779B97F4A7C15)
ODD = -1
"""The code of a cell whose row slurm.sacct shall read."""


class Table:
    """The cells of whole lines, as places in their bytes. A row that is torn has a length of 0 in all."""

    def __init__(self, lines: bytes, columns: Columns) -> None:
        self._names, width = columns.names, len(columns.names)
        self.lines = lines
        self.bytes = np.frombuffer(lines + bytes(_PADDING), np.uint8)
        used = self.bytes[: len(lines)]
        ends, bars = np.flatnonzero(used == ord("\n")), np.flatnonzero(used == ord("|"))
        self.begin = np.append(0, ends[:-1] + 1)
        self.end = ends
        while b"\r" in lines and (returns := self.bytes[self.end - 1] == ord("\r")).any():
            self.end = self.end - (returns & (self.end > self.begin))
            if not (returns & (self.end > self.begin)).any():
                break
        after = np.searchsorted(bars, ends)
        self._before = np.append(0, after[:-1])
        surplus = after - self._before - (width - 1)
        self.is_torn: Bools = surplus != 0 if "jobname" not in self._names else surplus < 0
        if BOM.encode() in lines:
            self.is_torn |= self.bytes[self.begin] == BOM.encode()[0]
        self._after, self._bars = after, np.append(bars, 0)

    def has(self, name: str) -> bool:
        return name in self._names

    def __len__(self) -> int:
        return len(self.end)

    def column(self, name: str) -> "Cells":
        """Return a column other than the job name."""
        at, width = self._names.index(name), len(self._names)
        # Beyond the job name count cells from the right: it may hold separators.
        is_right = self.has("jobname") and at > self._names.index("jobname")
        bar = self._after - (width - 1 - at) if is_right else self._before + at  # the one behind the cell
        bar = np.where(self.is_torn, 0, bar)
        begin = self.begin if at == 0 else self._bars[bar - 1] + 1
        end = self.end if at == width - 1 else self._bars[bar]
        return Cells(self, begin, np.where(self.is_torn, 0, end - begin))


class Cells:
    """One column of a table."""

    def __init__(self, table: Table, begin: Ints, length: Ints) -> None:
        self.table, self.begin, self.length = table, begin, length

    def text(self, row: int) -> str:
        at = self.begin[row]
        return self.table.lines[at : at + self.length[row]].decode("utf-8", "replace")

    def cut(self, most: int) -> "Cells":
        return Cells(self.table, self.begin, np.minimum(self.length, most))

    def _words(self) -> Iterator[tuple[Any, Hashes]]:
        """Yield which of them have so many bytes, and their next 8, with zeros behind the end."""
        whole = self.table.bytes
        words = np.lib.stride_tricks.as_strided(whole[:8].view(np.uint64), (len(whole) - 7,), (1,))
        for at in range(0, int(self.length.max(initial=0)), 8):
            left = self.length - at
            rows = slice(None) if left.min() > 0 else np.flatnonzero(left > 0)
            yield rows, words[self.begin[rows] + at] & _MASKS[np.minimum(left[rows], 8)]

    def hashes(self) -> Hashes:
        """Return a 64-bit hash of each."""
        found: Hashes = self.length.astype(np.uint64)
        for rows, words in self._words():
            mixed = (found[rows] ^ words) * _ODD_NUMBER
            found[rows] = mixed ^ (mixed >> np.uint64(29))
        return found

    def hold(self, byte: int) -> Bools:
        """Return which of them hold this byte."""
        held = np.zeros(len(self.length), np.bool_)
        for rows, words in self._words():
            differs = words ^ (np.uint64(byte) * _ONES)  # 0 where they are the same
            held[rows] |= ((differs - _ONES) & ~differs & _HIGH) != 0
        return held

    def hold_other_than_ascii(self) -> Bools:
        held = np.zeros(len(self.length), np.bool_)
        for rows, words in self._words():
            held[rows] |= (words & _HIGH) != 0
        return held

    def numbers(self, most: int) -> Ints:
        """Return the whole numbers; ODD for anything else."""
        width = min(_MOST_DIGITS, int(self.length.max(initial=1)))
        places = (self.begin + self.length)[:, None] - np.arange(width, 0, -1)
        digits = self.table.bytes[places].astype(np.int64) - ord("0")
        digits[np.arange(width, 0, -1) > self.length[:, None]] = 0
        values = digits @ 10 ** np.arange(width - 1, -1, -1)
        bad = ((digits < 0) | (digits > 9)).any(1) | (self.length < 1) | (self.length > width)
        return np.where(bad | (values > most), ODD, values)


class Codes:
    """The number of each text by a rule; ODD if the rule raises ValueError."""

    def __init__(self, rule: Callable[[str], int]) -> None:
        self._rule = rule
        self._hashes: Hashes = np.zeros(0, np.uint64)
        self._values: Ints = np.zeros(0, np.int64)

    def of(self, cells: Cells) -> Ints:
        hashes = cells.hashes()
        if len(self._hashes):
            at = np.searchsorted(self._hashes, hashes)
            at[at == len(self._hashes)] = 0
            if (self._hashes[at] == hashes).all():
                return self._values[at]
        if len(self._hashes) > _MOST_TEXTS:  # such as AllocTRES with the energy used
            self._hashes, self._values = self._hashes[:0], self._values[:0]
        fresh, rows = np.unique(hashes, return_index=True)
        is_fresh = ~np.isin(fresh, self._hashes)
        fresh, values = fresh[is_fresh], [self._number(cells.text(row)) for row in rows[is_fresh]]
        joined = np.append(self._hashes, fresh)
        order = np.argsort(joined)
        self._hashes = joined[order]
        self._values = np.append(self._values, np.array(values, np.int64))[order]
        return self._values[np.searchsorted(self._hashes, hashes)]

    def _number(self, text: str) -> int:
        try:
            return self._rule(text)
        except ValueError:
            return ODD


def hash_of(text: str) -> Ints:
    columns = Columns(("text",), "text")
    return Table(text.encode() + b"\n", columns).column("text").hashes().view(np.int64)
