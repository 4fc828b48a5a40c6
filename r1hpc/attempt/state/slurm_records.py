"""Keep what Slurm's accounting says about a run in its allocations.json.

Slurm forgets: a site purges its accounting, and sacct works on some machines only. A record that one command
learns, from sacct or a file, therefore counts for every later command.
"""

import contextlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from r1hpc.base.errors import StateError
from r1hpc.base.files import read_object, write_json
from r1hpc.base.records import Time
from r1hpc.base.run_dir import RunDir
from r1hpc.slurm.client import SlurmError
from r1hpc.slurm.sacct import JobRecord, sacct_records
from r1hpc.telemetry.records.attempts import History

DAY = 86400.0
_VERSION = 1
_JOBS_PER_CALL = 200
_NOT_OVER = (
    *("RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING"),
    *("STOPPED", "RESIZING", "STAGE_OUT", "SIGNALING"),
)
_HOUR = 3600.0
_LEARNT_BY = 7 * DAY
"""slurmdbd has heard of an end by then, or never will."""
_JUST_PRINTED_S = 60.0
"""Covers whole seconds and clocks that differ."""


@dataclass(frozen=True)
class SlurmRecords:
    records: tuple[JobRecord, ...] = ()
    """Records of allocations that began, oldest first, each once."""
    seen: Time = 0.0
    """When the newest of them was learnt, Unix seconds; an open one had run until then."""
    asked: Time = 0.0
    """When sacct last answered."""


def kept_records(run: RunDir) -> SlurmRecords:
    """Return what was learnt about a run; empty if the file is missing or damaged."""
    value = read_object(run.allocations, SlurmRecords)
    if value.get("version") != _VERSION:
        return SlurmRecords()
    try:
        records = tuple(_record(each) for each in value["records"])
        kept = SlurmRecords(records, value["seen"], value["asked"])
    except (TypeError, KeyError):  # with other fields, by another version
        return SlurmRecords()
    return SlurmRecords() if any(record.start is None for record in records) else kept


def _record(value: dict[str, Any]) -> JobRecord:
    types, unshared = value.get("gpu_types", ()), value.get("unshared", ())
    return JobRecord(**{**value, "gpu_types": tuple(map(tuple, types)), "unshared": tuple(unshared)})


def learn(run: RunDir, records: Iterable[JobRecord], now: float, asked: float = 0.0) -> SlurmRecords:
    """Add these records of a run to those kept before; return all of them.

    If the folder cannot be written, nothing is kept, and the result is the same.

    Args:
        asked: when sacct gave them for all jobs of the run; 0: they are from a file, which may lack some.
    """
    before = kept_records(run)
    joined = {(r.job_id, r.start): r for r in before.records}
    for record in records:
        known = joined.get((record.job_id, record.start))
        # A file may be older than what was learnt since about the same allocation.
        is_longer = known is not None and is_open(known) and record.elapsed_s > known.elapsed_s
        if record.start is not None and (known is None or not is_open(record) or is_longer):
            joined[record.job_id, record.start] = record
    ordered = tuple(sorted(joined.values(), key=lambda r: r.start or 0.0))
    is_new = ordered != before.records
    # A file describes the time at which its open jobs had run that long; sacct itself describes now.
    printed = max((r.start + r.elapsed_s for r in ordered if r.start and is_open(r)), default=now)
    seen = now if asked or now - printed < _JUST_PRINTED_S else printed
    fresh = SlurmRecords(ordered, seen if is_new else before.seen, max(asked, before.asked))
    if is_new or asked > before.asked + _HOUR:
        with contextlib.suppress(OSError):
            write_json(run.allocations, {"version": _VERSION, **asdict(fresh)})
    return fresh


def is_open(record: JobRecord) -> bool:
    """True if it had not ended when it was seen. Without the column End its state decides."""
    return record.end is None and record.state in _NOT_OVER


