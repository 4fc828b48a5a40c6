"""Read Slurm's records of jobs from sacct, or from a file of its output, with one rule for each column.

The file (`report --sacct-file`) holds the output of `sacct -D -X -P -o ...` with its header, columns in any
order; required are JobID, Start, AllocTRES and one of ElapsedRaw, Elapsed, End. Without -D sacct hides the
earlier attempts of a requeued job, and the file does not show that they are missing. sacct does not escape a
separator inside a job name. Times are Unix seconds, or sacct's local times.

accounting.sacct_totals reads millions of rows by column with the same rules, and returns unusual rows to
`read_rows`. Rows that cannot be read are set aside and counted.
"""

import re
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import IO, Annotated

from r1hpc.base.errors import StateError, UsageError
from r1hpc.base.records import Between, Time
from r1hpc.base.units import parse_time
from r1hpc.slurm.client import call, run
from r1hpc.slurm.gres import MOST, NO_SHARES, Shares, at_most, billing_of, gpus_by_type, plain, unknown_shares
from r1hpc.slurm.shell.endings import LOST

# Columns of every sacct since 20.02: an unknown one is an error (Restarts came with 24.11). JobName is last:
# it may hold the separator.
FIELDS = (
    "JobID,State,Start,End,ElapsedRaw,AllocTRES,NNodes,NodeList,ExitCode,"
    "User,Account,Partition,QOS,Submit,Eligible,JobName"
)
DUMP_FIELDS = FIELDS.replace("JobName", "Cluster,JobName")
"""For many jobs, perhaps on several clusters; a query by job ID is answered by one."""
PRINTED_BY = f"sacct -D -X -P -o {DUMP_FIELDS}"
NEVER = frozenset(("", "Unknown", "None", "0"))
"""Values for a time that has not come."""
NO_LATER = 7_258_118_400
"""2200-01-01: a larger number is no time of a job."""
LONGEST_S = 10 * 366 * 86400
BOM = "\ufeff"
_MOST_BEHIND_S = 86400
_MOST_SHOWN = 5


@dataclass(frozen=True)
class JobRecord:
    """One line of `sacct -D -X`: one attempt. Times are Unix seconds."""

    job_id: str
    state: str
    """Slurm's state alone: CANCELLED, not "CANCELLED by 1000"."""
    start: Time | None
    """None: it never started."""
    end: Time | None
    """None: it is still running."""
    elapsed_s: Annotated[int, Between(0, LONGEST_S)]
    gpus: Annotated[float, Between(0, MOST)]
    """A whole number, or with MIG slices, shards or MPS a fraction."""
    nodes: Annotated[int, Between(0, MOST)]
    node_list: str
    exit_code: str
    restarts: int
    """0 if unknown: we do not request it."""
    user: str
    account: str
    partition: str
    qos: str
    job_name: str
    eligible: Time | None = None
    """Earliest possible start, given free nodes: waiting after that is queue time."""
    cancelled_by: str | None = None
    """The user ID after CANCELLED; empty: nobody's. None: not cancelled, or kept by an earlier version."""
    cluster: str = ""
    gpu_types: tuple[tuple[str, float], ...] = ()
    """(type, GPUs) where Slurm names types; empty in records of earlier versions."""
    unshared: tuple[str, ...] = ()
    """`shard` or `mps` if it holds them and nothing tells how many make a GPU: they count as none."""
    billing: Annotated[int, Between(0, MOST)] = 0
    """The billing TRES; 0 in records of earlier versions."""

    @property
    def ending(self) -> str:
        """Return the state by which slurm.shell.endings finds why the job ended."""
        return LOST if self.state == "CANCELLED" and self.cancelled_by == "" else self.state


def sacct_records(job_id: str, since: float | None = None, timeout_s: float = 30.0) -> list[JobRecord]:
    """Return every record of a job, or of several separated by commas, oldest first; also waiting ones.

    Records that ended before `since` (Unix seconds) are left out. Raise SlurmError if sacct or slurmdbd does
    not answer, StateError if sacct prints something else.
    """
    # sacct leaves out what is newer than its own clock, which may be behind that of slurmctld.
    until = f"uts{int(time.time() + _MOST_BEHIND_S)}"
    argv = ["sacct", "-D", "-X", "-P", "-n", "-j", job_id, "-E", until, "-o", FIELDS]
    if since is not None:
        argv += ["-S", f"uts{int(since)}"]
    return parse_records(call(argv, timeout_s).split("\n"))


def parse_records(lines: Sequence[str]) -> list[JobRecord]:
    """Parse sacct's output in the columns FIELDS, without a header; raise StateError for other columns."""
    columns = read_header(FIELDS.replace(",", "|").encode(), "sacct")
    return list(read_rows((line.encode() for line in lines), columns, "sacct", first=1, waiting=True))


