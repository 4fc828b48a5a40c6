"""End an attempt on the batch host after the ranks have left: find the cause, decide what follows.

The run is over, Slurm restarts it by itself, or the caller does (submission/chain/next_job.py, local.py). The
end is recorded before the requeue, because a requeue kills this process; `take_back` corrects the record if
the requeue fails. Just before the requeue `refuse_cancelled` checks again whether the job was cancelled.
"""

import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum

from r1hpc.attempt.control.stop import OUT_OF_HOURS
from r1hpc.attempt.limits import reason_to_stop
from r1hpc.attempt.notify import notify
from r1hpc.attempt.state.cause import (
    FINISHED,
    STOPPED,
    Evidence,
    RankOutcome,
    SchedulerView,
    decide,
    failures_in_logs,
    judge_by_srun,
    read_outcomes,
    same_words,
    unstarted_by_srun,
)
from r1hpc.attempt.state.unended import (
    amend_end,
    corrected_history,
    mark_requeued,
    pieces_kept,
    steps_for_the_end,
)
from r1hpc.attempt.trackers import await_trackers
from r1hpc.base.errors import R1hpcError
from r1hpc.base.failpoints import failpoint
from r1hpc.base.run_dir import RunDir
from r1hpc.checkpoint.disk import refusal_of
from r1hpc.checkpoint.store import CheckpointStore
from r1hpc.config.load import read
from r1hpc.config.schema.run import RunConfig
from r1hpc.config.stages import counts_of, is_server
from r1hpc.plan.save_time import choose_signal_lead_s
from r1hpc.slurm.client import SlurmError
from r1hpc.slurm.requeue import JobState, controller_time, job_state
from r1hpc.slurm.shell.contract import NOT_THE_NODE
from r1hpc.telemetry.records.attempts import Attempt, Cause, read_history, record

_DIAGNOSIS_TIMEOUT_S = 5.0
"""It takes half a second; a grace time may be only 30 s, and the requeue comes after it."""
_ALIKE_ON_ONE_NODE = 3


class Next(StrEnum):
    over = "over"
    superseded = "superseded"
    """A newer attempt has begun: this one is a ghost and must not touch the job."""
    already_requeued = "already requeued"
    """Slurm has already put the job back into the queue."""
    requeue = "requeue"
    hold = "hold"
    """Requeue the job, held until a person has mended the cluster or the disk."""


@dataclass(frozen=True)
class Ended:
    attempt: Attempt
    next: Next
    reason: str
    preempt_time: float | None = None
    """Slurm's PreemptTime of the job while it was still running."""

    @property
    def exit_status(self) -> int:
        """Return the batch script's exit status: 0 unless the run failed."""
        good = (Cause.finished, Cause.stopped)
        if self.next is Next.hold:
            return NOT_THE_NODE
        return 1 if self.next is Next.over and self.attempt.cause not in good else 0


class OverError(R1hpcError):
    """The run is over, and that is recorded."""


class CancelledError(OverError):
    """The run was cancelled after its attempt was judged."""


