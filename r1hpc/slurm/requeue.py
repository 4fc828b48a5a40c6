"""Ask Slurm about a job's state, and requeue or resubmit it.

`scontrol requeue` during the warning restarts a job every time, while exiting with status 0 counts towards
MaxBatchRequeue and ends in a hold (seen with Slurm 24.11). If Slurm requeues a job anyway, it answers a
second requeue with "job is pending": that is success.

A plain requeue also revives a job that its user cancelled a moment before (_job_requeue_op() in
src/slurmctld/job_mgr.c, Slurm 24.11). `scontrol requeue Incomplete` accepts only a running or suspended job,
and prints nothing if it did nothing: then the job is checked once more.
"""

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from r1hpc.base.failpoints import failpoint
from r1hpc.base.units import limit_s
from r1hpc.slurm import payload
from r1hpc.slurm.client import SlurmError, call, retry
from r1hpc.slurm.shell.endings import TABLE, Ending

# squeue(1), "JOB STATE CODES".
PENDING_STATES = frozenset(
    ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
)
LIVE_STATES = PENDING_STATES | frozenset(
    ("RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")
)
REQUEUE_PATIENCE_S = 600.0
"""A controller that restarts, or switches to its backup, must not cost a run its next attempt."""
# slurmctld's final answers to a requeue: _job_requeue_op() in src/slurmctld/job_mgr.c, worded as in
# slurm_errno.c.
_ALREADY_PENDING = "job is pending execution"
_FORBIDDEN = (
    "requested operation is presently disabled",  # --no-requeue, or its partition was removed
    "invalid job id",
    "already completing or completed",
)
_REFUSED = ("access/permission denied", "only batch jobs are accepted")


@dataclass(frozen=True)
class JobState:
    """A job as shown by `scontrol show job`. Times are Unix seconds, None if unset."""

    states: frozenset[str]
    """In upper case, for example {"PENDING", "COMPLETING"}. Empty: Slurm no longer knows the job."""
    reason: str = ""
    end_time: float | None = None
    """While it runs: the end by its limit; a preemption moves this to the end of the grace time."""
    preempt_time: float | None = None
    """Set once Slurm has chosen the job to be preempted."""
    restarts: int = 0
    requeue: bool = True
    limit_at: float | None = None
    """The end of its time limit, by slurmctld's clock. A suspension moves this, a preemption does not."""
    excluded: str = ""
    """Excluded nodes, in the form of --exclude."""
    required: str = ""
    """Required nodes, in the form of --nodelist."""
    comment: str = ""

    @property
    def live(self) -> bool:
        """True if it waits, runs or is ending."""
        return bool(self.states & LIVE_STATES)

    @property
    def pending(self) -> bool:
        """True if it will start (again), unless it is held."""
        return bool(self.states & PENDING_STATES)

    @property
    def is_requeued(self) -> bool:
        """True if Slurm will run the job again anyway: it counts a restart that this process has not had."""
        return self.pending or self.restarts > int(os.environ.get("SLURM_RESTART_COUNT") or 0)

    def ending(self, warned: float | None = None) -> Ending | None:
        """Return its row of the table; None if Slurm is not ending it.

        Args:
            warned: PreemptTime while the job ran: a scancel in that second is no end of a grace.
        """
        at_grace_end = self.preempt_time is not None and self.preempt_time == self.end_time != warned
        for row in TABLE:
            is_state = not self.states.isdisjoint(row.job_states)
            if is_state and fnmatchcase(self.reason, row.reason) and (at_grace_end or not row.at_grace_end):
                return row
        return None


def job_state(job_id: str, timeout_s: float = 10.0) -> JobState:
    """Return the state of one job; no states if Slurm has forgotten it (MinJobAge after its end). Raise
    SlurmError if slurmctld does not answer."""
    try:
        text = call(["scontrol", "show", "job", "-o", job_id], timeout_s)
    except SlurmError as error:
        if "Invalid job id" in error.stderr + error.stdout:
            return JobState(frozenset())
        raise
    return parse_job(text)


def controller_time() -> float:
    """Read slurmctld's clock, in Unix seconds; raise SlurmError if it does not answer.

    RunTime and time left of a running job are unreliable: scontrol and squeue count them by their own host's
    clock, and print INVALID if that is behind (Slurm 24.11).
    """
    said = call(["scontrol", "show", "config"], 10.0)
    found = re.search(r"^Configuration data as of (\d+)", said, re.MULTILINE)
    return float(found[1]) if found else time.time()


