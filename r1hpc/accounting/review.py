"""What is known of one run: attempts, GPU-hours by both accounts, steps, time, data, GPUs.

    review = review_run(run, now=time.time())
    review.to_json()

Where the GPU-hours went is in hours.ledger, which joins the two accounts.
"""

import pwd
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from r1hpc.attempt.state import Situation, State, all_slurm_jobs, look
from r1hpc.base.rundir import RunDir
from r1hpc.slurm.client import SlurmError
from r1hpc.slurm.sacct import JobRecord, sacct_records
from r1hpc.telemetry.gpu_summary import summarise
from r1hpc.telemetry.hours import UNKNOWN, Allocation, fold_hours
from r1hpc.telemetry.metrics import Audit, audit_ledger
from r1hpc.telemetry.summary import AttemptSummary, RunSummary, summarise_run


@dataclass(frozen=True)
class Gap:
    """Why sacct's GPU-hours differ from the run's own, in GPU-hours."""

    before: float = 0.0
    """From the start of the allocation until the attempt began: prolog, imports, the batch script."""
    after: float = 0.0
    """From the attempt's end until the allocation's: the batch script's last lines, the epilog."""
    without_attempt: float = 0.0
    """Allocations in which no attempt began."""


@dataclass(frozen=True)
class Review:
    """One run, looked at whole."""

    run: RunDir
    situation: Situation
    summary: RunSummary
    own: tuple[Allocation, ...]
    """What the run itself says it held."""
    records: tuple[JobRecord, ...] | None
    """What sacct says; None where it could not be asked."""
    waiting: tuple[JobRecord, ...]
    """What sacct says is still in the queue."""
    note: str
    """Why there is nothing from sacct, if so."""
    audit: Audit
    gpus: tuple[dict[str, Any], ...]
    """telemetry.gpu_summary of each node."""

    @property
    def held(self) -> list[tuple[Allocation, tuple[AttemptSummary, ...]]]:
        """Each allocation with the attempts that began in it, oldest first.

        By sacct; an attempt that it has no record of is an allocation by the run's own word.
        """
        run, stage = self.run.run_id, self.summary.stage
        told = [
            (replace(to_allocation(record), run=run, stage=stage), attempts)
            for record, attempts in match(self.summary, self.records or ())
        ]
        own = zip(self.own, self.summary.attempts, strict=True)
        told += [(held, (each,)) for held, each in own if _record_of(each, self.records or ()) is None]
        return sorted(told, key=lambda pair: pair[0].start)

    @property
    def allocations(self) -> list[Allocation]:
        return [allocation for allocation, _ in self.held]

    @property
    def unrecorded(self) -> list[AttemptSummary]:
        """Attempts that sacct has no record of."""
        return [each for each in self.summary.attempts if _record_of(each, self.records or ()) is None]

    @property
    def missing(self) -> str:
        """Which attempts sacct has no record of, where it has some; empty: none."""
        if self.records is None or not self.unrecorded:
            return ""
        numbers = ", ".join(str(each.attempt.attempt) for each in self.unrecorded)
        jobs = ", ".join(dict.fromkeys(str(each.attempt.job_id) for each in self.unrecorded))
        return f"sacct has no record of attempt {numbers} (job {jobs}): the run's own record counts for it"

    @property
    def source(self) -> str:
        """`sacct`, `run`, or `sacct and run` where sacct knows of a part only."""
        if self.records is None:
            return "run"
        return "sacct and run" if self.unrecorded else "sacct"

    @property
    def gap(self) -> Gap | None:
        return None if self.records is None else explain(self.summary, self.records)

    def to_json(self) -> dict[str, Any]:
        last = self.summary.steps.last
        return {
            "run_id": self.run.run_id,
            "run_dir": str(self.run.path),
            "stage": self.summary.stage,
            "state": self.situation.state.value,
            "gpu_hours": {**fold_hours(self.allocations), "source": self.source},
            "own_gpu_hours": fold_hours(self.own),
            "gap_gpu_hours": None if self.gap is None else vars(self.gap),
            "note": self.note or self.missing,
            "attempts": [
                {
                    **each.attempt.to_json(),
                    "gpu_hours": each.gpu_hours,
                    "num_steps": each.num_steps,
                    "num_lost_steps": each.num_lost,
                    "time": each.time.to_json(),
                }
                for each in self.summary.attempts
            ],
            "steps": {
                "useful": self.summary.num_useful,
                "lost": self.summary.num_lost,
                "last": last.global_step if last else None,
            },
            "time": self.summary.total.to_json(),
            "data": self.audit.to_json(),
            "gpus": list(self.gpus),
        }