def end(run: RunDir, attempt: int, status: int, diagnose: bool = True) -> Ended:
    """Judge the attempt whose ranks have left with `status`, and record it.

    Args:
        diagnose: print the diagnosis of the attempt, and remove checkpoints that a finished run no longer
            needs.
    """
    failpoint("end")
    config = read(run.config)
    history = corrected_history(run)
    this = next(a for a in history.attempts if a.attempt == attempt)
    if this is not history.last:
        # slurmd died, the job was started elsewhere under the same id, and the old ranks lived on.
        reason = f"attempt {history.attempts[-1].attempt} has taken over; leaving it alone"
        print(f"{run.run_id}: attempt {attempt} ended, but {reason}", flush=True)
        return Ended(this, Next.superseded, reason)
    if this.cause is not None:
        raise OverError(f"attempt {attempt} of {run.run_id} has ended already: {this.cause.value}")
    state = _ask_slurm(this.job_id)
    outcomes = read_outcomes(run, attempt)
    if state is not None and state.is_requeued and not _is_explained(outcomes, state):
        # A node failed and its survivors got SIGTERM, or the ranks were killed before they could act. The
        # next begin finds out which from accounting, which lags behind.
        reason = "Slurm has taken the job back; the next attempt will say why"
        print(f"{run.run_id}: attempt {attempt} ended: {reason}", flush=True)
        return Ended(this, Next.already_requeued, reason)
    lead_s, known = config.resources.signal_lead_s, {outcome.rank for outcome in outcomes}
    by_srun, step_cancelled = judge_by_srun(run, attempt, this.job_id, known)
    evidence = Evidence(
        ranks=this.ranks,
        outcomes=outcomes,
        status=status,
        scheduler=_view(state),
        cancel_requested=history.is_newer("cancel_requested", "begin"),
        signal_lead_s=lead_s if lead_s is not None else choose_signal_lead_s(60, None),
        is_finished=run.finished.exists(),
        in_logs=failures_in_logs(run, attempt, this.ranks, this.node_names, known),
        by_srun=by_srun,
        step_cancelled=step_cancelled,
        unstarted="" if outcomes else unstarted_by_srun(run, attempt, this.job_id),
        run_root=str(run.path.parent),
        refusal=refusal_of(run.path) if status else "",
    )
    cause, detail = decide(evidence)
    steps = steps_for_the_end(run, config, attempt, cause)
    judged = replace(
        this,
        cause=cause,
        detail=detail,
        last_committed_step=steps["last_committed_step"],
        resumed_from=steps.get("resumed_from", this.resumed_from),
        kept=pieces_kept(run, outcomes),
    )
    earlier = [a for a in history.since_submission if a.attempt < attempt]
    follows, reason = _what_follows([*earlier, judged], config, state)
    try:
        record(
            run,
            "end",
            attempt=attempt,
            cause=cause.value,
            detail=detail,
            exit_status=status,
            **steps,
            kept=judged.kept,
            requeued=follows is not Next.over,
            **({"not_continued": reason} if follows is Next.over and not cause.is_final else {}),
        )
    except OSError as error:
        # A full disk must not prevent the requeue; the next begin writes the missing record.
        mark_requeued(run, attempt, status)
        print(f"{run.attempts} could not be written: {error.strerror}", file=sys.stderr, flush=True)
    line = f"{run.run_id}: attempt {attempt} ended: {cause.value}"
    print(line + (f" ({detail})" if detail else ""), flush=True)
    if reason:
        print(f"{run.run_id}: {reason}", flush=True)
    if diagnose and not is_server(config.stage):  # it judges steps
        print_diagnosis(run, attempt)
    if follows is Next.over:
        if diagnose:  # there is time
            CheckpointStore(run.checkpoints).sweep(attempt)
        await_trackers(run)
        notify(run, config.notify, cause, f"attempt {attempt}: {detail or cause}")
    warned = None if state is None or "COMPLETING" in state.states else state.preempt_time
    return Ended(judged, follows, reason, warned)


def _is_explained(outcomes: Sequence[RankOutcome], state: JobState) -> bool:
    """True if the ranks, or Slurm's PreemptTime, explain the end of an attempt whose job is requeued."""
    kinds = {outcome.kind for outcome in outcomes}
    by_itself = any(o.kind == STOPPED and o.reason in ("STOP file", OUT_OF_HOURS) for o in outcomes)
    return FINISHED in kinds or by_itself or (STOPPED in kinds and state.preempt_time is not None)


def refuse_cancelled(run: RunDir, warned: float | None, state: JobState) -> None:
    """Check that the run was not cancelled since its attempt was judged; Slurm may requeue it even so.

    Raise CancelledError if scancel or `r1hpc cancel` cancelled it.
    """
    if read_history(run).is_cancelled or "CANCELLED" in _view(state, warned).states:
        raise CancelledError(f"{run.run_id} is not requeued: it was cancelled")