def parse_job(text: str) -> JobState:
    """Parse the output of `scontrol show job -o` (of an array: its first line)."""
    line = text.splitlines()[0] if text.strip() else ""
    # The user chose the name, which comes before the other fields and may look like them; cut it off.
    fields = line.partition(" UserId=")[2]
    if not fields:
        return JobState(frozenset())
    limit, began = limit_s(_field(fields, "TimeLimit")), _time(_field(fields, "StartTime"))
    resumed = _time(_field(fields, "SuspendTime"))
    if resumed is not None:
        began = resumed - int(_field(fields, "SecsPreSuspend") or 0)
    return JobState(
        states=frozenset(re.split(r"[,+]", _field(fields, "JobState"))),
        reason=_field(fields, "Reason"),
        end_time=_time(_field(fields, "EndTime")),
        preempt_time=_time(_field(fields, "PreemptTime")),
        restarts=int(_field(fields, "Restarts") or 0),
        requeue=_field(fields, "Requeue") == "1",
        limit_at=None if limit is None or began is None else began + limit,
        excluded=_field(fields, "ExcNodeList").replace("(null)", ""),
        required=_field(fields, "ReqNodeList").replace("(null)", ""),
        comment=comment[1] if (comment := re.search(r" Comment=(.*?)(?: \w+=|$)", fields)) else "",
    )


def requeue(
    job_id: str,
    check: Callable[[JobState], None] = lambda state: None,
    patience_s: float = REQUEUE_PATIENCE_S,
) -> bool:
    """Make Slurm run the job again under the same id; True if it will.

    False: the cluster or the job forbids it (JobRequeue=0, --no-requeue), or Slurm no longer knows the job;
    then `resubmit`. Called from inside the job this ends the job: the caller gets SIGTERM soon after.

    After any other answer it asks again: a restarting controller answers, among others, "Unexpected message
    received". Raise SlurmError if Slurm refuses for good, or for `patience_s` seconds gives no final answer.
    `check` checks the job before each request. A SlurmError that it raises counts as that request's answer;
    any other error cancels the requeue.
    """

    def ask() -> None:
        state = job_state(job_id)
        check(state)
        if state.is_requeued:  # as before, or by a request whose answer was lost; a later scancel counts
            return
        failpoint("requeue.ask")
        if not state.live or "COMPLETING" in state.states:  # its limit is over; a scancel changes nothing now
            call(["scontrol", "requeue", job_id], 20.0)
            return
        call(["scontrol", "requeue", "Incomplete", job_id], 20.0)
        if not job_state(job_id).is_requeued:
            raise SlurmError(f"job {job_id} ended just before it could be requeued", 0)

    try:
        retry(ask, _is_final, patience_s)
    except SlurmError as error:
        if _says(error, (_ALREADY_PENDING,)):
            return True
        if _says(error, _FORBIDDEN):
            return False
        raise
    return True


def resubmit(script: Path, after: str | None = None, exclude: str = "") -> str:
    """Submit a run's job.sh as a new job, if the cluster does not allow requeueing; return its id.

    The run's submitit payload is copied for it. `after` is a job that must have ended first (the calling
    one), `exclude` are nodes that the new job may not have. Raise StateError if the payload was planted by
    somebody else, or sbatch answers with no job id; SlurmError if sbatch refuses, or slurmctld does not
    answer for REQUEUE_PATIENCE_S.
    """
    from r1hpc.slurm.sbatch import LostSubmissionError, sbatch  # reading a job's state needs neither

    options = [f"--dependency=afterany:{after}"] if after else []
    options += [f"--exclude={exclude}"] if exclude else []
    new_id = retry(
        lambda: sbatch(script, script.parent, options),
        lambda error: not error.unreachable or isinstance(error, LostSubmissionError),
        REQUEUE_PATIENCE_S,
    )
    payload.carry_over(script.parent, new_id)
    return new_id


def _is_final(error: SlurmError) -> bool:
    """True if this answer to a requeue will stay the same."""
    is_command_missing = error.exit_code is None and not error.timed_out
    return is_command_missing or _says(error, (_ALREADY_PENDING, *_FORBIDDEN, *_REFUSED))


def _says(error: SlurmError, answers: tuple[str, ...]) -> bool:
    said = f"{error.stdout} {error.stderr}".lower()
    return any(words in said for words in answers)


def _field(fields: str, name: str) -> str:
    found = re.search(rf"(?:^| ){name}=(\S*)", fields)
    return found[1] if found else ""


def _time(text: str) -> float | None:
    return float(text) if re.fullmatch(r"[1-9]\d*", text) else None
