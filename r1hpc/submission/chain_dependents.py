"""Stages whose jobs wait for a job that goes on as another one.

    job_ids = move_dependents(run, "77")      # what waited for the run's job waits for job 77

Called from inside the old job, on clusters that forbid requeueing: once it has ended with status 0 the next
stage would begin.
"""

from r1hpc.attempt.state import State, look
from r1hpc.base.rundir import RunDir
from r1hpc.config import load
from r1hpc.slurm import dependency
from r1hpc.submission.chain_file import open_definition
from r1hpc.submission.chain_folder import ChainDir


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
