"""What sacct printed, read back: all records of a user, an account or a cluster, from a file or live.

    records = read_sacct(Path("sacct.txt").read_text(), "sacct.txt")
    records = ask_sacct(start="2026-05-01", user="ada")
    with ask_sacct_file(start="2026-05-01", account="lab") as file: ...     # for hours.dump, which keeps none

A file is what `sacct -D -X -P -o ...` prints, header included, its columns in any order; needed are JobID,
Start, AllocTRES and one of ElapsedRaw, Elapsed, End. Without -D the earlier attempts of requeued jobs are
missing from it, and nothing in it tells. sacct does not escape the separator where a job name holds it.
"""

import re
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import IO

from r1hpc.base.errors import StateError, UsageError
from r1hpc.base.units import parse_time
from r1hpc.slurm.accounting import FIELDS, JobRecord, gpus_of
from r1hpc.slurm.client import call, call_into

PRINTED_BY = f"sacct -D -X -P -o {FIELDS}"
NEVER = frozenset((b"", b"Unknown", b"None", b"0"))
"""What stands for a time that has not come."""
_NO_LATER = 7_258_118_400.0
"""2200-01-01: a number beyond it is no time of a job."""
LONGEST_S = 10 * 366 * 86400


@dataclass(frozen=True)
class Columns:
    """The header of a dump."""

    names: tuple[str, ...]
    """In lower case."""
    line: bytes

    def at(self, name: str) -> int | None:
        """Where the column stands, 0 for the first; None where there is none."""
        return self.names.index(name) if name in self.names else None


def read_header(line: bytes, source: str, also: Sequence[str] = ()) -> Columns:
    """The columns that the first line names.

    Args:
        also: columns that are needed beside those that always are, as sacct spells them.

    Raises:
        StateError: one that is needed is missing; names it, `source` and the fix.
    """
    line = line.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n")
    names = tuple(name.strip().lower() for name in line.decode("utf-8", "replace").split("|"))
    missing = [name for name in ("JobID", "Start", "AllocTRES", *also) if name.lower() not in names]
    if not {"elapsedraw", "elapsed", "end"} & set(names):
        missing.append("ElapsedRaw")
    if missing:
        raise StateError(
            f"{source} has no column {', '.join(missing)} in its first line; make it with: {PRINTED_BY}"
        )
    return Columns(names, line)


class RowError(ValueError):
    """A line without its number of cells; `index` counts the lines that were given."""

    def __init__(self, index: int, words: str) -> None:
        super().__init__(words)
        self.index = index


def split_rows(lines: Sequence[bytes], columns: Columns) -> list[list[bytes]]:
    """The cells of each line; a blank line becomes a row of empty cells.

    Raises:
        RowError: a line has fewer cells than the header, or more that no job name explains.
    """
    count = len(columns.names)
    name_at = columns.at("jobname")
    most = count - 1 if name_at == count - 1 else -1  # a name at the end takes all that is left
    rows = [line.split(b"|", most) for line in lines]
    if list(map(len, rows)).count(count) != len(rows):
        rows = [row if len(row) == count else _mend(row, count, name_at, i) for i, row in enumerate(rows)]
    return rows


def _mend(row: list[bytes], count: int, name_at: int | None, index: int) -> list[bytes]:
    """A row whose job name holds the separator: the one field whose text may."""
    if len(row) == 1 and not row[0].strip():
        return [b""] * count
    surplus = len(row) - count
    if surplus < 0 or name_at is None:
        raise RowError(index, f"has {len(row)} fields and its header {count}: torn or not from sacct -P")
    name = b"|".join(row[name_at : name_at + surplus + 1])
    return [*row[:name_at], name, *row[name_at + surplus + 1 :]]


def ask_sacct(
    start: str | None = None,
    end: str | None = None,
    user: str | None = None,
    account: str | None = None,
    timeout_s: float = 60.0,
) -> list[JobRecord]:
    """Records of all jobs of a user or an account; those of this user where neither is given.

    Args:
        start, end: as sacct takes them, for example 2026-05-01; sacct's own default is today.

    Raises:
        SlurmError: sacct or slurmdbd did not answer.
    """
    return read_sacct(call(_question(start, end, user, account), timeout_s), "sacct")


@contextmanager
def ask_sacct_file(
    start: str | None = None,
    end: str | None = None,
    user: str | None = None,
    account: str | None = None,
    timeout_s: float = 600.0,
) -> Iterator[IO[bytes]]:
    """As `ask_sacct`, for as many records as there are: a file without a name, to be read and forgotten.

    Raises:
        SlurmError: sacct or slurmdbd did not answer.
    """
    with tempfile.TemporaryFile() as file:
        call_into(file, _question(start, end, user, account), timeout_s)
        file.seek(0)
        yield file


def _question(start: str | None, end: str | None, user: str | None, account: str | None) -> list[str]:
    argv = ["sacct", "-D", "-X", "-P", "-o", FIELDS]
    options = {"-S": start, "-E": end, "-u": user, "-A": account}
    argv += [f"{flag}{value}" for flag, value in options.items() if value is not None]
    if account is not None and user is None:
        argv.append("--allusers")
    return argv


def read_sacct(text: str, source: str) -> list[JobRecord]:
    """The records in `text`, each once, in its order. Steps and jobs that never started are left out.

    Raises:
        StateError: the header or a line is not of this format; names `source`, line and fix.
    """
    return pick_records(text.encode().split(b"\n"), source)


