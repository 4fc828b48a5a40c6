"""Do what hours.fold_hours does for millions of sacct records, by column with numpy and Arrow.

account.py calls it for an output above 256 KiB.

Some 25 bytes of numbers are kept of each record until the end. Then duplicates are found by job ID and start.
One of them counts: the one that ran longest, of equals the last. Sums are exact: whole GPU-seconds, below
2**53, divided once. A job ID is known by its 64-bit hash: to count as one, two would have to share it and the
second in which they began.

Arrow splits a block of lines into columns. slurm.sacct interprets a cell, once for each different text in the
block. An unusual block is read there row by row, which also names the line that cannot be read: each rule is
written once, with two speeds.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from datetime import datetime
from functools import cache, partial
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from r1hpc.accounting.hours import KEYS, RUN_KEYS, UNKNOWN, Selection, fold_hours, in_hours, midnight_before
from r1hpc.base.names import is_among
from r1hpc.base.units import parse_time
from r1hpc.slurm.sacct import (
    LONGEST_S,
    MOST,
    NEVER,
    NO_LATER,
    Columns,
    RowError,
    gpus_of,
    line_error,
    nodes_of,
    read_header,
    read_rows,
    state_of,
)

Ints = npt.NDArray[np.integer[Any]]
Bools = npt.NDArray[np.bool_]
Block = dict[str, Ints]
"""Columns with a number for each record: job, start, seconds, gpus, nodes, run, and a code for each key.

`job` is the 64-bit hash of its id.
"""

_BLOCK_BYTES = 2**21
"""Measured: 2**20 is a tenth slower, 2**22 takes a tenth more memory."""
LONGEST_LINE = 2**20
_HOUR = re.compile(r"\d{4}-\d\d-\d\dT\d\d", re.ASCII)
_MEMORY = pa.system_memory_pool()
"""Arrow's own pool keeps some 15 MiB that are not needed again."""


def blocks_of_lines(file: IO[bytes], source: str) -> Iterator[tuple[int, bytes]]:
    """Yield the rest of a file as whole lines, each with its end, and the number of the first of them."""
    number = 2  # the first is the header
    while lines := file.read(_BLOCK_BYTES):
        rest = file.readline(LONGEST_LINE)
        if len(rest) == LONGEST_LINE and not rest.endswith(b"\n"):
            words = RowError(f"is longer than {LONGEST_LINE} bytes: not from sacct -P")
            raise line_error(source, number + lines.count(b"\n"), words)
        lines += rest
        yield number, lines if lines.endswith(b"\n") else lines + b"\n"
        number += int(np.count_nonzero(np.frombuffer(lines, np.uint8) == ord("\n")))


class _Table:
    """The cells of whole lines, without steps and jobs that never started."""

    def __init__(self, lines: bytes, columns: Columns) -> None:
        """Raises ValueError if a line has fewer cells than the header, or more that no job name explains."""
        self._names = columns.names
        ends = np.flatnonzero(np.frombuffer(lines, np.uint8) == ord("\n")) + 1
        offsets = np.append(0, ends).astype(np.int32)
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(lines)]
        texts = pa.Array.from_buffers(pa.string(), len(ends), buffers)
        rows = pc.split_pattern(texts, "|", memory_pool=_MEMORY)
        self._cells, bounds = rows.values, rows.offsets.to_numpy()
        self._first, self._end = bounds[:-1], bounds[1:]
        surplus = self._end - self._first - len(self._names)
        if surplus.min(initial=0) < 0 or (surplus.any() and not self.has("jobname")):
            raise ValueError("a row without its number of cells")
        jobs, starts = self.column("jobid"), self.column("start")
        is_step = pc.or_(pc.match_substring(jobs, "."), pc.equal(jobs, ""))
        left_out: Bools = np.asarray(pc.or_(is_step, pc.is_in(starts, pa.array(list(NEVER)))))
        self._first, self._end = self._first[~left_out], self._end[~left_out]

    def has(self, name: str) -> bool:
        return name in self._names

    def column(self, name: str) -> Any:
        """Return a column other than the job name, as an Arrow array of strings."""
        at = self._names.index(name)
        # Beyond the job name count cells from the right: it may hold separators.
        from_left = not self.has("jobname") or at < self._names.index("jobname")
        index = self._first + at if from_left else self._end - (len(self._names) - at)
        cells = self._cells.take(pa.array(index))
        return pc.ascii_rtrim(cells, "\r\n") if at == len(self._names) - 1 else cells


