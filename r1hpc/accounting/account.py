"""Get the GPU-hours of a user, an account or a cluster, for `report`, `budget` and its check.

They come from sacct, a file of its output, or run folders alone. Hours are the dict of
accounting.hours.fold_hours; a large output goes to sacct_totals.py.
"""

import contextlib
import gzip
import math
import os
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from r1hpc.accounting.hours import Selection, fold_hours, in_words, to_allocation
from r1hpc.accounting.ledger import RunLedger
from r1hpc.accounting.open_ledger import open_ledgers, survey
from r1hpc.attempt.state.state import slurm_jobs
from r1hpc.base.choose_run import all_runs, full_name
from r1hpc.base.errors import StateError, UsageError
from r1hpc.base.names import is_among, nearest
from r1hpc.slurm.client import SlurmError, call, without_advice
from r1hpc.slurm.sacct import PRINTED_BY, JobRecord, SetAside, ask_sacct_file, pick_records
from r1hpc.telemetry.diagnosis.summary import names_of

_TOO_WIDE = "Too wide of a date range"
"""As sacct says it (slurm_errno.c, ESLURM_DB_QUERY_TOO_WIDE)."""
_FEW_BYTES = 2**18
"""A file up to this size is read before numpy is imported."""
NO_GPU_NAMED = (
    "no job on Slurm's record has a GPU; Slurm counts them where AccountingStorageTRES has gres/gpu, "
    "and `scontrol show config` tells"
)
"""The note shown if `names_no_gpu`."""


@dataclass(frozen=True)
class SacctFile:
    """Hold sacct's output in an open file that can be read again."""

    file: IO[bytes]
    name: str

    def __iter__(self) -> Iterator[bytes]:
        self.file.seek(0)
        return iter(self.file)


def names_no_gpu(hours: dict[str, Any]) -> bool:
    """True if there are jobs in these totals, and none of them held a GPU."""
    return bool(hours["node_hours"] and not hours["total"])


def with_runs(selection: Selection, root: Path) -> Selection:
    """Add the jobs of every run under a run root, stages of chains too, and their clusters."""
    runs: dict[str, tuple[str, str]] = {}
    clusters: dict[str, str | None] = {}
    for run in all_runs(root):
        with contextlib.suppress(OSError, StateError):  # an unreadable run must not hide the others
            stage, _ = names_of(run)
            jobs = slurm_jobs(run)
            runs |= dict.fromkeys(jobs, (full_name(run), stage))
            clusters |= jobs
    return replace(selection, runs=runs, clusters=clusters)


def hours_of_all(
    root: Path, selection: Selection, sacct_file: SacctFile | None
) -> tuple[dict[str, Any], str, str]:
    """Return the hours of all selected jobs, their source, and a note on what is missing.

    The source is `sacct`, from the file if there is one, or `run`: the runs' own records under this root.
    """
    selection = with_runs(selection, root)
    if sacct_file is not None:
        records = records_of_file(sacct_file, selection.runs, selection)
        if records:  # cached, so that other commands need not ask again
            open_ledgers(all_runs(root), time.time(), records, ask=False)
        sacct_file.file.seek(0)
        hours = hours_of_lines(sacct_file.file, sacct_file.name, selection)
    else:
        try:
            hours = hours_from_sacct(selection)
        except SlurmError as error:
            return _hours_without_sacct(root, selection, error)
    return hours, "sacct", ". ".join([*([NO_GPU_NAMED] if names_no_gpu(hours) else []), *left_out(hours)])


def left_out(hours: dict[str, Any], setting: str = "--gres-per-gpu ") -> list[str]:
    """Return sentences on what the totals do not hold; `setting` tells how many shards make a GPU."""
    notes = []
    if bad := hours.get("set_aside"):
        rows = f"{bad['rows']} row{'s are' if bad['rows'] > 1 else ' is'}"
        notes.append(f"{rows} set aside and not counted: {'; '.join(bad['first'])}")
    if kinds := hours.get("unknown_shares"):
        notes.append(
            f"gres/{' and gres/'.join(kinds)} count as no GPU: tell how many make one with "
            f"{setting}{','.join(f'{kind}=N' for kind in kinds)}"
        )
    return notes


def _hours_without_sacct(
    root: Path, selection: Selection, error: SlurmError
) -> tuple[dict[str, Any], str, str]:
    why = without_advice(error)
    if _TOO_WIDE in str(error):  # the site's MaxQueryTimeRange
        raise SlurmError(f"{why}: give --start, nearer to now") from None
    if selection.account or selection.by or not all_runs(root):  # run folders know no account or partition
        raise SlurmError(
            f"{why}: run this on a login node, or give --sacct-file FILE, made there with: {PRINTED_BY}"
        ) from None
    ledgers, damaged = survey(root, time.time(), ask=False)
    note = ". ".join([f"from the run folders under {root} alone: {why}", *damaged])
    return hours_of_runs(ledgers, selection), "run", note


