"""A million records of sacct in about a second: GPU-hours by user, account, state, QOS, partition and day.

    with open("sacct.txt", "rb") as file:
        hours = sum_dump(file, "sacct.txt", Selection(user="ada"))

Reads the file a block at a time, and keeps sixteen bytes of each record: the hash of its job id and start, by
which a record that stands in the file twice is found and counted once (the one that ran longest, of equals
the last). Two records whose 64-bit hashes are equal by chance would count as one: among a million that
happens in one dump of 4e7. All else is exact: integers of GPU-seconds, divided once.
"""

from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import IO, Any

import numpy as np

from r1hpc.accounting import cells
from r1hpc.accounting.account import Selection
from r1hpc.accounting.cells import BadLineError, Block, Bools, Column, Ints, Names, Words
from r1hpc.accounting.days import Days
from r1hpc.accounting.usage import (
    LONGEST_S,
    NEVER,
    Columns,
    line_error,
    nodes_of,
    read_header,
    split_rows,
    to_record,
)
from r1hpc.slurm.accounting import JobRecord, gpus_of
from r1hpc.telemetry.hours import KEYS, RUN_KEYS, UNKNOWN, in_hours, midnight_before

_MOST_RESOURCES = 4096
"""AllocTRES may hold the energy used, another one in each record."""
_MOST_CHOSEN = 10_000
"""Lines that are taken back together."""
_NO_LATER = 2**32
_STAMP = len("2026-05-01T10:00:00")
_DATE = len("2026-05-01")
_CLOCK = len("10:00:00")


def sum_dump(file: IO[bytes], source: str, selection: Selection) -> dict[str, Any]:
    """As telemetry.hours.fold_hours, of what sacct printed into a file that can be read twice.

    Raises:
        StateError: the header or a line is not of this format; names `source`, line and fix.
    """
    sums = _Sums(read_header(file.readline(), source, selection.columns), selection)
    try:
        for block in cells.read_blocks(file, sums.columns):
            sums.add(block)
        sums.take_back_repeated(file)
    except BadLineError as error:
        file.seek(0)
        raise line_error(source, _line_number(file, error.offset), error.why) from None
    return sums.to_hours()


def _line_number(file: IO[bytes], offset: int) -> int:
    """Of the line at `offset`, from 1; `file` stands at its begin."""
    number = 1
    while offset > 0 and (part := file.read(min(offset, 2**20))):
        number += part.count(b"\n")
        offset -= len(part)
    return number


@dataclass(frozen=True)
class _Held:
    """The rows of a block that count, with what they held."""

    block: Block
    jobs: Words
    """Hashes of the job ids."""
    starts: Ints
    seconds: Ints

    def pick(self, rows: Bools) -> "_Held":
        return _Held(self.block.pick(rows), self.jobs[rows], self.starts[rows], self.seconds[rows])


class _Sums:
    """What was counted so far."""

    def __init__(self, columns: Columns, selection: Selection) -> None:
        self.columns = columns
        self._selection = selection
        self._reader = _Reader(columns, selection)
        self._names = {key: Names(_name) for key in KEYS if columns.at(key) is not None}
        self._resources = Names(_resources, _MOST_RESOURCES)
        self._runs = _RunIndex(selection.runs)
        self._by = {key: _Tally() for key in (*self._names, "run")}
        self._days = Days()
        self._gpu_seconds = self._node_seconds = self._num_counted = 0
        self._keys, self._lengths, self._begins = array("Q"), array("I"), array("I")
        self._blocks: list[tuple[int, int, int]] = []
        """Offset, size and number of the first record of each block."""

    def add(self, block: Block) -> None:
        """Count the rows of a block, and remember them."""
        held = self._reader.read(block)
        self._blocks.append((block.offset, block.size, len(self._keys)))
        self._keys.frombytes(cells.mix(held.jobs, held.starts.astype(np.uint64)).tobytes())
        self._lengths.frombytes(held.seconds.astype(np.uint32).tobytes())
        self._begins.frombytes(held.block.begins.astype(np.uint32).tobytes())
        self._count(held, 1)

    def take_back_repeated(self, file: IO[bytes]) -> None:
        """Uncount what stands in the file more than once."""
        surplus = _surplus(self._keys, self._lengths)
        bounds = np.searchsorted(surplus, [*(first for _, _, first in self._blocks), len(self._keys)])
        chosen: list[bytes] = []
        for i, (offset, size, _) in enumerate(self._blocks):
            records = surplus[bounds[i] : bounds[i + 1]]
            if len(records):
                file.seek(offset)
                lines = file.read(size) + b"\n"
                begins = [self._begins[record] for record in records]
                chosen += [lines[begin : lines.index(b"\n", begin)].rstrip(b"\r") for begin in begins]
            if len(chosen) > _MOST_CHOSEN:
                self._count(self._reader.read(self._block_of(chosen)), -1)
                chosen.clear()
        if chosen:
            self._count(self._reader.read(self._block_of(chosen)), -1)

    def _block_of(self, lines: list[bytes]) -> Block:
        return cells.make_block(b"\n".join(lines) + b"\n", 0, self.columns)

    def to_hours(self) -> dict[str, Any]:
        by: dict[str, dict[str, int]] = {}
        for key in KEYS:
            by[key] = {UNKNOWN: self._gpu_seconds} if self._num_counted else {}
            if key in self._names:
                by[key] = self._by[key].by_name(self._names[key].values, first_word=key == "state")
        by["day"] = self._days.totals()
        for at, key in enumerate(RUN_KEYS):
            by[key] = self._by["run"].by_name([names[at] for names in self._runs.values])
        return in_hours(self._gpu_seconds, self._node_seconds, by)

    def _count(self, held: _Held, sign: int) -> None:
        held = self._reader.clip(held)
        if not len(held.starts):
            return
        block = held.block
        gpus, nodes = self._gpus_and_nodes(block)
        gpu_seconds = sign * gpus * held.seconds
        self._num_counted += sign * len(gpu_seconds)
        self._gpu_seconds += int(gpu_seconds.sum())
        self._node_seconds += sign * int((nodes * held.seconds).sum())
        self._days.add(held.starts, held.seconds, sign * gpus)
        for key, names in self._names.items():
            self._by[key].add(names.numbers(block, _column(block, key)), gpu_seconds, sign)
        if len(self._runs.values) > 1:
            self._by["run"].add(self._runs.numbers(held.jobs), gpu_seconds, sign)

    def _gpus_and_nodes(self, block: Block) -> tuple[Ints, Ints]:
        found = self._resources.looked_up(block, _column(block, "alloctres"))
        column = block.column("nnodes")
        if column is None:
            return found[:, 0], found[:, 1]
        nodes, odd = cells.number(block, column)
        for row in np.flatnonzero(odd):
            nodes[row] = _parsed(block, int(row), self.columns).nodes
        return found[:, 0], nodes