def review_run(run: RunDir, now: float, records: Sequence[JobRecord] | None = None) -> Review:
    """Gather it. `records` are sacct's from a file; without them sacct itself is asked, where it is there."""
    situation = look(run)
    summary = summarise_run(run, situation.history, now, situation.state is State.running)
    found, note = _records_of(run, situation, records)
    started = None if found is None else tuple(r for r in found if r.start is not None)
    return Review(
        run=run,
        situation=situation,
        summary=summary,
        own=tuple(summary.allocations(owner(run))),
        records=started or None,
        waiting=tuple(r for r in found or () if r.start is None),
        note=note if started or found is None else "its job has not started",
        audit=audit_ledger(run),
        gpus=tuple(summarise(path) for path in sorted(run.metrics.glob("gpu-*.jsonl"))),
    )


def to_allocation(record: JobRecord) -> Allocation:
    """A record of sacct; one that still runs counts its elapsed time, a suspended one not its pauses."""
    start = record.start or 0.0
    return Allocation(
        start=start,
        end=start + record.elapsed_s,
        gpus=record.gpus,
        nodes=record.nodes,
        user=record.user or UNKNOWN,
        account=record.account or UNKNOWN,
        state=record.state or UNKNOWN,
        qos=record.qos or UNKNOWN,
        partition=record.partition or UNKNOWN,
    )


def owner(run: RunDir) -> str:
    """The user whose folder it is."""
    uid = run.path.stat().st_uid
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def match(
    summary: RunSummary, records: Sequence[JobRecord]
) -> list[tuple[JobRecord, tuple[AttemptSummary, ...]]]:
    """Each allocation with the attempts that began in it."""
    inside: dict[int, list[AttemptSummary]] = {}
    for each in summary.attempts:
        i = _record_of(each, records)
        if i is not None:
            inside.setdefault(i, []).append(each)
    return [(record, tuple(inside.get(i, ()))) for i, record in enumerate(records)]


def _record_of(each: AttemptSummary, records: Sequence[JobRecord]) -> int | None:
    """The record an attempt lies in; None: sacct has none of it.

    One of its job in which it began, or, since Slurm's clock and the batch host's may differ, one that holds
    half of it; of several the one that holds most.
    """
    began, over = each.attempt.start, each.end
    able = []
    for i, record in enumerate(records):
        if record.job_id != each.attempt.job_id or record.start is None:
            continue
        end = record.start + record.elapsed_s
        shared = min(over, end) - max(began, record.start)
        began_in_it = record.start - 1 <= began <= end + 1  # Slurm counts whole seconds
        if began_in_it or shared > (over - began) / 2:
            able.append((shared, record.start, i))
    return max(able)[2] if able else None


def explain(summary: RunSummary, records: Sequence[JobRecord]) -> Gap:
    """What lies around the attempts in their allocations, added up."""
    before = after = without = 0.0
    for record, inside in match(summary, records):
        held = to_allocation(record)
        if inside:
            before += record.gpus * (inside[0].attempt.start - held.start) / 3600
            after += record.gpus * (held.end - inside[-1].end) / 3600
        else:
            without += record.gpus * held.hours
    return Gap(before, after, without)


def _records_of(
    run: RunDir, situation: Situation, given: Sequence[JobRecord] | None
) -> tuple[tuple[JobRecord, ...] | None, str]:
    jobs = all_slurm_jobs(run)
    if not jobs:
        return None, "no job of this run was Slurm's"
    if given is not None:
        found = tuple(record for record in given if record.job_id in jobs)
        return (found, "") if found else (None, f"the file has no record of job {', '.join(jobs)}")
    starts = [s.get("time", 0.0) for s in situation.history.submissions]
    try:
        # A day earlier: a job id counts from the day it was used last, should it ever be used again.
        since = min(starts) - 86400 if starts else None
        live = [record for job in jobs for record in sacct_records(job, since, 10.0)]
    except SlurmError as error:
        if error.exit_code is None and not error.timed_out:
            return None, "there is no sacct here"
        return None, f"it could not be asked: {(error.stderr.strip() or str(error)).splitlines()[-1]}"
    return (tuple(live), "") if live else (None, f"sacct has no record of job {', '.join(jobs)}")
