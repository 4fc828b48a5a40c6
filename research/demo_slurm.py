"""Preempt a run on a real Slurm and show that nothing is lost: `make demo-slurm`, as root on Debian.

    python -m research.demo_slurm        # two minutes or three; the runs are runs/slurm and runs/slurm-twin

It starts the four-node Slurm of the tests on this machine, and ends it. Two runs train on two nodes each.
A job of a higher QOS takes the nodes of one; Slurm starts the run again as soon as they are free.
"""

import os
import time
from collections.abc import Sequence

from r1hpc import Run
from r1hpc.attempt.state.state import State
from r1hpc.base.cli import ArgumentParser, run_command
from r1hpc.base.errors import R1hpcError
from r1hpc.base.run_dir import run_root_of
from research.demo import command, current_step, free_name
from tests.cluster import Cluster

_JOB = ("jobs/smoke.yaml", "--nodes", "2", "--exclusive", "train.num_steps=200", "checkpoint.save_every=80")
_PREEMPT_AT = 40
_PATIENCE_S = 600.0


def main(argv: Sequence[str]) -> int:
    ArgumentParser(prog="python -m research.demo_slurm", description=__doc__).parse_args(argv)
    root = run_root_of(None)
    name = free_name(root, "slurm")
    print("A Slurm of four nodes starts on this machine.\n", flush=True)
    with Cluster() as cluster:
        os.environ.update(cluster.env(OMP_NUM_THREADS="1"))
        command("submit", *_JOB, "--run-name", f"{name}-twin", is_shown=False)
        command("submit", *_JOB, "--run-name", name, "--qos", "scavenger", is_shown=False)
        run, twin = Run(root / name), Run(root / f"{name}-twin")
        job_id = _wait_for_step(run)
        print(
            f"{name} is at step {current_step(run.folder)}. A job of QOS urgent takes its nodes.\n",
            flush=True,
        )
        cluster.preempt(int(job_id))
        for each in (run, twin):
            if (state := each.wait(_PATIENCE_S)) is not State.finished:
                raise R1hpcError(f"{each.run_id} is {state}. See: r1hpc logs {each.path}")
        command("status", name)
        command("report", "--compare", name, twin.run_id)
        command("report", name)
    print("The same proof on your cluster: r1hpc drill jobs/smoke.yaml")
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
