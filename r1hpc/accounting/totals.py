"""GPU-hours of as many records of sacct as there are: by user, account, state, QOS, partition, run and day.

    with open("sacct.txt", "rb") as file:
        hours = sum_dump(file, "sacct.txt", Selection(user="ada"))

Of each record some 25 bytes of numbers are kept until the end, when those that stand in the file twice are
found by job id and start. One of them counts: the one that ran longest, of equals the last. Sums are exact:
whole GPU-seconds, below 2**53, divided once. A job id is known by its 64-bit hash: two would have to share
it, and the second in which they began, to count as one.
"""

from collections import defaultdict
from datetime import datetime
from typing import IO, Any

import numpy as np

from r1hpc.accounting.columns import LONGEST_LINE, Block, Bools, ColumnReader, Ints, blocks_of_lines
from r1hpc.accounting.hours import KEYS, RUN_KEYS, UNKNOWN, fold_hours, in_hours, midnight_before
from r1hpc.accounting.selection import Selection
from r1hpc.slurm.sacct import read_header


def sum_dump(file: IO[bytes], source: str, selection: Selection) -> dict[str, Any]:
    """As accounting.hours.fold_hours, of what sacct printed into a file.

    Raises:
        StateError: the header or a line is not of this format; names `source`, line and fix.
    """
    columns = read_header(file.readline(LONGEST_LINE), source, selection.columns)
    reader = ColumnReader(columns, source, selection.runs)
    read = (reader.read(lines, number) for number, lines in blocks_of_lines(file, source))
    blocks = [block for block in read if len(block["job"])]
    if not blocks:
        return fold_hours(())
    begin = min(int(block["start"].min()) for block in blocks)
    end = max(int(block["start"].max()) + int(block["seconds"].max()) for block in blocks)
    sums = _Sums(reader.codes, selection, _midnights(begin, end))
    for block, counts in zip(blocks, _once(blocks), strict=True):
        sums.add(block, counts)
    return sums.to_hours()


class _Sums:
    """GPU-seconds of the blocks that were added, in floats that hold whole numbers."""

    def __init__(self, codes: dict[str, dict[str, int]], selection: Selection, midnights: Ints) -> None:
        runs = [(UNKNOWN, UNKNOWN), *selection.runs.values()]
        self._selection = selection
        self._codes = codes
        self._names = {key: list(codes[key]) for key in KEYS}
        self._names |= {key: [run[at] for run in runs] for at, key in enumerate(RUN_KEYS)}
        self._by = {key: np.zeros((2, len(names))) for key, names in self._names.items()}
        """GPU-seconds, and how many records they are of: a name without a record is not shown."""
        self._days = _Days(midnights)
        self._gpu_seconds = self._node_seconds = 0.0

    def add(self, block: Block, counts: Bools) -> None:
        """Count the records of a block for which `counts` is true."""
        begin, end = block["start"].astype(np.int64), block["start"] + block["seconds"].astype(np.int64)
        if self._selection.start is not None:
            begin = np.maximum(begin, self._selection.start)
        if self._selection.end is not None:
            end = np.minimum(end, self._selection.end)
        chosen = np.flatnonzero(counts & self._is_selected(block, begin, end))
        begin, held = begin[chosen], (end - begin)[chosen]
        gpus, nodes = block["gpus"][chosen], block["nodes"][chosen]
        self._gpu_seconds += float((gpus * held).sum())
        self._node_seconds += float((nodes * held).sum())
        self._days.add(begin, begin + held, gpus)
        for key, names in self._names.items():
            codes = block["run" if key in RUN_KEYS else key][chosen]
            self._by[key] += (
                np.bincount(codes, gpus * held, len(names)),
                np.bincount(codes, minlength=len(names)),
            )

    def _is_selected(self, block: Block, begin: Ints, end: Ints) -> Bools:
        selected = np.ones(len(begin), np.bool_)
        for key in ("user", "account"):
            if (wanted := getattr(self._selection, key)) is not None:
                selected &= block[key] == self._codes[key].get(wanted, -1)
        if self._selection.start is not None or self._selection.end is not None:
            selected &= end > begin
        return selected

    def to_hours(self) -> dict[str, Any]:
        by: dict[str, dict[str, float]] = {"day": self._days.totals()}
        for key, names in self._names.items():
            by[key] = defaultdict(float)
            for name, gpu_seconds, count in zip(names, *self._by[key], strict=True):
                if count:
                    by[key][name] += float(gpu_seconds)
        return in_hours(self._gpu_seconds, self._node_seconds, by)