def take_back(run: RunDir, attempt: int, why: str, cause: Cause | None = None) -> None:
    """Record the end of an attempt again, as one that nothing follows; the later record counts."""
    this = next((a for a in read_history(run).attempts if a.attempt == attempt), None)
    if this is None or this.cause is None:
        return  # the disk was full
    detail = f"{this.detail}; {why}" if this.detail else why
    try:
        amend_end(run, attempt, cause=(cause or this.cause).value, detail=detail, requeued=False)
        notify(run, read(run.config).notify, cause or this.cause, detail)
    except OSError as error:
        print(f"{run.attempts} could not be written: {error.strerror}", file=sys.stderr, flush=True)


def print_diagnosis(run: RunDir, attempt: int) -> None:
    """Print the diagnosis of the attempt into the batch log.

    It runs as a separate process: no damaged record or hanging file system may prevent the requeue.
    """
    command = [sys.executable, "-m", "r1hpc.diagnose", str(run.path), "--attempt", str(attempt), "--quick"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_DIAGNOSIS_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"{run.run_id}: no diagnosis of attempt {attempt}: {error}", file=sys.stderr, flush=True)
        return
    text = done.stdout if done.returncode == 0 else f"attempt {attempt} failed: {done.stderr[-300:]}"
    print(f"{run.run_id}: diagnosis of {text.strip()}", flush=True)


def _ask_slurm(job_id: str | None) -> JobState | None:
    if job_id is None or job_id.startswith("local-"):
        return None
    try:
        return job_state(job_id)
    except SlurmError as error:
        print(f"Slurm does not answer, judging without it: {error}", file=sys.stderr)
        return None


def _view(state: JobState | None, warned: float | None = None) -> SchedulerView:
    if state is None:
        return SchedulerView()
    states = state.states
    if "COMPLETING" in states and not state.is_requeued and (row := state.ending(warned)) is not None:
        states = states | {row.sacct[0]}  # which COMPLETING hides
    return SchedulerView(states, state.preempt_time is not None, _time_left(state))


def _time_left(state: JobState) -> float | None:
    """Return the seconds left of the time limit, by slurmctld's clock; None if unknown."""
    if state.limit_at is None or state.is_requeued:
        return None
    if "RUNNING" not in state.states:
        return None if state.end_time is None else state.limit_at - state.end_time
    with suppress(SlurmError):
        return state.limit_at - controller_time()
    return None


def _what_follows(attempts: Sequence[Attempt], config: RunConfig, state: JobState | None) -> tuple[Next, str]:
    """Decide whether the run goes on after the last of `attempts`, and who restarts it."""
    if (reason := _reason_to_hold(attempts)) is not None:
        return Next.over if state is None else Next.hold, reason
    reason = reason_to_stop(attempts, config.limits, in_parts=counts_of(config.stage) == "parts")
    if reason is not None:
        return Next.over, reason
    if state is not None and state.is_requeued:
        return Next.already_requeued, "Slurm has requeued the job"
    return Next.requeue, ""


def _reason_to_hold(attempts: Sequence[Attempt]) -> str | None:
    """Return why only a person can mend what ended the last attempts; None if another try may do.

    Neither the run nor a node is at fault if two nodes give the same words, or one gives them three times.
    """
    last, alike = attempts[-1], []
    for attempt in reversed(attempts):
        if attempt.cause is not Cause.cluster or same_words(attempt.detail) != same_words(last.detail):
            break
        alike.append(attempt)
    nodes = {_node_of(attempt) for attempt in alike}
    if len(nodes) < 2 and len(alike) < _ALIKE_ON_ONE_NODE:
        return None
    return f"{last.detail}; {len(alike)} attempts on {', '.join(sorted(nodes))} ended like this"


def _node_of(attempt: Attempt) -> str:
    found = re.match(r"rank \d+ on (\S+): ", attempt.detail)
    return found[1] if found else (attempt.node_names or ("?",))[0]