def pick_records(
    lines: Iterable[bytes],
    source: str,
    job_ids: Collection[str] | None = None,
    waiting: bool = False,
    also: Sequence[str] = (),
) -> list[JobRecord]:
    """As `read_sacct`, of these jobs only, from lines that need not fit in memory.

    Args:
        lines: with their ends or without; splitlines() would also split at what a job name may hold.
        waiting: also those that have not started.
        also: columns that are needed, see read_header.
    """
    columns: Columns | None = None
    wanted = None if job_ids is None else {job_id.encode() for job_id in job_ids}
    found: dict[tuple[str, float | None], JobRecord] = {}
    for number, raw in enumerate(lines, start=1):
        line = raw.rstrip(b"\r\n")
        if columns is None:
            columns = read_header(line, source, also)
            id_at = columns.names.index("jobid")
            continue
        if line == columns.line:  # files that were put one after the other
            continue
        if wanted is not None and not any(job_id in line for job_id in wanted):
            continue  # seen at a glance: a dump of a cluster is long, and a run has few jobs
        try:
            (row,) = split_rows([line], columns)
            if wanted is not None and row[id_at] not in wanted:
                continue
            record = to_record(row, columns)
        except ValueError as error:
            raise line_error(source, number, error) from None
        if record.job_id and "." not in record.job_id and (waiting or record.start is not None):
            key = record.job_id, record.start  # one attempt of a job starts once
            if key not in found or found[key].elapsed_s <= record.elapsed_s:
                found[key] = record
    if columns is None:
        read_header(b"", source)
    return list(found.values())


def line_error(source: str, number: int, error: ValueError) -> StateError:
    """What to tell of a line that cannot be read."""
    between = " " if isinstance(error, RowError) else ": "
    return StateError(f"{source}:{number}{between}{error}; make it again with: {PRINTED_BY}")


def parse_when(text: str) -> float | None:
    """Unix seconds of a time as sacct prints it: 2026-05-01T10:00:00 (local), or seconds; None if unset.

    Raises:
        UsageError: neither.
    """
    if text.encode() in NEVER:
        return None
    try:
        seconds = float(text) if text.isdecimal() else datetime.fromisoformat(text).timestamp()
        if seconds < _NO_LATER:
            return seconds
    except (ValueError, OverflowError):
        pass
    raise UsageError(f"{text!r} is not a time: write 2026-05-01 or 2026-05-01T10:00:00")


def start_of(start: str, end: str, elapsed_s: int) -> float | None:
    """`parse_when` of a start. In the hour that a clock change repeats, the end tells which one is meant.

    Args:
        end: the End column; empty where there is none.
    """
    first = parse_when(start)
    if first is None or start.isdecimal() or end.isdecimal() or end.encode() in NEVER:
        return first
    begins, ends = _both(start), _both(end)
    if len(begins) == 1:
        return first
    # Pauses of a suspended job make the elapsed time shorter, never longer. Of two that fit, the first.
    return min(begins, key=lambda begin: min(abs(over - begin - elapsed_s) for over in ends))


def _both(text: str) -> list[float]:
    """The moments at which a clock shows this: two in an hour that is repeated."""
    shown = datetime.fromisoformat(text)
    return sorted({shown.replace(fold=fold).timestamp() for fold in (0, 1)})


def elapsed_of(raw: str, elapsed: str, start: str, end: str) -> int:
    """Seconds a record ran, from ElapsedRaw, or Elapsed, or End - Start; empty where there is no column.

    Raises:
        ValueError: no number, or no time that a job ran; or it runs still, and only the end would have told.
    """
    if raw:
        seconds = _whole(raw, "ElapsedRaw")
    elif elapsed:
        seconds = parse_time(elapsed)
    else:
        first, last = parse_when(start), parse_when(end)
        if first is not None and last is None:
            raise ValueError("it has no End yet, and there is no ElapsedRaw to tell how long it has run")
        seconds = 0 if first is None or last is None else round(last - first)
    if not 0 <= seconds <= LONGEST_S:
        raise ValueError(f"{seconds} s is no time that a job ran")
    return seconds


def _whole(text: str, column: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{column} is {text!r}, which is no whole number") from None


def nodes_of(num_nodes: str, alloc_tres: str) -> int:
    """Nodes, from NNodes where it is there, else from AllocTRES."""
    if num_nodes:
        return _whole(num_nodes, "NNodes")
    found = re.search(r"(?:^|,)node=(\d+)", alloc_tres)
    return int(found[1]) if found else 0


def to_record(row: Sequence[bytes], columns: Columns) -> JobRecord:
    """One row as a record.

    Raises:
        ValueError: a cell holds no number, or no time.
    """
    cells = {
        name: cell.decode("utf-8", "replace") for name, cell in zip(columns.names, row, strict=True) if name
    }
    start, end = cells["start"], cells.get("end", "")
    elapsed_s = elapsed_of(cells.get("elapsedraw", ""), cells.get("elapsed", ""), start, end)
    return JobRecord(
        job_id=cells["jobid"],
        state=(cells.get("state") or "unknown").split(" ")[0],
        start=start_of(start, end, elapsed_s),
        end=parse_when(end),
        elapsed_s=elapsed_s,
        gpus=gpus_of(cells["alloctres"]),
        nodes=nodes_of(cells.get("nnodes", ""), cells["alloctres"]),
        node_list=cells.get("nodelist", ""),
        exit_code=cells.get("exitcode", ""),
        restarts=_whole(cells.get("restarts") or "0", "Restarts"),
        user=cells.get("user", ""),
        account=cells.get("account", ""),
        partition=cells.get("partition", ""),
        qos=cells.get("qos", ""),
        job_name=cells.get("jobname", ""),
        eligible=parse_when(cells.get("eligible") or cells.get("submit", "")),
    )