class ColumnReader:
    """Convert lines to numbers; the same text gets the same number in all blocks."""

    def __init__(self, columns: Columns, source: str, runs: Collection[str] = ()) -> None:
        """`runs` are the job IDs of known runs; the first of them has number 1 in the column `run`."""
        self._columns = columns
        self._source = source
        self._run_of = {job: number for number, job in enumerate(runs, 1)}
        self._hour_start = cache(hour_start)
        self.codes: dict[str, dict[str, int]] = {key: {UNKNOWN: 0} for key in KEYS}
        """The number that stands for each name."""

    def read(self, lines: bytes, number: int) -> Block:
        """Return the records in whole lines; `number` is that of the first line.

        Raise StateError if one cannot be read.
        """
        try:
            block = self._by_columns(lines)
        except (ValueError, OverflowError):  # Arrow's errors are ValueErrors
            block = self._by_rows(lines, number)  # unusual lines need not be wrong
        return {name: values if name == "job" else _narrowed(values) for name, values in block.items()}

    def _by_rows(self, lines: bytes, number: int) -> Block:
        records = list(read_rows(lines.split(b"\n"), self._columns, self._source, number))
        rows = {
            "job": [hash(record.job_id) for record in records],
            "start": [int(record.start or 0) for record in records],
            "seconds": [record.elapsed_s for record in records],
            "gpus": [record.gpus for record in records],
            "nodes": [record.nodes for record in records],
            "run": [self._run_of.get(record.job_id, 0) for record in records],
        }
        rows |= {key: [self._code(key, getattr(record, key)) for record in records] for key in KEYS}
        return {name: np.array(values, np.int64) for name, values in rows.items()}

    def _by_columns(self, lines: bytes) -> Block:
        """Raises ValueError or OverflowError if a row is unusual."""
        table = _Table(lines, self._columns)
        jobs, resources = table.column("jobid"), table.column("alloctres")
        starts = self._moments(table.column("start"))
        in_tres = partial(nodes_of, "")
        # 1 for the first of the known runs; 0 for none of them.
        run = pc.index_in(jobs, pa.array(list(self._run_of), pa.string()))
        block = {
            "job": np.fromiter(map(hash, jobs.to_pylist()), np.int64, len(jobs)),
            "start": starts,
            "seconds": self._seconds(table, starts),
            "gpus": _each(resources, gpus_of),
            "nodes": _whole(table.column("nnodes")) if table.has("nnodes") else _each(resources, in_tres),
            "run": np.asarray(pc.fill_null(run, -1)) + 1,
        }
        unknown = np.zeros_like(starts)
        for key in KEYS:
            block[key] = _each(table.column(key), partial(self._code, key)) if table.has(key) else unknown
        return block

    def _moments(self, cells: Any) -> Ints:
        if len(cells) and cells[0].as_py().isdecimal():
            return _whole(cells, NO_LATER - 1)
        hours = _each(pc.utf8_slice_codeunits(cells, 0, 13), self._hour_start)
        if pc.any(pc.not_equal(pc.binary_length(cells), len("2026-05-01T10:00:00"))).as_py():
            raise ValueError("a time that is written otherwise")
        # Read as UTC, minutes and seconds are the same, because the clock does not change in this hour.
        return hours + np.asarray(cells.cast(pa.timestamp("s"))).astype(np.int64) % 3600

    def _seconds(self, table: _Table, starts: Ints) -> Ints:
        """Return the same as slurm.sacct.elapsed_of."""
        if table.has("elapsedraw"):
            seconds = _whole(table.column("elapsedraw"))
        elif table.has("elapsed"):
            seconds = _each(table.column("elapsed"), parse_time)
        else:
            seconds = self._moments(table.column("end")) - starts
        if seconds.min(initial=0) < 0 or seconds.max(initial=0) > LONGEST_S:
            raise ValueError("no time that a job ran")
        return seconds

    def _code(self, key: str, name: str) -> int:
        codes = self.codes[key]
        name = (state_of(name) if key == "state" else name) or UNKNOWN
        return codes.setdefault(name, len(codes))


def _each(cells: Any, rule: Callable[[str], int | None]) -> Ints:
    """Apply a rule to each cell, once for equal cells.

    Raise ValueError from the rule, or if it returned None.
    """
    coded = cells.dictionary_encode()
    found = [rule(text) for text in coded.dictionary.to_pylist()]
    if None in found:
        raise ValueError("a text that is not as usual")
    values: Ints = np.array(found, np.int64)[np.asarray(coded.indices)]
    return values


def _whole(cells: Any, most: int = MOST) -> Ints:
    if not pc.all(pc.ascii_is_decimal(cells), min_count=0).as_py():
        raise ValueError("no plain number")
    numbers = np.asarray(cells.cast(pa.int64()))
    if numbers.max(initial=0) > most:
        raise ValueError("a number that no record has")
    return numbers


def hour_start(text: str) -> int | None:
    """Return the Unix seconds at which the local hour `2026-05-01T10` begins.

    None if that does not determine all of its seconds: the clock changes in it, or the text is unusual.
    """
    if not _HOUR.fullmatch(text):
        return None
    try:
        first, last = (datetime.fromisoformat(f"{text}:{rest}") for rest in ("00:00", "59:59"))
    except ValueError:
        return None
    begin, end = first.timestamp(), last.timestamp()
    # With fold=1 a clock time means the second of two moments, and in a skipped hour the one before.
    is_clear = begin == first.replace(fold=1).timestamp() and end == last.replace(fold=1).timestamp()
    return int(begin) if is_clear and end - begin == 3599 and end < NO_LATER else None


