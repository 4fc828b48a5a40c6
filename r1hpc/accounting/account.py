"""Get the GPU-hours of a user, an account or a cluster, for `report`, `budget` and its check.

They come from sacct, a file of its output, or run folders alone. Hours are the dict of
accounting.hours.fold_hours; a large output goes to sacct_totals.py.
"""

import contextlib
import math
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from r1hpc.accounting.hours import UNKNOWN, Selection, fold_hours, to_allocation
from r1hpc.accounting.ledger import RunLedger
from r1hpc.accounting.open_ledger import open_ledgers, survey
from r1hpc.attempt.state.state import all_slurm_jobs
from r1hpc.base.choose_run import all_runs, full_name
from r1hpc.base.errors import StateError
from r1hpc.slurm.client import SlurmError, without_advice
from r1hpc.slurm.sacct import PRINTED_BY, JobRecord, ask_sacct_file, pick_records
from r1hpc.telemetry.diagnosis.summary import names_of

_TOO_WIDE = "Too wide of a date range"
"""As sacct says it (slurm_errno.c, ESLURM_DB_QUERY_TOO_WIDE)."""
_FEW_BYTES = 2**18
"""A file up to this size is read before numpy and Arrow are imported."""
NO_GPU_NAMED = (
    "no job on Slurm's record has a GPU; Slurm counts them where AccountingStorageTRES has gres/gpu, "
    "and `scontrol show config` tells"
)
"""The note shown if `names_no_gpu`."""


def names_no_gpu(hours: dict[str, Any]) -> bool:
    """True if there are jobs in these totals, and none of them held a GPU."""
    return bool(hours["node_hours"] and not hours["total"])


def known_jobs(root: Path) -> dict[str, tuple[str, str]]:
    """Map job ID -> (run, stage) for every run under a run root, including stages of chains."""
    found: dict[str, tuple[str, str]] = {}
    for run in all_runs(root):
        with contextlib.suppress(OSError, StateError):  # an unreadable run must not hide the others
            stage, _ = names_of(run)
            found |= dict.fromkeys(all_slurm_jobs(run), (full_name(run), stage))
    return found


def hours_of_all(
    root: Path, selection: Selection, sacct_file: Path | None
) -> tuple[dict[str, Any], str, str]:
    """Return the hours of all selected jobs, their source, and a note on what is missing.

    The source is `sacct`, from the file if there is one, or `run`: the runs' own records under this root.
    """
    selection = replace(selection, runs=known_jobs(root))
    if sacct_file is not None:
        # A pipe can be read only once, for the totals.
        records = records_of_file(sacct_file, selection.runs, selection) if sacct_file.is_file() else []
        if records:  # cached, so that other commands need not ask again
            open_ledgers(all_runs(root), time.time(), records, ask=False)
        hours = hours_of_file(sacct_file, selection)
    else:
        try:
            hours = hours_from_sacct(selection)
        except SlurmError as error:
            return _hours_without_sacct(root, selection, error)
    return hours, "sacct", NO_GPU_NAMED if names_no_gpu(hours) else ""


def _hours_without_sacct(
    root: Path, selection: Selection, error: SlurmError
) -> tuple[dict[str, Any], str, str]:
    why = without_advice(error)
    if _TOO_WIDE in str(error):  # the site's MaxQueryTimeRange
        raise SlurmError(f"{why}: give --start, nearer to now") from None
    if selection.account or not all_runs(root):  # run folders know no account
        raise SlurmError(
            f"{why}: run this on a login node, or give --sacct-file FILE, made there with: {PRINTED_BY}"
        ) from None
    ledgers, damaged = survey(root, time.time(), ask=False)
    note = ". ".join([f"from the run folders under {root} alone: {why}", *damaged])
    return hours_of_runs(ledgers, selection), "run", note


def records_of_file(path: Path, jobs: Collection[str], selection: Selection) -> list[JobRecord]:
    """Return what sacct printed into a file about these jobs."""
    if not jobs:
        return []
    with path.open("rb") as lines:
        return pick_records(lines, str(path), jobs, waiting=True, also=selection.columns)


def hours_of_file(path: Path, selection: Selection) -> dict[str, Any]:
    """Return the totals of what sacct printed into a file or a pipe.

    Raise StateError, with the file, the line and the fix, if the header or a line has another format.
    """
    with path.open("rb") as file:
        if file.seekable():
            return hours_of_lines(file, str(path), selection)
        with tempfile.TemporaryFile() as copy:  # a pipe has no size, and cannot be read twice
            shutil.copyfileobj(file, copy)
            copy.seek(0)
            return hours_of_lines(copy, str(path), selection)


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
        return hours_of_lines(file, "sacct", answer)


def hours_of_lines(file: IO[bytes], source: str, selection: Selection) -> dict[str, Any]:
    """Return the totals of an open file. Memory grows by some 25 bytes a record."""
    if os.fstat(file.fileno()).st_size > _FEW_BYTES:
        # Deferred: importing numpy and Arrow takes 0.1 s, which a report of one run should not pay.
        from r1hpc.accounting.sacct_totals import sum_dump

        return sum_dump(file, source, selection)
    allocations = []
    for record in pick_records(file, source, also=selection.columns):
        run, stage = selection.runs.get(record.job_id, (UNKNOWN, UNKNOWN))
        allocations.append(replace(to_allocation(record), run=run, stage=stage))
    return fold_hours(selection.clip(allocations))


def hours_of_runs(ledgers: Sequence[RunLedger], selection: Selection) -> dict[str, Any]:
    """Return the totals of the runs' own records, for when Slurm's accounting cannot be asked."""
    return fold_hours(selection.clip(held for ledger in ledgers for held in ledger.allocations))
