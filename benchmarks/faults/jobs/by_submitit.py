"""The plain loop as submitit's Checkpointable, submitted by its executor."""

import sys
from pathlib import Path

from submitit import AutoExecutor
from submitit.helpers import Checkpointable

from benchmarks.faults.jobs.by_plain import train


class Training(Checkpointable):  # type: ignore[misc]
    """After a signal submitit pickles the arguments again and requeues; the loop finds its checkpoint."""

    def __call__(self, out: str) -> None:
        train(Path(out))


def main(out: str, minutes: int) -> None:
    """Submit."""
    executor = AutoExecutor(folder=f"{out}/submitit", cluster="slurm", slurm_max_num_timeout=10)
    executor.update_parameters(timeout_min=minutes, mem_gb=40, slurm_qos="scavenger", slurm_signal_delay_s=30)
    executor.submit(Training(), out)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
