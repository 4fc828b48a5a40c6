"""Preemptions that a real Slurm does in its two ways, with a save that takes longer than the grace.

pytest tests/test_faults_slurm.py              # about a minute on two quiet cores
"""

from pathlib import Path

import pytest

from r1hpc.checkpoint.store import CheckpointStore
from r1hpc.slurm.payload import folder_of
from r1hpc.telemetry.records.attempts import Cause
from r1hpc.telemetry.records.metrics import last_steps
from tests.cluster import Cluster
from tests.runs import assert_same_run, submit, wait_attempt, wait_over, wait_step, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

_SIZE = ("--nodes", "1", "train.num_steps=30", "checkpoint.save_every=10", "train.global_batch_size=4")


def test_a_save_longer_than_the_grace_then_the_users_signal(tmp_path: Path, idle_cluster: Cluster) -> None:
    quiet = submit(tmp_path, "quiet", *_SIZE).run
    wait_over(quiet)
    # The second save of the first attempt; time to change Slurm's settings in the second.
    faults = "step.begin:sleep=0.3::*,save.begin:sleep=120:*:2:1,step.begin:sleep=1::*:2"
    where = ("--executor", "slurm", "--qos", "scavenger", "-t", "20")
    job = submit(tmp_path, "run", *_SIZE, *where, env=idle_cluster.env(R1HPC_FAILPOINT=faults))
    run, job_id = job.run, int(job.job_id)
    wait_step(run, 12)
    # As a submitit that was killed while it wrote leaves them.
    for name in (
        f"{job_id}_submitted.pkl.save_tmp",
        f"{job_id}_0_result.pkl",
        f"{job_id}_0_result.pkl.save_tmp",
    ):
        (folder_of(run.path) / name).write_bytes(b"torn")
    idle_cluster.preempt(job_id)
    wait_attempt(run, 2)
    assert [found.step for found in CheckpointStore(run.checkpoints).list()] == [10]
    # Not before it trains: what changes Slurm's settings would meet srun as it starts the ranks.
    wait_until("its first step", lambda: last_steps(run, 1)[-1].attempt == 2, 120, run)
    idle_cluster.set_user_signal(True)
    try:
        wait_until("the job to run", lambda: idle_cluster.state(job_id) == "RUNNING", 60, run)
        idle_cluster.preempt(job_id)
        attempts = wait_over(run, 180)
    finally:
        idle_cluster.set_user_signal(False)
    assert [a.cause for a in attempts] == [Cause.preempted, Cause.preempted, Cause.finished]
    assert [a.resumed_from for a in attempts] == [None, 10, attempts[1].last_step]
    assert "SIGUSR2" in run.rank_log(2, 0).read_text()
    assert_same_run(run, quiet)