class _Tally:
    """GPU-seconds, and how many records they are of, by the numbers of names."""

    def __init__(self) -> None:
        self._sums = np.zeros(0, np.int64)
        self._counts = np.zeros(0, np.int64)

    def add(self, numbers: Ints, gpu_seconds: Ints, sign: int) -> None:
        size = int(numbers.max()) + 1
        if size > len(self._sums):
            self._sums, self._counts = (
                np.pad(values, (0, 2 * size - len(values))) for values in (self._sums, self._counts)
            )
        np.add.at(self._sums, numbers, gpu_seconds)
        counts = np.bincount(numbers)
        self._counts[: len(counts)] += sign * counts

    def by_name(self, names: list[str], first_word: bool = False) -> dict[str, int]:
        """By what is left of the names, of those that have a record."""
        found: dict[str, int] = {}
        for name, total, count in zip(
            names, self._sums, self._counts, strict=False
        ):  # these have room for more
            if count:
                name = (name.split(" ")[0] if first_word else name) or UNKNOWN
                found[name] = found.get(name, 0) + int(total)
        return found


class _RunIndex:
    """A number for each known run by the hash of its job id; 0: no run that is known."""

    def __init__(self, runs: Mapping[str, tuple[str, str]]) -> None:
        self.values = [(UNKNOWN, UNKNOWN), *runs.values()]
        ids = "".join(f"{job}\n" for job in runs).encode()
        block = cells.make_block(ids, 0, Columns(("jobid",), b"JobID"))
        hashes = cells.hash_of(block, _column(block, "jobid"))
        self._order = np.argsort(hashes)
        self._hashes = hashes[self._order]

    def numbers(self, jobs: Words) -> Ints:
        at = np.minimum(np.searchsorted(self._hashes, jobs), len(self._hashes) - 1)
        return np.where(self._hashes[at] == jobs, self._order[at] + 1, 0)


