"""Play on a real Slurm what `make test` shows: runs preempted by a higher queue lose nothing.

One trains (DeepSpeed over gloo, two nodes) beside its undisturbed twin; one is a ninth stage from another
package (tests/toy_stage.py).
"""

from pathlib import Path

import pytest

from r1hpc.telemetry.records.attempts import Cause
from r1hpc.telemetry.records.metrics import read_steps
from tests.cluster import Cluster
from tests.runs import (
    assert_same_run,
    command_output,
    submit,
    wait_over,
    wait_step,
    wait_until,
)
from tests.toy_package import install_toy, write_toy_job

pytestmark = [pytest.mark.slurm, pytest.mark.scene, pytest.mark.timeout(600)]

_WORDS = ("--executor", "slurm", "--nodes", "2", "-t", "20", "train.num_steps=30", "checkpoint.save_every=12")


def test_a_preempted_run_equals_its_undisturbed_twin(idle_cluster: Cluster, tmp_path: Path) -> None:
    quiet = submit(tmp_path, "quiet", *_WORDS, env=idle_cluster.env())
    slow = idle_cluster.env(R1HPC_FAILPOINT="step.begin:sleep=0.5::*:1")
    run = submit(tmp_path, "preempted", *_WORDS, "--qos", "scavenger", env=slow)
    wait_step(run.run, 5)
    idle_cluster.preempt(int(run.job_id))
    assert [a.cause for a in wait_over(run.run)] == [Cause.preempted, Cause.finished]
    assert [a.cause for a in wait_over(quiet.run)] == [Cause.finished]
    assert not read_steps(run.run).lost
    assert_same_run(run.run, quiet.run)


def test_a_stage_of_another_package_is_preempted_and_goes_on(idle_cluster: Cluster, tmp_path: Path) -> None:
    setup = install_toy(tmp_path / "site")
    job = write_toy_job(tmp_path / "toy.yaml", count=60, pause_s=0.2, nodes=2, setup=setup)
    words = ("--executor", "slurm", "-t", "20", "--qos", "scavenger")
    toy = submit(
        tmp_path, "toy", *words, job=str(job), env=idle_cluster.env(PYTHONPATH=str(tmp_path / "site"))
    )
    wait_until("counting", lambda: (toy.run.path / "counted-1.json").exists(), 120, toy.run)
    idle_cluster.preempt(int(toy.job_id))
    assert [a.cause for a in wait_over(toy.run)] == [Cause.preempted, Cause.finished]
    shown = command_output(
        ["-m", "r1hpc.report", str(toy.run.path)], idle_cluster.env(PYTHONPATH=str(tmp_path / "site"))
    )
    assert "counted 60, 60" in shown
