"""Judge an attempt that could not record its own end: killed, or finished after its supervisor died.

`begin` records the end of the attempt before it (`close_unended`). Until then state.py shows what this file
judges. end.py uses `steps_for_the_end` and `amend_end` for normal ends too.
"""

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from r1hpc.attempt.state.cause import (
    Evidence,
    RankOutcome,
    SchedulerView,
    decide,
    failures_in_logs,
    judge_by_srun,
    read_outcomes,
)
from r1hpc.attempt.state.slurm_records import kept_records, learn, record_of
from r1hpc.base.run_dir import RunDir
from r1hpc.checkpoint.complete import num_recorded, progress
from r1hpc.checkpoint.store import CheckpointStore
from r1hpc.config.stages import is_server
from r1hpc.slurm.client import SlurmError
from r1hpc.slurm.sacct import JobRecord, sacct_records
from r1hpc.slurm.shell import endings
from r1hpc.telemetry.records.attempts import Attempt, Cause, History, read_history, read_run_events, record
from r1hpc.telemetry.records.metrics import last_steps, loaded_step

if TYPE_CHECKING:
    from r1hpc.config.schema.run import RunConfig

WITHOUT_SUPERVISOR = "its ranks finished; the supervisor died before recording it"
_FAILURES = (Cause.crash, Cause.hang, Cause.oom, Cause.unknown)
_SACCT_TIMEOUT_S = 10.0
_SACCT_TRIES = 5


def close_unended(run: RunDir, config: "RunConfig", job_id: str) -> None:
    """Write the `end` that a killed attempt could not write itself. `job_id`: the job that begins now."""
    history = read_history(run)
    last = history.last
    if last is None:
        return
    if last.cause is not None:
        if _is_doubtful(last) and record_of_attempt(kept_records(run).records, last) is None:
            _ask_sacct(run, last)
        _record_corrections(run, history)
        return
    is_same_job = last.job_id == job_id
    if is_same_job and f"{last.job_start or 0:.0f}" == os.environ.get("SLURM_JOB_START_TIME"):
        seen, restarted = None, False  # the `begin` before this one died after its record: the job goes on
    else:
        seen = _ask_sacct(run, last)
        restarted = is_same_job and bool(int(os.environ.get("SLURM_RESTART_COUNT") or 0))
    view = SchedulerView(frozenset({seen.ending} if seen else ()), restarted=restarted)
    cause, detail = judge_unended(run, last, view, history.is_newer("cancel_requested", "begin"))
    record(
        run,
        "end",
        attempt=last.attempt,
        cause=cause.value,
        detail=detail,
        exit_status=None,
        **steps_for_the_end(run, config, last.attempt, cause),
        kept=pieces_kept(run, read_outcomes(run, last.attempt)),
        requeued=not cause.is_final,
        inferred=True,
        ended=_ended(seen, last) if seen else _last_sign_of_life(run, last),
    )
    _record_corrections(run, history)


def judge_unended(
    run: RunDir, last: Attempt, view: SchedulerView, is_cancelled: bool = False
) -> tuple[Cause, str]:
    """Return cause and detail of an attempt without an `end`, by its ranks, their logs and Slurm."""
    outcomes = read_outcomes(run, last.attempt)
    known = {outcome.rank for outcome in outcomes}
    marks = [path.name.rpartition("-")[2] for path in run.attempt_dir(last.attempt).glob("requeued-*")]
    by_srun, step_cancelled = judge_by_srun(run, last.attempt, last.job_id, known) if marks else (None, False)
    evidence = Evidence(
        ranks=last.ranks,
        outcomes=outcomes,
        status=next((int(mark) for mark in marks if mark.isdecimal()), None),
        scheduler=SchedulerView(view.states, view.preempted, restarted=view.restarted and not marks),
        cancel_requested=is_cancelled,
        in_logs=failures_in_logs(run, last.attempt, last.ranks, last.node_names, known),
        by_srun=by_srun,
        step_cancelled=step_cancelled,
        requeued_by_us=bool(marks),
        run_root=str(run.path.parent),
    )
    cause, detail = decide(evidence)
    if cause is Cause.finished:
        return cause, WITHOUT_SUPERVISOR
    if cause is Cause.crash and not (outcomes or evidence.in_logs or view.states or marks):
        return Cause.unknown, "ended without a record"
    return cause, detail


def corrected_history(run: RunDir) -> History:
    """Return the history with the causes that accounting proves, as far as it was asked."""
    return _corrected(run, read_history(run))


def _corrected(run: RunDir, history: History) -> History:
    doubtful = [attempt for attempt in history.attempts if _is_doubtful(attempt)]
    records = kept_records(run).records if doubtful else ()
    changes = {a.attempt: _correct(run, a, record_of_attempt(records, a)) for a in doubtful}
    attempts = tuple(changes.get(attempt.attempt, attempt) for attempt in history.attempts)
    return replace(history, attempts=attempts) if attempts != history.attempts else history


def _is_doubtful(attempt: Attempt) -> bool:
    """True if accounting may know better: it names the end of a node, whose survivors got SIGTERM or failed,
    and every end that was inferred without it."""
    able = (Cause.preempted, Cause.crash, Cause.hang, Cause.cluster)
    is_slurm = (attempt.job_id or "local-").partition("_")[0].isdecimal()
    return is_slurm and attempt.cause is not None and (attempt.inferred or attempt.cause in able)


