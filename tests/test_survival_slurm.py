"""What the toolkit is for, on a real Slurm of four nodes: a disturbed run is the undisturbed run, to the bit.

    pytest tests/test_survival_slurm.py            # about five minutes on two cores

Every run here goes in through `python -m r1hpc.submit` and trains with DeepSpeed over gloo, one rank a node.
"""

from pathlib import Path

import pytest

from r1hpc.base.rundir import RunDir
from r1hpc.telemetry.attempts import Cause
from r1hpc.telemetry.metrics import compare, read_steps
from tests.cluster import Cluster
from tests.runs import (
    Submitted,
    assert_same_data,
    assert_same_run,
    current_step,
    submit,
    wait_attempt,
    wait_over,
    wait_step,
    wait_until,
)

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

_STEPS = 120
_SAVE_EVERY = 20
_SIZE = (f"train.num_steps={_STEPS}", f"checkpoint.save_every={_SAVE_EVERY}")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run root, so that the dataset is built once."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def undisturbed(root: Path, cluster: Cluster) -> RunDir:
    """The run that nobody touches, on four nodes."""
    cluster.clear()
    quiet = start(cluster, root, "undisturbed", "--nodes", "4", "-t", "20", *_SIZE)
    assert [a.cause for a in wait_over(quiet.run, 240)] == [Cause.finished]
    return quiet.run


def start(cluster: Cluster, root: Path, name: str, *words: str, slow_s: float = 0) -> Submitted:
    """Submit to the scavenger queue, whose jobs get preempted; each step takes `slow_s` longer."""
    slow = {"R1HPC_FAILPOINT": f"step.begin:sleep={slow_s}::*"} if slow_s else {}
    environment = cluster.env(**slow)
    return submit(root, name, "--executor", "slurm", "--qos", "scavenger", *words, env=environment)


def test_three_preemptions_a_time_limit_and_a_node_failure_change_nothing(
    root: Path, cluster: Cluster, undisturbed: RunDir
) -> None:
    """The proof: float-hex equal loss, gradient norm and learning rate; each sample once; losses bounded."""
    cluster.clear()
    # Slurm's shortest limit that leaves time to work: the warning comes 60 s before its end.
    limit = ("-t", "2", "resources.signal_lead_s=60")
    job = start(cluster, root, "disturbed", "--nodes", "4", *limit, *_SIZE, slow_s=0.6)
    run, job_id = job.run, int(job.job_id)
    for attempt, step in ((1, 12), (2, 31), (3, 47)):
        wait_attempt(run, attempt)
        wait_step(run, step)
        cluster.preempt(job_id)
    wait_attempt(run, 4)
    wait_step(run, _SAVE_EVERY * 3 + 5)
    cluster.fail_node(cluster.node_list(job_id)[-1], declare=True)
    try:
        wait_until("the node failure to be seen", lambda: cluster.state(job_id) != "RUNNING", 60, run)
    finally:
        for node in cluster.node_names:
            cluster.restore_node(node)
    attempts = wait_over(run, 400)
    expected = [Cause.preempted] * 3 + [Cause.node_fail, Cause.timeout, Cause.finished]
    assert [a.cause for a in attempts] == expected, attempts
    for before, after in zip(attempts, attempts[1:], strict=False):
        assert before.last_step is not None
        lost = before.last_step - (after.resumed_from or 0)
        assert lost == 0 if before.cause in (Cause.preempted, Cause.timeout) else lost <= _SAVE_EVERY
    assert_same_run(run, undisturbed)