class _Days:
    """GPU-seconds by local day. A whole day in the middle of an allocation is never looked at.

    Days on which an allocation begins or ends get what it held then; of the days between only the number of
    GPUs that changes at their ends is kept, and summed up over the days at last.
    """

    def __init__(self, midnights: Ints) -> None:
        self._midnights = midnights
        """All of them, from one before the first allocation to one after the last."""
        self._count = len(midnights) - 1
        self._within = np.zeros(self._count)
        self._change = np.zeros(self._count)

    def add(self, begin: Ints, end: Ints, gpus: Ints) -> None:
        midnights, count = self._midnights, self._count
        first = np.searchsorted(midnights, begin, "right") - 1
        until = midnights[first + 1]
        self._within += np.bincount(first, gpus * (np.minimum(end, until) - begin), count)
        longer = np.flatnonzero(end > until)
        first, end, gpus = first[longer], end[longer], gpus[longer]
        last = np.searchsorted(midnights, end) - 1
        self._within += np.bincount(last, gpus * (end - midnights[last]), count)
        self._change += np.bincount(first + 1, gpus, count) - np.bincount(last, gpus, count)

    def totals(self) -> dict[str, float]:
        """YYYY-MM-DD: GPU-seconds, of the days on which a GPU was held."""
        totals = self._within + np.cumsum(self._change) * np.diff(self._midnights)
        return {
            datetime.fromtimestamp(self._midnights[day]).date().isoformat(): float(totals[day])
            for day in np.flatnonzero(totals)
        }


def _midnights(first: int, last: int) -> Ints:
    """The local ones around these moments and between them; a day may have 23 or 25 hours."""
    found = [midnight_before(first)]
    while found[-1] <= last:
        found.append(midnight_before(found[-1], 1))
    return np.array(found, np.int64)


def _once(blocks: list[Block]) -> list[Bools]:
    """Which records of each block count: of those with one job and start the longest, of equals the last."""
    jobs = np.concatenate([block["job"] for block in blocks])
    jobs.sort()
    several = np.unique(jobs[1:][jobs[1:] == jobs[:-1]])
    del jobs  # there is no room to sort all columns; few jobs have more than one record
    rows = [_rows_in(block["job"], several) for block in blocks]
    job, start, seconds = (
        np.concatenate([block[name][some] for block, some in zip(blocks, rows, strict=True)])
        for name in ("job", "start", "seconds")
    )
    order = np.lexsort((seconds, start, job))  # stable: the later of equals comes last
    same = (np.diff(job[order]) == 0) & (np.diff(start[order]) == 0)
    counts = np.ones(len(order), np.bool_)
    counts[order[:-1][same]] = False
    found = [np.ones(len(block["job"]), np.bool_) for block in blocks]
    parts = np.split(counts, np.cumsum([len(some) for some in rows])[:-1])
    for once, some, part in zip(found, rows, parts, strict=True):
        once[some] = part
    return found


def _rows_in(values: Ints, ordered: Ints) -> Ints:
    """Where there is one of `ordered`."""
    if not len(ordered):
        return np.zeros(0, np.int64)
    return np.flatnonzero(np.take(ordered, np.searchsorted(ordered, values), mode="clip") == values)
