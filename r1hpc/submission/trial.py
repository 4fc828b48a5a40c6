"""What Slurm says to a job that is only planned: a dry run is refused as the submission would be.

said = show_to_slurm(planned)    # said.sentence: "as its queue stands, Slurm would start this at ..."
"""

from r1hpc.slurm.decide import slurm_is_here
from r1hpc.slurm.sbatch import Trial, try_out
from r1hpc.slurm.script import render
from r1hpc.submission.plan_run import PlannedRun


def show_to_slurm(planned: PlannedRun) -> Trial | None:
    """None where the job is not for Slurm, or there is no Slurm here.

    Raises:
        SlurmError: sbatch would refuse the job.
    """
    if planned.executor != "slurm" or not slurm_is_here():
        return None
    return try_out(render(planned.script))
