"""Preempt a run on a real Slurm and show that nothing is lost: `make demo-slurm`, as root on Debian.

    python -m research.demo_slurm        # a few minutes; the runs are in runs/slurm and runs/slurm-twin

It starts the four-node Slurm of the tests on this machine, and ends it. Two runs train on two nodes each.
A job of a higher QOS takes the nodes of one of them; Slurm starts it again as soon as there are nodes.
"""

import os
import time
from collections.abc import Sequence

from r1hpc import Run
from r1hpc.attempt.state.state import State
from r1hpc.base.cli import ArgumentParser, run_command
from r1hpc.base.errors import R1hpcError
from r1hpc.base.find_run import run_root_of
from research.demo import command, current_step, free_name
from tests.cluster import Cluster

_JOB = ("jobs/smoke.yaml", "--nodes", "2", "train.num_steps=600", "checkpoint.save_every=200")
_PREEMPT_AT = 60
_PATIENCE_S = 600


def main(argv: Sequence[str]) -> int:
    ArgumentParser(prog="python -m research.demo_slurm", description=__doc__).parse_args(argv)
    root = run_root_of(None)
    name = free_name(root, "slurm")
    print("Start a Slurm of four nodes on this machine.\n", flush=True)
    with Cluster() as cluster:
        os.environ.update(cluster.env(OMP_NUM_THREADS="1"))
        command("submit", *_JOB, "--run-name", f"{name}-twin", is_shown=False)
        command("submit", *_JOB, "--run-name", name, "--qos", "scavenger", is_shown=False)
        run, twin = Run(root / name), Run(root / f"{name}-twin")
        job_id = _wait_for_step(run)
        print(
            f"Step {current_step(run.folder)} of {name}. A job of QOS urgent takes its nodes.\n", flush=True
        )
        cluster.preempt(int(job_id))
        for each in (run, twin):
            if (state := each.wait(_PATIENCE_S)) is not State.finished:
                raise R1hpcError(f"{each.run_id} is {state}. See: r1hpc logs {each.path}")
        command("status", name)
        command("report", name)
        command("report", "--compare", name, twin.run_id)
    print("Your own queue does the same: r1hpc drill jobs/smoke.yaml")
    return 0


def _wait_for_step(run: Run) -> str:
    """Wait until the run is well under way; return its job ID."""
    deadline = time.monotonic() + _PATIENCE_S
    while current_step(run.folder) < _PREEMPT_AT:
        if time.monotonic() > deadline:
            raise R1hpcError(f"{run.run_id} is slow to start. See: r1hpc logs {run.path}")
        time.sleep(0.5)
    job = run.situation().job
    assert job is not None
    return job.job_id


if __name__ == "__main__":
    run_command(main)