def submitted_at(history: History) -> float:
    """Return a day before the first submission, as clocks differ: earlier records are not the run's own."""
    asked = [float(s["time"]) for s in history.submissions]
    return min(asked or [attempt.start for attempt in history.attempts], default=0.0) - DAY


def record_of(
    records: Sequence[JobRecord],
    job_id: str | None,
    began: float,
    over: float,
    job_start: float | None = None,
) -> JobRecord | None:
    """Return the record of the allocation in which an attempt ran; None if Slurm has none.

    It is the record of its job that starts at `job_start`. Earlier versions did not record that. Then it is
    one in which the attempt began, or, since Slurm's clock and the batch host's may differ, one that holds
    half of it. If several do, it is the one that holds most.
    """
    if job_start is not None:
        return next((r for r in records if (r.job_id, r.start) == (job_id, job_start)), None)
    able = []
    for record in records:
        if record.job_id != job_id or record.start is None:
            continue
        end = record.start + record.elapsed_s
        shared = min(over, end) - max(began, record.start)
        # Slurm counts whole seconds; an open record may be longer by now.
        began_in_it = record.start - 1 <= began and (began <= end + 1 or is_open(record))
        if began_in_it or shared > (over - began) / 2:
            able.append((shared, record.start, record))
    return max(able, key=lambda each: each[:2])[2] if able else None


def is_settled(kept: SlurmRecords, jobs: Collection[str], history: History, now: float) -> bool:
    """True if sacct can add nothing about the attempts that have ended."""
    ended = [
        (a.job_id, a.start, a.end, a.job_start)
        for a in history.attempts
        if a.end is not None and a.job_id in jobs
    ]
    if kept.asked > max((each[2] for each in ended), default=now) + _LEARNT_BY:
        return True
    found = [record_of(kept.records, *each) for each in ended]
    return all(record is not None and not is_open(record) for record in found)


def ask_slurm(
    runs: Iterable[tuple[RunDir, Sequence[str], History]],
    now: float,
    timeout_s: float = 10.0,
    again: bool = False,
) -> tuple[list[JobRecord], str]:
    """Learn what is still unknown about the ended attempts of these runs, in one call for many jobs.

    Args:
        runs: each with its Slurm jobs.
        again: ask about all of them, even if nothing is missing.

    Returns:
        sacct's records of each run, also of waiting jobs; and why it could not be asked about all, or
        empty.
    """
    asked = [each for each in runs if again or not is_settled(kept_records(each[0]), *each[1:], now)]
    since = {job: submitted_at(history) for _, jobs, history in asked for job in jobs}
    found: list[JobRecord] = []
    wanted, why = sorted(since), ""
    answered: set[str] = set()
    for i in range(0, len(wanted), _JOBS_PER_CALL):
        some = wanted[i : i + _JOBS_PER_CALL]
        try:
            # It refuses less than a million seconds (Slurm, parse_time.c).
            found += sacct_records(",".join(some), max(1e6, min(since[job] for job in some)), timeout_s)
        except (SlurmError, StateError) as error:
            why = _why(error)
            break
        answered.update(some)
    whole = [each for each in asked if each[1] and answered.issuperset(each[1])]
    for run, jobs, history in whole:
        learn(run, own_records(found, jobs, history), now, asked=now)
    theirs = {job for _, jobs, _ in whole for job in jobs}
    return [record for record in found if record.job_id in theirs], why


def own_records(records: Iterable[JobRecord], jobs: Sequence[str], history: History) -> list[JobRecord]:
    """Return the records of these jobs since the run exists. Slurm reuses job IDs if it loses its state."""
    since = submitted_at(history)
    return [r for r in records if r.job_id in jobs and (r.start is None or r.start >= since)]


def _why(error: SlurmError | StateError) -> str:
    if not isinstance(error, SlurmError):
        return f"it could not be read: {error}"
    if error.exit_code is None and not error.timed_out:
        return "no sacct on this machine"
    return f"it could not be asked: {(error.stderr.strip() or str(error)).splitlines()[-1]}"
