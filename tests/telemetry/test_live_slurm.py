"""Trackers inside a Slurm job: preempted twice, and waited for at the end, when Slurm would kill them."""

from pathlib import Path

import pytest

from r1hpc.telemetry.records.attempts import Cause
from r1hpc.telemetry.records.metrics import read_steps
from tests.cluster import Cluster
from tests.commands.test_export_metrics import read_events
from tests.runs import current_step, submit, wait_attempt, wait_over, wait_step
from tests.telemetry.wandb_file import read_offline

pytest.importorskip("tensorboard", reason="TensorBoard is not installed: pip install 'r1hpc[trackers]'")
pytest.importorskip("wandb", reason="W&B is not installed: pip install 'r1hpc[trackers]'")
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]


def test_one_curve_through_two_preemptions_of_a_job(tmp_path: Path, idle_cluster: Cluster) -> None:
    size = ("train.num_steps=40", "checkpoint.save_every=1000", "train.global_batch_size=4")
    job = submit(
        tmp_path,
        "tracked",
        *("--executor", "slurm", "--qos", "scavenger", "--nodes", "1", "-t", "20"),
        *(*size, "monitor.trackers=[wandb,tensorboard]"),
        env=idle_cluster.env(R1HPC_FAILPOINT="step.begin:sleep=1::*:1,step.begin:sleep=1::*:2"),
    )
    run = job.run
    for attempt in (1, 2):
        wait_attempt(run, attempt)
        wait_step(run, current_step(run) + 3)
        idle_cluster.preempt(int(job.job_id))
    attempts = wait_over(run)
    assert [a.cause for a in attempts] == [Cause.preempted, Cause.preempted, Cause.finished]
    assert idle_cluster.wait_job(int(job.job_id)) == "COMPLETED"
    # Slurm has killed by now whatever was left of the job.
    expected = {step.global_step: step.loss for step in read_steps(run).effective.values()}
    assert list(expected) == list(range(1, 41))
    assert {n: values["train/loss"] for n, values in read_offline(run.trackers / "wandb").items()} == expected
    assert [step for step, _ in read_events(run.trackers / "tensorboard")["train/loss"]] == list(expected)