@contextmanager
def ask_sacct_file(
    start: str | None, end: str | None, user: str | None, account: str | None, timeout_s: float
) -> Iterator[IO[bytes]]:
    """Yield an unnamed file with all jobs of a user or an account; without either this user's. Raise
    SlurmError if sacct or slurmdbd does not answer."""
    argv = ["sacct", "-D", "-X", "-P", "-o", DUMP_FIELDS]
    options = {"-S": start, "-E": end, "-u": user, "-A": account}
    argv += [f"{flag}{value}" for flag, value in options.items() if value is not None]
    if account is not None and user is None:
        argv.append("--allusers")
    with tempfile.TemporaryFile() as file:
        run(argv, timeout_s, stdout=file)
        file.seek(0)
        yield file


class SetAside:
    """Rows that cannot be read: torn lines, times and numbers that no job has."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[str] = []
        """Why, for the first few."""

    def add(self, source: str, number: int, error: ValueError) -> None:
        self.count += 1
        if self.count <= _MOST_SHOWN:
            self.first.append(f"{source}:{number}{' ' if isinstance(error, RowError) else ': '}{error}")

    def refuse_if_alone(self, num_read: int) -> None:
        """Raise StateError with the first reason if no row could be read."""
        if self.count and not num_read:
            raise StateError(f"{self.first[0]}; no row can be read; make it again with: {PRINTED_BY}")


def pick_records(
    lines: Iterable[bytes],
    source: str,
    job_ids: Collection[str] | None = None,
    waiting: bool = False,
    also: Sequence[str] = (),
    set_aside: SetAside | None = None,
    shares: Shares = NO_SHARES,
) -> list[JobRecord]:
    """Return the records in sacct's output, each once, in order, without steps and jobs that never started.

    Raise StateError with `source` and fix if the header has another format.

    Args:
        lines: with or without line ends, and not from splitlines(), which also splits at characters that a
            job name may hold; they need not fit in memory.
        job_ids: only these jobs.
        waiting: also those that have not started.
        also: more required columns, see read_header.
        set_aside, shares: see read_rows.
    """
    rest = iter(lines)
    columns = read_header(next(rest, b""), source, also)
    found: dict[tuple[str, str, float | None], JobRecord] = {}
    rows = read_rows(
        rest,
        columns,
        source,
        job_ids=job_ids,
        waiting=waiting,
        set_aside=set_aside or SetAside(),
        shares=shares,
    )
    for record in rows:
        key = record.cluster, record.job_id, record.start  # one attempt of a job starts once
        if key not in found or found[key].elapsed_s <= record.elapsed_s:
            found[key] = record
    return list(found.values())


@dataclass(frozen=True)
class Columns:
    """The header of an answer."""

    names: tuple[str, ...]
    """In lower case."""
    line: str

    def row(self, line: str) -> dict[str, str]:
        """Return the cells of a row by name; of two columns with one name the first.

        Only a job name explains more cells than the header has. Raise RowError if there are fewer, or more
        without a column JobName.
        """
        cells, count = line.split("|"), len(self.names)
        surplus = len(cells) - count
        if surplus < 0 or (surplus and "jobname" not in self.names):
            raise RowError(f"has {len(cells)} fields and its header {count}: torn or not from sacct -P")
        if surplus:
            at = self.names.index("jobname")
            end = at + surplus + 1
            cells = [*cells[:at], "|".join(cells[at:end]), *cells[end:]]
        return dict(zip(self.names[::-1], cells[::-1], strict=True))


class RowError(ValueError):
    """A line that does not fit its header."""


def read_header(line: bytes, source: str, also: Sequence[str] = ()) -> Columns:
    """Return the columns named by the first line. Raise StateError with `source` and the fix if a required
    one is missing."""
    text = _text(line)
    names = tuple(name.strip().lower() for name in text.split("|"))
    missing = [name for name in ("JobID", "Start", "AllocTRES", *also) if name.lower() not in names]
    if not {"elapsedraw", "elapsed", "end"} & set(names):
        missing.append("ElapsedRaw")
    if missing:
        raise StateError(
            f"{source} has no column {', '.join(missing)} in its first line; make it with: {PRINTED_BY}"
        )
    return Columns(names, text)


def read_rows(
    lines: Iterable[bytes],
    columns: Columns,
    source: str,
    first: int = 2,
    job_ids: Collection[str] | None = None,
    waiting: bool = False,
    set_aside: SetAside | None = None,
    shares: Shares = NO_SHARES,
) -> Iterator[JobRecord]:
    """Yield each row as a record, except steps, blank lines, repeated headers and jobs that never started.

    `first` is the number of the first of `lines` in `source`; for the others see pick_records. A line that
    cannot be read goes to `set_aside`; without it StateError is raised. `shares`: see gpus_by_type.
    """
    wanted = None if job_ids is None else {each.encode() for each in job_ids}
    for number, line in enumerate(lines, first):
        # A quick check: a cluster's dump is long, and a run has few jobs.
        if wanted is not None and not any(each in line for each in wanted):
            continue
        text = _text(line)
        if not text.strip() or text == columns.line:  # several files joined into one
            continue
        try:
            row = columns.row(text)
            job_id = row["jobid"]
            # A step has a dot; an array task or a part of a heterogeneous job has none.
            counts = job_id != "" and "." not in job_id and (waiting or row["start"] not in NEVER)
            record = to_record(row, shares) if counts and (job_ids is None or job_id in job_ids) else None
        except ValueError as error:
            if set_aside is None:
                raise line_error(source, number, error) from None
            set_aside.add(source, number, error)
            continue
        if record is not None:
            yield record


def _text(line: bytes) -> str:
    return line.rstrip(b"\r\n").decode("utf-8", "replace").removeprefix(BOM)


def line_error(source: str, number: int, error: ValueError) -> StateError:
    between = " " if isinstance(error, RowError) else ": "
    return StateError(f"{source}:{number}{between}{error}; make it again with: {PRINTED_BY}")


def to_record(row: dict[str, str], shares: Shares = NO_SHARES) -> JobRecord:
    """Parse one row by lower-case column name; raise ValueError for a cell without number or time."""
    cell = row.get
    start, end, state = row["start"], cell("end", ""), cell("state", "")
    types = gpus_by_type(row["alloctres"], shares)
    elapsed_s = elapsed_of(cell("elapsedraw", ""), cell("elapsed", ""), start, end)
    return JobRecord(
        job_id=row["jobid"],
        state=state_of(cell("state", "unknown")),
        start=start_of(start, end, elapsed_s),
        end=parse_when(end),
        elapsed_s=elapsed_s,
        gpus=plain(sum(types.values())),
        nodes=nodes_of(cell("nnodes", ""), row["alloctres"]),
        node_list=cell("nodelist", ""),
        exit_code=cell("exitcode", ""),
        restarts=_whole(cell("restarts") or "0", "Restarts"),
        user=cell("user", ""),
        account=cell("account", ""),
        partition=cell("partition", ""),
        qos=cell("qos", ""),
        job_name=cell("jobname", ""),
        eligible=parse_when(cell("eligible", "")) or parse_when(cell("submit", "")),
        cancelled_by=state[len("CANCELLED by ") :] if state.startswith("CANCELLED") else None,
        cluster=cell("cluster", ""),
        gpu_types=tuple((name, plain(gpus)) for name, gpus in types.items() if name),
        unshared=tuple(sorted(unknown_shares(row["alloctres"], shares))),
        billing=billing_of(row["alloctres"]),
    )


def state_of(text: str) -> str:
    """Return CANCELLED for "CANCELLED by 1000"."""
    return text.split(" ")[0] or "unknown"


def nodes_of(num_nodes: str, alloc_tres: str) -> int:
    """Return the nodes, from NNodes if present, else AllocTRES; raise ValueError for no number of them."""
    if num_nodes:
        return _whole(num_nodes, "NNodes")
    found = re.search(r"(?:^|,)node=(\d+)", alloc_tres)
    return at_most(int(found[1]) if found else 0, "AllocTRES", alloc_tres)


def elapsed_of(raw: str, elapsed: str, start: str, end: str) -> int:
    """Return the seconds a record ran, from ElapsedRaw, Elapsed, or End - Start; "" for a missing column.
    Raise ValueError for no number or no possible time, or if it still runs and only End was there."""
    if raw:
        seconds = _integer(raw, "ElapsedRaw")
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
    return at_most(_integer(text, column), column, text)


def _integer(text: str, column: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{column} is {text!r}, which is no whole number") from None


def start_of(start: str, end: str, elapsed_s: int) -> float | None:
    """Parse a start with `parse_when`. In the hour repeated by a clock change, the end decides."""
    first = parse_when(start)
    if first is None or end in NEVER or end.isdecimal() or start.isdecimal():
        return first
    begins = _both(start)
    if len(begins) == 1:
        return first
    ends = _both(end)
    # Suspensions make the elapsed time shorter, never longer. If two fit, take the first.
    return min(begins, key=lambda begin: min(abs(over - begin - elapsed_s) for over in ends))


def _both(text: str) -> list[float]:
    """Return the moments at which a clock shows this: two in a repeated hour."""
    shown = datetime.fromisoformat(text)
    return sorted({shown.replace(fold=fold).timestamp() for fold in (0, 1)})


def parse_when(text: str) -> float | None:
    """Return the Unix seconds of sacct's time: 2026-05-01T10:00:00 (local), or seconds; None if unset. Raise
    UsageError if it is neither."""
    if text in NEVER:
        return None
    try:
        seconds = float(text) if text.isdecimal() else datetime.fromisoformat(text).timestamp()
        if seconds < NO_LATER:
            return seconds
    except (ValueError, OverflowError):
        pass
    raise UsageError(f"{text!r} is not a time: write 2026-05-01 or 2026-05-01T10:00:00")