def _narrowed(values: Ints) -> Ints:
    """Return the values in as few bytes each as the largest needs."""
    if values.min(initial=0) < 0:  # a start before 1970
        return values
    return values.astype(np.min_scalar_type(values.max(initial=0)))


def sum_dump(file: IO[bytes], source: str, selection: Selection) -> dict[str, Any]:
    """Sum what sacct printed into a file, as accounting.hours.fold_hours does.

    Raise StateError with `source`, line and fix if the header or a line has another format.
    """
    columns = read_header(file.readline(LONGEST_LINE), source, selection.columns)
    reader = ColumnReader(columns, source, selection.runs)
    read = (reader.read(lines, number) for number, lines in blocks_of_lines(file, source))
    blocks = [block for block in read if len(block["job"])]
    if not blocks:
        return fold_hours(())
    begin = min(int(block["start"].min()) for block in blocks)
    end = max(int(block["start"].max()) + int(block["seconds"].max()) for block in blocks)
    midnights = [midnight_before(begin)]
    while midnights[-1] <= end:  # a day may have 23 or 25 hours
        midnights.append(midnight_before(midnights[-1], 1))
    sums = _Sums(reader.codes, selection, np.array(midnights, np.int64))
    for block, counts in zip(blocks, _once(blocks), strict=True):
        sums.add(block, counts)
    return sums.to_hours()


class _Sums:
    """GPU-seconds of the added blocks, in floats that hold whole numbers."""

    def __init__(self, codes: dict[str, dict[str, int]], selection: Selection, midnights: Ints) -> None:
        runs = [(UNKNOWN, UNKNOWN), *selection.runs.values()]
        self._selection = selection
        self._codes = codes
        self._names = {key: list(codes[key]) for key in KEYS}
        self._names |= {key: [run[at] for run in runs] for at, key in enumerate(RUN_KEYS)}
        self._by = {key: np.zeros((2, len(names))) for key, names in self._names.items()}
        """GPU-seconds, and the number of records: a name without a record is not shown."""
        self._days = _Days(midnights)
        self._gpu_seconds = self._node_seconds = 0.0

    def add(self, block: Block, counts: Bools) -> None:
        """Count the records of a block for which `counts` is true."""
        begin, end = block["start"].astype(np.int64), block["start"] + block["seconds"].astype(np.int64)
        since, until = self._selection.start, self._selection.end
        if since is not None:
            begin = np.maximum(begin, since)
        if until is not None:
            end = np.minimum(end, until)
        selected = counts if since is None and until is None else counts & (end > begin)
        for key in ("user", "account"):
            if (wanted := getattr(self._selection, key)) is not None:
                theirs = [code for name, code in self._codes[key].items() if is_among(name, wanted)]
                selected = selected & np.isin(block[key], theirs)
        chosen = np.flatnonzero(selected)
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

    def to_hours(self) -> dict[str, Any]:
        by: dict[str, dict[str, float]] = {"day": self._days.totals()}
        for key, names in self._names.items():
            by[key] = defaultdict(float)
            for name, gpu_seconds, count in zip(names, *self._by[key], strict=True):
                if count:
                    by[key][name] += float(gpu_seconds)
        return in_hours(self._gpu_seconds, self._node_seconds, by)


class _Days:
    """GPU-seconds by local day, without visiting the whole days inside an allocation.

    Days on which an allocation begins or ends get what it held then. For the days between only the change in
    GPUs at their ends is kept, and finally summed up over the days.
    """

    def __init__(self, midnights: Ints) -> None:
        self._midnights = midnights
        """All midnights, from one before the first allocation to one after the last."""
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
        """Return YYYY-MM-DD: GPU-seconds, for the days on which a GPU was held."""
        totals = self._within + np.cumsum(self._change) * np.diff(self._midnights)
        return {
            datetime.fromtimestamp(self._midnights[day]).date().isoformat(): float(totals[day])
            for day in np.flatnonzero(totals)
        }


def _once(blocks: list[Block]) -> list[Bools]:
    """Mark the records that count: of those with one job and start the longest, of equals the last."""
    jobs = np.concatenate([block["job"] for block in blocks])
    jobs.sort()
    several = np.unique(jobs[1:][jobs[1:] == jobs[:-1]])
    del jobs  # memory does not allow sorting all columns; few jobs have more than one record
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
    if not len(ordered):
        return np.zeros(0, np.int64)
    return np.flatnonzero(np.take(ordered, np.searchsorted(ordered, values), mode="clip") == values)
