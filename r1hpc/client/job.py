"""Tell a script about its rank, as JSON in the environment: script/rank.py writes it, the client reads it.

The files by which the script answers are named here too.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from r1hpc.base.run_dir import RunDir

if TYPE_CHECKING:
    from r1hpc.attempt.workload import RankJob

JOB = "R1HPC_CLIENT"
PID = "R1HPC_CLIENT_PID"
"""The script's own process, as opposed to its children."""


@dataclass(frozen=True)
class Job:
    """One rank of one attempt, for its script."""

    run: str
    attempt: int
    token: str
    rank: int
    world_size: int
    local_rank: int
    num_nodes: int
    keep: int
    save_every: int
    deadlines: dict[str, float | None]
    """Fields of attempt.control.stop.Deadlines. time.monotonic() is the same for all processes of a node."""

    checkpoints: str | None = None
    """Absolute pattern of the checkpoints that the script writes by itself. None: it has none."""
    seed: int | None = None
    """Start of the random streams, the same in every attempt."""
    library: str = ""
    """The library that leads the training, as far as a look at the script can tell."""

    @staticmethod
    def of(
        job: "RankJob", checkpoints: str | None = None, seed: int | None = None, library: str = ""
    ) -> "Job":
        """Return what a rank's program must know of its job."""
        config, context = job.config, job.context
        return Job(
            run=str(job.run.path),
            attempt=context.attempt,
            token=job.token,
            rank=context.rank,
            world_size=context.world_size,
            local_rank=context.local_rank,
            num_nodes=context.num_nodes,
            keep=config.checkpoint.keep,
            save_every=config.checkpoint.save_every,
            deadlines=asdict(job.requests.deadlines),
            checkpoints=checkpoints,
            seed=seed,
            library=library,
        )

    def to_environ(self) -> dict[str, str]:
        """Return the variables for the script."""
        return {JOB: json.dumps(asdict(self))}

    @staticmethod
    def current() -> "Job | None":
        """Return the job of this process; None outside a job, and in a child of the script."""
        if JOB not in os.environ or os.environ.setdefault(PID, str(os.getpid())) != str(os.getpid()):
            return None
        return Job.around()

    @staticmethod
    def around() -> "Job":
        """Return the job of the script, in its children too."""
        return Job(**json.loads(os.environ[JOB]))


def report_path(run: RunDir, attempt: int, rank: int) -> Path:
    """Return the file in which a script says how far it is: pid, kind, global_step, reason, leader."""
    return run.attempt_dir(attempt) / f"script_{rank}.json"


def unled_path(run: RunDir, attempt: int, rank: int) -> Path:
    """Return the file that exists once a step was taken that r1hpc does not lead (client/unled.py)."""
    return run.attempt_dir(attempt) / f"unled_{rank}.json"