class _Reader:
    """From the rows of a block to those that count, with their times."""

    def __init__(self, columns: Columns, selection: Selection) -> None:
        self._columns = columns
        self._selection = selection
        header = columns.line.split(b"|")[columns.names.index("start")]
        self._never = NEVER | {header[:8]}  # files that were put one after the other
        self._dates, self._hours = Names(_midnight), Names(_full_hour)
        self._chosen = {"user": Names(_name), "account": Names(_name)}

    def read(self, block: Block) -> _Held:
        """Without steps, headers, jobs that never started, and those of others."""
        keep = ~cells.equals(block, _column(block, "start"), self._never)
        keep &= ~cells.holds(block, _column(block, "jobid"), ".")
        for key, names in self._chosen.items():
            wanted = getattr(self._selection, key)
            if wanted is not None:
                numbers = names.numbers(block, _column(block, key))
                known = [i for i, text in enumerate(names.values) if text == wanted]
                keep &= np.isin(numbers, known)
        block = block.pick(keep)
        starts, odd = self._moments(block, _column(block, "start"))
        seconds, odd_length = self._seconds(block, starts)
        for row in np.flatnonzero(odd | odd_length):
            record = _parsed(block, int(row), self._columns)
            assert record.start is not None, "the row would have been left out"
            starts[row], seconds[row] = int(record.start), record.elapsed_s
        return _Held(block, cells.hash_of(block, _column(block, "jobid")), starts, seconds)

    def clip(self, held: _Held) -> _Held:
        """The parts that lie in the selected time."""
        selected = self._selection
        if selected.start is None and selected.end is None:
            return held
        ends = held.starts + held.seconds
        first = held.starts if selected.start is None else np.maximum(held.starts, round(selected.start))
        last = ends if selected.end is None else np.minimum(ends, round(selected.end))
        clipped = _Held(held.block, held.jobs, first, last - first)
        return clipped.pick(last > first)

    def _moments(self, block: Block, column: Column) -> tuple[Ints, Bools]:
        """Unix seconds of local times or of numbers; odd: others, and days on which the clock is changed."""
        stamped = column.lengths == _STAMP
        if stamped.all():
            return self._stamps(block, column)
        numbers, odd = cells.number(block, column)
        odd |= numbers > _NO_LATER
        rows = np.flatnonzero(stamped)
        numbers[rows], odd[rows] = self._stamps(block, column.pick(rows))
        return numbers, odd

    def _stamps(self, block: Block, column: Column) -> tuple[Ints, Bools]:
        """Of cells as long as 2026-05-01T10:00:00."""
        midnights = self._dates.looked_up(block, Column(column.begin, column.begin + _DATE))
        seconds, odd = cells.clock(block, column.end)
        moments = midnights + seconds
        changed = np.flatnonzero(midnights < 0)
        if len(changed):
            begin = column.begin[changed]
            hours = self._hours.looked_up(block, Column(begin, begin + _DATE + len("T10")))
            moments[changed] = np.where(hours < 0, -1, hours + seconds[changed] % 3600)
        return moments, odd | (moments < 0) | (seconds >= 86400)

    def _seconds(self, block: Block, starts: Ints) -> tuple[Ints, Bools]:
        raw, elapsed = block.column("elapsedraw"), block.column("elapsed")
        if raw is not None:
            seconds, odd = cells.number(block, raw)
        elif elapsed is not None:
            seconds, odd = cells.clock(block, elapsed.end)
            days, no_days = cells.number(block, Column(elapsed.begin, elapsed.end - _CLOCK - 1))
            short = elapsed.lengths == _CLOCK
            seconds += np.where(short, 0, days * 86400)
            odd |= ~short & no_days
        else:
            ends, odd = self._moments(block, _column(block, "end"))
            seconds = ends - starts
        return seconds, odd | (seconds > LONGEST_S) | (seconds < 0)


def _column(block: Block, name: str) -> Column:
    column = block.column(name)
    assert column is not None, f"the header has {name}"
    return column


def _parsed(block: Block, row: int, columns: Columns) -> JobRecord:
    """A row that is not as usual, read as one alone would be."""
    try:
        return to_record(split_rows([block.line(row)], columns)[0], columns)
    except ValueError as error:
        raise BadLineError(block.offset_of(row), error) from None


def _surplus(keys: "array[int]", lengths: "array[int]") -> Ints:
    """The records that must not count, ascending: of those with one key all but the longest."""
    all_keys = np.frombuffer(keys, np.uint64)
    ordered = np.sort(all_keys)
    twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if not len(twice):
        return np.zeros(0, np.int64)
    upper = np.uint64(44)
    maybe = np.zeros(2**20, np.bool_)
    maybe[twice >> upper] = True
    found = []
    for first in range(0, len(all_keys), 2**17):  # in parts, for its intermediate arrays are long
        rows = np.flatnonzero(maybe[all_keys[first : first + 2**17] >> upper]) + first
        at = np.minimum(np.searchsorted(twice, all_keys[rows]), len(twice) - 1)
        found.append(rows[twice[at] == all_keys[rows]])
    records = np.concatenate(found)
    order = records[np.lexsort((np.frombuffer(lengths, np.uint32)[records], all_keys[records]))]
    last_of_key = np.append(all_keys[order[1:]] != all_keys[order[:-1]], True)
    return np.sort(order[~last_of_key])


def _name(cell: bytes) -> str:
    return cell.decode("utf-8", "replace")


def _resources(cell: bytes) -> tuple[int, int]:
    """GPUs and nodes."""
    text = cell.decode("utf-8", "replace")
    return gpus_of(text), nodes_of("", text)


def _midnight(cell: bytes) -> int:
    """Unix seconds when a day begins; -1: no date, or a day on which the clock is changed."""
    try:
        noon = datetime.fromisoformat(cell.decode() + "T12:00:00").timestamp()
    except ValueError:
        return -1
    begin = midnight_before(noon)
    return begin if midnight_before(noon, 1) - begin == 86400 else -1


def _full_hour(cell: bytes) -> int:
    """Unix seconds of `2026-10-25T02`; -1: the clock is changed in it, so that the text does not tell."""
    try:
        ends = [datetime.fromisoformat(f"{cell.decode()}:{minutes}") for minutes in ("00:00", "59:59")]
    except ValueError:
        return -1
    first, last = ({int(end.replace(fold=fold).timestamp()) for fold in (0, 1)} for end in ends)
    return min(first) if len(first) == len(last) == 1 and max(last) - min(first) == 3599 else -1
