"""What runs and waits now, from squeue: the jobs a budget has promised hours to.

for job in ask_squeue(account="my-group"):
    job.gpus, job.left_s
"""

from dataclasses import dataclass

from r1hpc.base.units import limit_s
from r1hpc.slurm.client import call
from r1hpc.slurm.sacct import gpus_of

# tres-alloc is what a waiting job asks for, and unlike %b it knows --gpus. The name, last, may hold the "|".
_FIELDS = ("JobArrayID", "State", "tres-alloc", "TimeLimit", "TimeUsed", "Account", "UserName", "QOS", "Name")
_OVER = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")


@dataclass(frozen=True)
class QueuedJob:
    """One job that runs or waits; an array that waits is one for each of its tasks."""

    job_id: str
    state: str
    gpus: int
    time_limit_s: int | None
    """None: it has none."""
    elapsed_s: int
    account: str
    user: str
    qos: str
    job_name: str

    @property
    def is_pending(self) -> bool:
        return self.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")

    @property
    def used(self) -> float:
        """GPU-hours of this attempt so far."""
        return self.gpus * self.elapsed_s / 3600

    @property
    def most_left(self) -> float | None:
        """GPU-hours until its time limit."""
        if self.time_limit_s is None:
            return None
        return self.gpus * max(0, self.time_limit_s - self.elapsed_s) / 3600


def ask_squeue(
    account: str | None = None, user: str | None = None, timeout_s: float = 10.0
) -> list[QueuedJob]:
    """The jobs of an account, of a user, or of everybody.

    Raises:
        SlurmError: squeue or slurmctld did not answer.
    """
    argv = ["squeue", "-h", "-r", "-a", "-O", ",".join(f"{field}:|" for field in _FIELDS)]
    argv += [f"-A{account}"] if account else []
    argv += [f"-u{user}"] if user else []
    return read_squeue(call(argv, timeout_s))


def read_squeue(text: str) -> list[QueuedJob]:
    """The jobs that squeue printed in the columns above; one that is over and still listed is left out."""
    rows = [line.rstrip().removesuffix("|").split("|", len(_FIELDS) - 1) for line in text.split("\n")]
    return [_job(row) for row in rows if len(row) == len(_FIELDS) and row[1] not in _OVER]


def _job(row: list[str]) -> QueuedJob:
    job_id, state, tres, limit, elapsed, account, user, qos, name = row
    return QueuedJob(
        job_id, state, gpus_of(tres), limit_s(limit), limit_s(elapsed) or 0, account, user, qos, name
    )
