"""Continue a run after an attempt: requeue its job, or submit a new one.

If the cluster forbids requeueing, the run continues in a job with another ID. The stages of its chain that
wait for the old job must wait for the new one: they would begin once the old job ended with status 0.
"""

import os
import sys
from functools import partial

from r1hpc.attempt.begin import is_stage
from r1hpc.attempt.end import CancelledError, Next, OverError, end, refuse_cancelled, take_back
from r1hpc.attempt.state.state import State, read_situation
from r1hpc.base.errors import R1hpcError, StateError
from r1hpc.base.failpoints import failpoint
from r1hpc.base.run_dir import RunDir
from r1hpc.config import load
from r1hpc.slurm import queue
from r1hpc.slurm.client import SlurmError
from r1hpc.slurm.requeue import JobState, job_state, requeue, resubmit
from r1hpc.slurm.shell.contract import REASON_FD
from r1hpc.submission.chain.file import open_definition
from r1hpc.submission.chain.folder import ChainDir
from r1hpc.telemetry.records.attempts import Cause, record


def end_and_go_on(run: RunDir, attempt: int, status: int, diagnose: bool = True) -> int:
    """Record why an attempt ended, and continue the run if it should; return the job's exit status.

    Raise CancelledError if a user has cancelled the run meanwhile, and it ends. Raise OverError if it should
    continue, but Slurm does not let it; the attempt's end says so. Raise R1hpcError if the attempt could not
    be judged, and nothing is recorded.

    Args:
        status: the exit status of srun.
        diagnose: print the diagnosis of the attempt, which takes seconds.
    """
    ended = end(run, attempt, status, diagnose)
    job = ended.attempt.job_id
    if ended.next is Next.requeue and job is not None:
        failpoint("end.requeue")
        try:
            _go_on(run, job, ended.preempt_time)
        except CancelledError:
            take_back(run, attempt, "cancelled by a user before it was requeued", Cause.cancelled)
            raise
        except R1hpcError as error:
            take_back(run, attempt, f"not requeued: {' '.join(str(error).split())}")
            raise OverError(str(error)) from error
    if ended.next is Next.hold and (left := os.environ.get(REASON_FD, "")).isdecimal():
        os.write(int(left), " ".join(ended.reason.split()).encode())
    if ended.attempt.cause is Cause.stopped and is_stage(run):
        return 1  # nothing failed, but the jobs that wait for this one must not begin
    return ended.exit_status


def _go_on(run: RunDir, job: str, warned: float | None) -> None:
    if requeue(job, check=partial(_refuse_cancelled, run, warned)):
        return
    print("the cluster does not requeue this job: submitting it again", file=sys.stderr)
    try:  # the nodes on which the job could not begin: its successor should not try them either
        excluded = job_state(job).excluded
    except SlurmError:
        excluded = ""
    new_job = resubmit(run.script, after=job, exclude=excluded)
    try:
        record(run, "resubmitted", job_id=new_job, executor="slurm")
        for job_id in move_dependents(run, new_job):
            print(f"job {job_id} waits for job {new_job} now", file=sys.stderr)
    except (R1hpcError, OSError) as error:
        # The run continues even so. A stage that still waits for the old job begins too early, and refuses
        # with a message.
        print(f"job {new_job} goes on, but a stage may still wait for job {job}: {error}", file=sys.stderr)


def _refuse_cancelled(run: RunDir, warned: float | None, state: JobState) -> None:
    """Call `refuse_cancelled`; retry, with Slurm's answer, while the run folder cannot be read."""
    try:
        refuse_cancelled(run, warned, state)
    except StateError as error:
        raise SlurmError(str(error), 0) from error


def move_dependents(run: RunDir, new_job: str) -> list[str]:
    """Make the jobs that wait for this stage wait for its new job; return their IDs."""
    chain = ChainDir(run.path.parent)
    if not chain.definition.is_file():
        return []
    moved = []
    for stage in open_definition(chain).stages:
        if run.run_id not in stage.needs:
            continue
        situation = read_situation(chain.stage(stage.name))
        if situation.state is State.queued and situation.job is not None and situation.job.is_slurm:
            needed = [chain.stage(name) for name in stage.needs if name != run.run_id]
            others = [read_situation(sister) for sister in needed if not sister.finished.exists()]
            ids = [other.job.job_id for other in others if other.job is not None and other.state.is_at_work]
            asked = load.read(chain.stage(stage.name).config).resources.dependency
            queue.move(situation.job.job_id, [new_job, *ids], asked)
            moved.append(situation.job.job_id)
    return moved