def _correct(run: RunDir, attempt: Attempt, seen: JobRecord | None) -> Attempt:
    row = endings.BY_SACCT.get(seen.ending) if seen is not None else None
    if seen is None or row is None or row.cause in ("", attempt.cause):
        return attempt
    if attempt.inferred and attempt.cause is not Cause.finished:
        cause, detail = judge_unended(run, attempt, SchedulerView(frozenset({seen.ending})))
        return replace(attempt, cause=cause, detail=detail) if cause is not attempt.cause else attempt
    if row.cause == Cause.node_fail and _is_doubtful(attempt):
        return replace(attempt, cause=Cause.node_fail, detail=row.detail)
    return attempt


def _record_corrections(run: RunDir, history: History) -> None:
    fresh = _corrected(run, history)
    for old, new in zip(history.attempts, fresh.attempts, strict=True):
        if new != old and new.cause is not None:
            amend_end(run, new.attempt, cause=new.cause.value, detail=new.detail)


def mark_requeued(run: RunDir, attempt: int, status: int) -> None:
    """Leave an empty file, for which even a full disk may have room, because we request the requeue."""
    with suppress(OSError):
        (run.attempt_dir(attempt) / f"requeued-{status}").touch()


def amend_end(run: RunDir, attempt: int, **changes: Any) -> None:
    """Record the end of an attempt again with these changes; the later record counts.

    Raise OSError if the disk is full.
    """
    ends = [e for e in read_run_events(run)[0] if (e.get("event"), e.get("attempt")) == ("end", attempt)]
    if ends:  # none if the disk was full
        fields = {name: value for name, value in ends[-1].items() if name not in ("event", "time")}
        record(run, "end", **{"ended": ends[-1]["time"], **fields, **changes})


def steps_for_the_end(run: RunDir, config: "RunConfig", attempt: int, cause: Cause) -> dict[str, int | None]:
    """Return what the `end` of an attempt records about its checkpoints.

    An attempt that could not load the newest one went on from an older one. Its progress is what it committed
    itself, though a newer folder still exists. A failed server has made no progress: one that dies of a
    repeated request would come back for ever.
    """
    store = CheckpointStore(run.checkpoints, keep=config.checkpoint.keep)
    if is_server(config.stage) and cause in _FAILURES:
        answered = newest_step(run, config, store)
        return {"resumed_from": answered, "last_committed_step": answered}
    loaded = loaded_step(run, attempt)
    if loaded is None:
        return {"last_committed_step": newest_step(run, config, store)}
    own = [each.step for each in store.list() if each.manifest.attempt == attempt]
    return {"resumed_from": loaded, "last_committed_step": max(own, default=loaded)}


def pieces_kept(run: RunDir, outcomes: Sequence[RankOutcome]) -> int:
    """Return the finished pieces beyond the checkpoint; of a script the checkpoints without a known step."""
    return max([num_recorded(run), *(outcome.kept for outcome in outcomes)])


def newest_step(run: RunDir, config: "RunConfig", store: CheckpointStore) -> int | None:
    """Return the newest committed step, unverified, or the number of finished parts; None before the first.

    A server's answers count once they are recorded, a script's own checkpoints if their names count up.
    """
    if is_server(config.stage):
        return next((step.global_step for step in last_steps(run, 1)), None)
    found = store.list()
    if found:
        return found[0].step
    if config.stage == "script":
        return progress(run)
    return len(run.all_parts) or None


def _ask_sacct(run: RunDir, last: Attempt) -> JobRecord | None:
    """Return the ended record of the attempt's job in which it began.

    slurmdbd may get a node failure only after the job has restarted.
    """
    if last.job_id is None or last.job_id.startswith("local-"):
        return None
    for count in range(_SACCT_TRIES):
        if count:
            time.sleep(1)
        try:
            records = sacct_records(last.job_id, timeout_s=_SACCT_TIMEOUT_S)
        except SlurmError:
            return None
        if (found := record_of_attempt(records, last)) is not None:
            # For the ledger, and for earlier attempts: Slurm purges its records.
            learn(run, [record for record in records if record.end is not None], time.time())
            return found
    return None


def record_of_attempt(records: Sequence[JobRecord], last: Attempt) -> JobRecord | None:
    """Return the ended record of the job in which the attempt began."""
    ended = [record for record in records if record.end is not None]
    return record_of(ended, last.job_id, last.start, last.end or time.time(), last.job_start)


def _ended(record: JobRecord, last: Attempt) -> float | None:
    is_same_clock = (record.start or 0.0) - 1 <= last.start <= (record.end or 0.0)
    return record.end if is_same_clock else last.start + record.elapsed_s


def _last_sign_of_life(run: RunDir, last: Attempt) -> float | None:
    """Return when the attempt last wrote, by the clock of its host; the file system may have another one."""
    folders = run.attempt_logs(last.attempt), run.attempt_dir(last.attempt)
    files = [run.train_metrics, *(path for folder in folders for path in folder.glob("*"))]
    times = {path: path.stat().st_mtime for path in files if path.exists()}
    newest = max(times.values(), default=None)
    began = times.get(run.attempt_dir(last.attempt) / "attempt.json")
    return newest if newest is None or began is None else last.start + newest - began
