"""What Slurm says to a job that is only planned: a dry run is refused as the submission would be.

notes = slurm_says(planned)      # ["as its queue stands, Slurm would start this at ..."]
"""

from r1hpc.slurm.decide import slurm_is_here
from r1hpc.slurm.sbatch import try_out
from r1hpc.slurm.script import render
from r1hpc.submission.plan_run import PlannedRun


def slurm_says(planned: PlannedRun) -> list[str]:
    """A sentence for the person; none where the job is not for Slurm, or there is no Slurm here.

    Raises:
        SlurmError: sbatch would refuse the job, for its account, QOS, partition, nodes or time.
    """
    if planned.executor != "slurm" or not slurm_is_here():
        return []
    return [try_out(render(planned.script))]
