"""Do what hours.fold_hours does for millions of sacct records, by column with numpy.

account.py calls it for an output above 256 KiB.

Some 25 bytes of numbers are kept of each record until the end. Then duplicates are found by cluster, job ID
and start. One of them counts: the one that ran longest, of equals the last. Sums are exact: whole seconds of
1/28 GPU (MIG slices are sevenths or quarters; shards make the unit smaller), below 2**53, divided once. A
job ID is known by its 64-bit hash: to count as one, two would have to share it and the second in which they
began.

slurm.sacct interprets a cell, once for each different text. A row with an unusual cell is read there as a
whole: each rule is written once, with two speeds. Rows that cannot be read there either are set aside.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from functools import partial
from typing import IO, Any

import numpy as np

from r1hpc.accounting.cells import ODD, Bools, Cells, Codes, Ints, Table, hash_of
from r1hpc.accounting.groups import Block, Groups, split_at
from r1hpc.accounting.hours import (
    BILLED_KEYS,
    KEYS,
    RUN_KEYS,
    UNKNOWN,
    Selection,
    in_hours,
    in_words,
    midnight_before,
)
from r1hpc.base.names import is_among
from r1hpc.base.units import parse_time
from r1hpc.slurm.gres import MOST, billing_of, gpus_by_type, unknown_shares
from r1hpc.slurm.sacct import (
    LONGEST_S,
    NEVER,
    NO_LATER,
    Columns,
    JobRecord,
    RowError,
    SetAside,
    line_error,
    nodes_of,
    read_header,
    read_rows,
    state_of,
)

_BLOCK_BYTES = 2**21
LONGEST_LINE = 2**20
_HOUR = re.compile(r"\d{4}-\d\d-\d\dT\d\d", re.ASCII)
_NEVER = -2
"""The code of a start that has not come."""
_KEYS = (*KEYS, "gpu_type")


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
        number += lines.count(b"\n")


class ColumnReader:
    """Convert lines to numbers; the same text gets the same number in all blocks."""

    def __init__(self, columns: Columns, source: str, selection: Selection) -> None:
        self._columns = columns
        self._source = source
        self._shares = selection.shares
        self._has_waits = bool(selection.by)
        self.unit = math.lcm(28, *self._shares.values())
        self.set_aside = SetAside()
        self.unshared: set[str] = set()
        """`shard` or `mps`, if a GPU has an unknown number of them."""
        self._run_of = {job: number for number, job in enumerate(selection.runs, 1)}
        self._clusters = [selection.clusters.get(job) for job in selection.runs]
        self.codes: dict[str, dict[Any, int]] = {key: {UNKNOWN: 0} for key in KEYS} | {"gpu_type": {(): 0}}
        """The number that stands for each name; for gpu_type of each tuple of types and units."""
        self._cells = {key: Codes(partial(self._code, key)) for key in KEYS}
        self._hours, self._elapsed, self._tres = Codes(hour_start), Codes(parse_time), Codes(self._row_of)
        self._run_codes = Codes(lambda job: self._run_of.get(job, 0))
        self._resources: dict[tuple[int, int, int, int], int] = {}
        """A number for each (units of a GPU, nodes, code of the types, billing)."""

    def read(self, lines: bytes, number: int) -> Block:
        """Return the records in whole lines; `number` is that of the first line."""
        table = Table(lines, self._columns)
        block, usual, odd = self._by_columns(table)
        records = [
            (index, record)
            for index in np.flatnonzero(odd | table.is_torn).tolist()
            for record in read_rows(
                [lines[table.begin[index] : table.end[index]]],
                self._columns,
                self._source,
                number + index,
                set_aside=self.set_aside,
                shares=self._shares,
            )
        ]
        if records:
            rows, read = zip(*records, strict=True)
            # The last of two equal records counts, so they stay in the order of the file.
            order = np.argsort(np.append(np.flatnonzero(usual), rows))
            block = {name: np.append(values, self._of(name, read))[order] for name, values in block.items()}
        return {name: values if name == "job" else _narrowed(values) for name, values in block.items()}

    def _of(self, name: str, records: Sequence[JobRecord]) -> list[int]:
        """Return a column of the block for records that were read as a whole."""
        of: dict[str, Callable[[JobRecord], int]] = {
            "job": lambda record: self._job_key(record.job_id, record.cluster),
            "start": lambda record: int(record.start or 0),
            "seconds": lambda record: record.elapsed_s,
            "gpus": lambda record: round(record.gpus * self.unit),
            "nodes": lambda record: record.nodes,
            "billing": lambda record: record.billing,
            "eligible": lambda record: int(record.eligible or 0),
            "run": lambda record: self._run(record.job_id, record.cluster),
            "gpu_type": lambda record: self._mix_code(
                {name: round(gpus * self.unit) for name, gpus in record.gpu_types}, record.gpus
            ),
        }
        rule = of.get(name) or (lambda record: self._code(name, getattr(record, name)))
        return [rule(record) for record in records]

    def _by_columns(self, table: Table) -> tuple[Block, Bools, Bools]:
        """Return the usual rows' columns, which rows they are, and which others slurm.sacct shall read. Steps
        and jobs that never started are left out."""
        jobs = table.column("jobid")
        starts = self._moments(table.column("start"))
        rows = self._tres.of(table.column("alloctres"))
        resources = np.array([*self._resources, (ODD, ODD, ODD, ODD)], np.int64)[rows].T  # ODD is -1
        block = {"start": starts, "seconds": self._seconds(table, starts)}
        block |= dict(zip(("gpus", "nodes", "gpu_type", "billing"), resources, strict=True))
        if table.has("nnodes"):
            block["nodes"] = table.column("nnodes").numbers(MOST)
        for key in KEYS:
            block[key] = self._cells[key].of(table.column(key)) if table.has(key) else np.zeros_like(starts)
        block["run"] = self._run_codes.of(jobs) if self._run_of else np.zeros_like(starts)
        odd = np.logical_or.reduce([values == ODD for values in block.values()])
        odd |= jobs.hold_other_than_ascii()
        block["job"] = jobs.hashes().view(np.int64)
        if table.has("cluster"):
            clusters = table.column("cluster")
            block["job"] = block["job"] ^ (clusters.hashes().view(np.int64) * 3)
            for row in np.flatnonzero(block["run"] > 0).tolist():
                block["run"][row] = self._run(jobs.text(row), clusters.text(row))
        if self._has_waits:
            block["eligible"] = self._eligible(table)
        counts = (starts != _NEVER) & (jobs.length > 0) & ~jobs.hold(ord("."))
        usual = counts & ~odd & ~table.is_torn
        return {name: values[usual] for name, values in block.items()}, usual, counts & odd

    def _row_of(self, tres: str) -> int:
        found = gpus_by_type(tres, self._shares)
        self.unshared |= unknown_shares(tres, self._shares)
        units = {name: int(gpus * self.unit) for name, gpus in found.items()}
        resources = sum(units.values()), nodes_of("", tres), self._mix_code(units, 0), billing_of(tres)
        return self._resources.setdefault(resources, len(self._resources))

    def _job_key(self, job: str, cluster: str) -> int:
        key = hash_of(job)
        if "cluster" in self._columns.names:
            key = key ^ (hash_of(cluster) * 3)
        return int(key[0])

    def _run(self, job: str, cluster: str) -> int:
        """Return the number of the known run that had a job; 0 for none, or one on another cluster."""
        number = self._run_of.get(job, 0)
        own = self._clusters[number - 1] if number and cluster else None
        return number if own is None or own == cluster else 0

    def _moments(self, cells: Cells) -> Ints:
        if len(cells.table) and cells.text(0).isdecimal():  # in Unix seconds
            moments = cells.numbers(NO_LATER - 1)
            return np.where(moments > 0, moments, np.where(moments == 0, _NEVER, ODD))
        hours = self._hours.of(cells.cut(len("2026-05-01T10")))
        at = cells.begin + len("2026-05-01T10")
        text = [cells.table.bytes[at + place] for place in range(6)]  # :10:59
        digits = [text[place].astype(np.int64) - ord("0") for place in (1, 2, 4, 5)]
        fits = (text[0] == ord(":")) & (text[3] == ord(":")) & (cells.length == len("2026-05-01T10:00:00"))
        for digit, most in zip(digits, (5, 9, 5, 9), strict=True):
            fits &= (digit >= 0) & (digit <= most)
        moments = hours + 600 * digits[0] + 60 * digits[1] + 10 * digits[2] + digits[3]
        return np.where((hours < 0) | ~fits, np.minimum(hours, ODD), moments)

    def _eligible(self, table: Table) -> Ints:
        """Return Eligible, else Submit; 0 if unknown."""
        eligible: Ints = np.zeros(len(table), np.int64)
        for name in filter(table.has, ("submit", "eligible")):
            moments = self._moments(table.column(name))
            eligible = np.where(moments > 0, moments, eligible)
        return eligible

    def _seconds(self, table: Table, starts: Ints) -> Ints:
        """Return the same as slurm.sacct.elapsed_of."""
        if table.has("elapsedraw"):
            return table.column("elapsedraw").numbers(LONGEST_S)
        if table.has("elapsed"):
            seconds = self._elapsed.of(table.column("elapsed"))
        else:
            ends = self._moments(table.column("end"))
            seconds = np.where(ends < 0, ODD, ends - starts)
        return np.where((seconds < 0) | (seconds > LONGEST_S), ODD, seconds)

    def _code(self, key: str, name: str) -> int:
        codes = self.codes[key]
        name = (state_of(name) if key == "state" else name) or UNKNOWN
        return codes.setdefault(name, len(codes))

    def _mix_code(self, units: dict[str, int], gpus: float) -> int:
        rest = round(gpus * self.unit) - sum(units.values())
        if rest > 0:
            units = units | {"": rest}
        codes, mix = self.codes["gpu_type"], tuple(sorted((name, n) for name, n in units.items() if n))
        return codes.setdefault(mix, len(codes))


def hour_start(text: str) -> int:
    """Return the Unix seconds at which the local hour `2026-05-01T10` begins.

    ODD if that does not determine all of its seconds: the clock changes in it, or the text is unusual;
    _NEVER for a start that has not come.
    """
    if text in NEVER:
        return _NEVER
    if not _HOUR.fullmatch(text):
        return ODD
    first, last = (datetime.fromisoformat(f"{text}:{rest}") for rest in ("00:00", "59:59"))
    begin, end = first.timestamp(), last.timestamp()
    # With fold=1 a clock time means the second of two moments, and in a skipped hour the one before.
    is_clear = begin == first.replace(fold=1).timestamp() and end == last.replace(fold=1).timestamp()
    is_usual = is_clear and end - begin == 3599 and begin >= 0 and end < NO_LATER
    return int(begin) if is_usual else ODD


def _narrowed(values: Ints) -> Ints:
    """Return the values in as few bytes each as the largest needs."""
    if values.min(initial=0) < 0:  # a start before 1970
        return values
    return values.astype(np.min_scalar_type(values.max(initial=0)))


def sum_dump(file: IO[bytes], source: str, selection: Selection) -> dict[str, Any]:
    """Sum what sacct printed into a file, as accounting.hours.fold_hours does.

    Raise StateError with `source` and fix if the header has another format, or no row can be read.
    """
    needed = {"state" if key == "cause" else key for key in selection.by}.intersection(KEYS)
    columns = read_header(file.readline(LONGEST_LINE), source, [*selection.columns, *sorted(needed)])
    reader = ColumnReader(columns, source, selection)
    read = (reader.read(lines, number) for number, lines in blocks_of_lines(file, source))
    blocks = [block for block in read if len(block["job"])]
    reader.set_aside.refuse_if_alone(len(blocks))
    left_out = in_words(reader.set_aside, reader.unshared)
    if not blocks:
        for key in map(str.lower, selection.columns):
            selection.refuse_unknown(key, (), source)
        return _Sums(reader.codes, selection, np.array([0, 0])).to_hours(reader.unit) | left_out
    begin = min(int(block["start"].min()) for block in blocks)
    end = max(int(block["start"].max()) + int(block["seconds"].max()) for block in blocks)
    midnights = [midnight_before(begin)]
    while midnights[-1] <= end:  # a day may have 23 or 25 hours
        midnights.append(midnight_before(midnights[-1], 1))
    sums = _Sums(reader.codes, selection, np.array(midnights, np.int64))
    once = _once(blocks)
    for key in map(str.lower, selection.columns):
        present = {0}.union(
            *(block[key][counts].tolist() for block, counts in zip(blocks, once, strict=True))
        )
        names = [name for name, code in reader.codes[key].items() if code in present]
        selection.refuse_unknown(key, names, source)
    for block, counts in zip(blocks, once, strict=True):
        sums.add(block, counts)
    return sums.to_hours(reader.unit) | left_out


class _Sums:
    """Seconds x units of a GPU of the added blocks, in floats that hold whole numbers."""

    def __init__(self, codes: dict[str, dict[str, int]], selection: Selection, midnights: Ints) -> None:
        runs = [(UNKNOWN, UNKNOWN), *selection.runs.values()]
        self._selection = selection
        self._codes = codes
        self._names = {key: list(codes[key]) for key in _KEYS}
        self._names |= {key: [run[at] for run in runs] for at, key in enumerate(RUN_KEYS)}
        self._by = {key: np.zeros((2, len(names))) for key, names in self._names.items()}
        """GPU-seconds, and the number of records: a name without a record is not shown."""
        self._billed = {key: np.zeros(len(codes[key])) for key in BILLED_KEYS}
        self._midnights, self._days = midnights, np.zeros(len(midnights) - 1)
        self._groups = Groups(self._names, selection, midnights) if selection.by else None
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
        rows, _, day, seconds = split_at(self._midnights, begin, begin + held)
        self._days += np.bincount(day, gpus[rows] * seconds, len(self._days))
        if self._groups is not None:
            self._groups.add(block, chosen, begin, held)
        if block["billing"].any():
            billed = block["billing"][chosen] * held
            for key, sums in self._billed.items():
                sums += np.bincount(block[key][chosen], billed, len(sums))
        for key, names in self._names.items():
            codes = block["run" if key in RUN_KEYS else key][chosen]
            self._by[key] += (
                np.bincount(codes, gpus * held, len(names)),
                np.bincount(codes, minlength=len(names)),
            )

    def to_hours(self, unit: int) -> dict[str, Any]:
        days = zip(self._midnights[:-1].tolist(), self._days.tolist(), strict=True)
        dates = {datetime.fromtimestamp(midnight).date().isoformat(): held for midnight, held in days if held}
        by: dict[str, dict[str, float]] = {"day": dates}
        for key, names in self._names.items():
            by[key] = defaultdict(float)
            for name, held, count in zip(names, *self._by[key], strict=True):
                if not count:
                    continue
                if key != "gpu_type":
                    by[key][name] += float(held)
                for kind, units in name if key == "gpu_type" else ():
                    by[key][kind or UNKNOWN] += float(held) * units / sum(dict(name).values())
        by = {key: {name: held / unit for name, held in sums.items()} for key, sums in by.items()}
        billed = {
            key: {name: float(held) for name, held in zip(self._names[key], sums, strict=True) if held}
            for key, sums in self._billed.items()
        }
        hours = in_hours(self._gpu_seconds / unit, self._node_seconds, by, billed)
        return hours if self._groups is None else hours | self._groups.to_hours(unit)


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