@contextlib.contextmanager
def open_sacct_file(path: Path) -> Iterator[SacctFile]:
    """Open sacct's output: a file, also one made by gzip, a pipe, or `-` for standard input."""
    with contextlib.ExitStack() as opened:
        is_stdin = str(path) == "-"
        file: IO[bytes] = sys.stdin.buffer if is_stdin else opened.enter_context(path.open("rb"))
        name = "standard input" if is_stdin else str(path)
        if is_stdin or not file.seekable():
            # A pipe has no size, and cannot be read twice.
            file = _copied(file, opened.enter_context(tempfile.TemporaryFile()))
        is_gzip = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if is_gzip:
            try:
                content = gzip.GzipFile(fileobj=file)
                file = _copied(content, opened.enter_context(tempfile.TemporaryFile()))
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise StateError(f"{name} is a damaged gzip file ({error}): make it again") from None
        yield SacctFile(file, name)


def _copied(source: Any, copy: IO[bytes]) -> IO[bytes]:
    shutil.copyfileobj(source, copy)
    copy.seek(0)
    return copy


def records_of_file(file: SacctFile, jobs: Collection[str], selection: Selection) -> list[JobRecord]:
    """Return what sacct printed into a file about these jobs."""
    if not jobs:
        return []
    return pick_records(file, file.name, jobs, waiting=True, also=selection.columns, shares=selection.shares)


def hours_from_sacct(selection: Selection, timeout_s: float = 600.0) -> dict[str, Any]:
    """Return the totals of what sacct reports now; without a start, from the first record on.

    Raise SlurmError if sacct or slurmdbd does not answer.
    """
    # In seconds: sacct accepts fewer time formats than --start does. Without a start it would begin today;
    # it refuses less than a million (Slurm, parse_time.c).
    start = f"uts{max(1_000_000, math.floor(selection.start or 0))}"
    end = None if selection.end is None else f"uts{math.ceil(selection.end)}"
    # sacct itself filters by user: it also knows a user by number, and several by commas.
    answer = replace(selection, user=None, account=None)
    with ask_sacct_file(start, end, selection.user, selection.account, timeout_s) as file:
        hours = hours_of_lines(file, "sacct", answer)
    for kind, chosen in (("user", selection.user), ("account", selection.account)):
        for name in (chosen or "").split(","):
            if name and not any(is_among(each, name) for each in hours[f"by_{kind}"]):
                _refuse_unknown(kind, name.strip())
    return hours


def _refuse_unknown(kind: str, name: str) -> None:
    """Raise UsageError if slurmdbd knows no such user or account; it may also be unable to tell."""
    try:
        known = call(["sacctmgr", "-n", "-P", "show", "assoc", f"format={kind}"], 10.0).split()
    except SlurmError:
        return
    sees_all = "root" in known  # PrivateData hides those of others, and Slurm always has root
    if sees_all and not name.isdecimal() and not any(is_among(each, name) for each in known):
        raise UsageError(f"Slurm has no {kind} {name!r}{nearest(name.lower(), set(known))}")


def hours_of_lines(file: IO[bytes], source: str, selection: Selection) -> dict[str, Any]:
    """Return the totals of an open file. Memory grows by some 25 bytes a record.

    Raise StateError if the header has another format, or no row can be read.
    """
    if os.fstat(file.fileno()).st_size > _FEW_BYTES or selection.by:
        # Deferred: importing numpy takes 0.1 s, which a report of one run should not pay.
        from r1hpc.accounting.sacct_totals import sum_dump

        return sum_dump(file, source, selection)
    set_aside = SetAside()
    also, shares = selection.columns, selection.shares
    records = pick_records(file, source, also=also, set_aside=set_aside, shares=shares)
    set_aside.refuse_if_alone(len(records))
    allocations = []
    for record in records:
        run, stage = selection.run_of(record)
        allocations.append(replace(to_allocation(record), run=run, stage=stage))
    for key in selection.columns:
        selection.refuse_unknown(key.lower(), {getattr(held, key.lower()) for held in allocations}, source)
    unshared = set().union(*(record.unshared for record in records))
    return fold_hours(selection.clip(allocations)) | in_words(set_aside, unshared)


def hours_of_runs(ledgers: Sequence[RunLedger], selection: Selection) -> dict[str, Any]:
    """Return the totals of the runs' own records, for when Slurm's accounting cannot be asked."""
    return fold_hours(selection.clip(held for ledger in ledgers for held in ledger.allocations))
