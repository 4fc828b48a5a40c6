"""The job in which a run goes on once an attempt of it has ended: the same one requeued, or a new one.

    status = end_and_go_on(run, attempt=2, status=0)     # on the batch host, the last that the job does
    job_ids = move_dependents(run, "77")                 # what waited for the run's job waits for job 77

Where the cluster forbids requeueing, the run goes on in a job of another id, and the stages of its chain that
wait for the old one must wait for that: once the old job has ended with status 0 they would begin.
"""

import sys
from functools import partial

from r1hpc.attempt.end import CancelledError, Next, end, refuse_cancelled, take_back
from r1hpc.attempt.needs import is_stage
from r1hpc.attempt.state import State, look
from r1hpc.base.errors import R1hpcError
from r1hpc.base.failpoints import failpoint
from r1hpc.base.rundir import RunDir
from r1hpc.config import load
from r1hpc.slurm import dependency
from r1hpc.slurm.client import SlurmError
from r1hpc.slurm.requeue import requeue, resubmit
from r1hpc.submission.chain_file import open_definition
from r1hpc.submission.chain_folder import ChainDir
from r1hpc.telemetry.attempts import Cause, record


def end_and_go_on(run: RunDir, attempt: int, status: int) -> int:
    """Name the cause of an attempt's end, go on where there is a next one; the job's exit status.

    Args:
        status: what srun exited with.

    Raises:
        CancelledError: a user has cancelled the run meanwhile, and it does not go on.
        R1hpcError: it should go on, and Slurm does not let it; the attempt's end says so.
    """
    ended = end(run, attempt, status)
    job = ended.attempt.job_id
    if ended.next is Next.requeue and job is not None:
        failpoint("end.requeue")
        try:
            _go_on(run, job)
        except CancelledError:
            take_back(run, attempt, "cancelled by a user before it was requeued", Cause.cancelled)
            raise
        except R1hpcError as error:
            take_back(run, attempt, f"not requeued: {' '.join(str(error).split())}")
            raise
    if ended.attempt.cause is Cause.stopped and is_stage(run):
        return 1  # nothing failed, but the jobs that wait for this one must not begin
    return ended.exit_status


def _go_on(run: RunDir, job: str) -> None:
    """Requeue the job, or submit the run again where the cluster forbids that."""
    if requeue(job, before=partial(refuse_cancelled, run, job)):
        return
    print("the cluster does not requeue this job: submitting it again", file=sys.stderr)
    new_job = resubmit(run.script, after=job)
    record(run, "resubmitted", job_id=new_job, executor="slurm")
    try:
        for job_id in move_dependents(run, new_job):
            print(f"job {job_id} waits for job {new_job} now", file=sys.stderr)
    except SlurmError as error:  # then the next stage begins too early, refuses, and says so
        print(f"a stage that waits for this one still waits for the old job: {error}", file=sys.stderr)


def move_dependents(run: RunDir, new_job: str) -> list[str]:
    """Have the jobs that wait for this stage wait for the one in which it goes on; their ids."""
    chain = ChainDir(run.path.parent)
    if not chain.definition.is_file():
        return []
    moved = []
    for stage in open_definition(chain).stages:
        if run.run_id not in stage.needs:
            continue
        situation = look(chain.stage(stage.name))
        if situation.state is State.queued and situation.job is not None and situation.job.is_slurm:
            needed = [chain.stage(name) for name in stage.needs if name != run.run_id]
            others = [look(sister) for sister in needed if not sister.finished.exists()]
            ids = [other.job.job_id for other in others if other.job is not None and other.state.is_at_work]
            asked = load.read(chain.stage(stage.name).config).resources.dependency
            dependency.move(situation.job.job_id, [new_job, *ids], asked)
            moved.append(situation.job.job_id)
    return moved
