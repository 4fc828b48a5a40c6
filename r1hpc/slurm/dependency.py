"""Jobs that wait for other jobs, and jobs found again by the folder they start in.

options = after_all_ok(["12", "13"])     # {"dependency": "afterok:12:13", "kill-on-invalid-dep": "yes"}
move("14", ["15"])                       # job 14 now waits for job 15
jobs_by_folder()                         # {Path("/scratch/runs/r1/sft"): ["12"]}
"""

from collections.abc import Sequence
from pathlib import Path

from r1hpc.slurm import fields
from r1hpc.slurm.client import call


def after_all_ok(job_ids: Sequence[str], also: str | None = None) -> dict[str, str]:
    """sbatch options of a job that may begin once all of `job_ids` have left with status 0.

    A job one of whose predecessors failed is cancelled by Slurm rather than left to wait for ever.

    Args:
        also: a dependency asked for by a person, which stays in force.
    """
    if not job_ids:
        return {}
    ours = "afterok:" + ":".join(job_ids)
    return {
        "dependency": fields.check("dependency", f"{also},{ours}" if also else ours),
        "kill-on-invalid-dep": "yes",
    }


def move(job_id: str, after: Sequence[str], also: str | None = None) -> None:
    """Have a waiting job wait for other jobs than before.

    Args:
        also: a dependency asked for by a person, which stays in force.

    Raises:
        SlurmError: it does not wait any more, or slurmctld did not answer.
    """
    options = after_all_ok(after, also)
    call(["scontrol", "update", f"JobId={job_id}", f"Dependency={options['dependency']}"], 20.0)


def jobs_by_folder(all_states: bool = False) -> dict[Path, list[str]]:
    """The folder each of the caller's waiting and running jobs starts in, and its jobs' ids.

    Every job of a run starts in the run's folder, so this finds a job whose submission was cut off before its
    id could be written down.

    Args:
        all_states: also jobs that have ended, as long as slurmctld remembers them (MinJobAge).

    Raises:
        SlurmError: slurmctld did not answer.
    """
    # The folder last: it may hold spaces.
    states = ["-t", "all"] if all_states else []
    lines = call(["squeue", "--me", "-h", "-o", "%A %Z", "-a", *states], 20.0).splitlines()
    found: dict[Path, list[str]] = {}
    for line in lines:
        job_id, _, folder = line.strip().partition(" ")
        found.setdefault(Path(folder), []).append(job_id)
    return found
