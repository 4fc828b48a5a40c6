"""What the toolkit is for, on a real Slurm of four nodes: a disturbed run is the undisturbed run, to the bit.

    pytest tests/test_survival_slurm.py            # about five minutes on two cores

Every run here goes in through `python -m r1hpc.submit` and trains with DeepSpeed over gloo, one rank a node.
"""

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from r1hpc.base.run_dir import RunDir
from r1hpc.telemetry.records.attempts import Cause, read_history
from r1hpc.telemetry.records.metrics import read_steps
from tests.cluster import Cluster
from tests.cluster.daemons import GRACE_SECONDS
from tests.runs import (
    Submitted,
    assert_same_data,
    assert_same_run,
    current_step,
    go_on,
    is_halted,
    submit,
    wait_attempt,
    wait_over,
    wait_step,
    wait_until,
)

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900), pytest.mark.xdist_group("survival")]

_STEPS = 60
_SAVE_EVERY = 8
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


def start(cluster: Cluster, root: Path, name: str, *words: str, slow: str = "") -> Submitted:
    """Submit to the scavenger queue, whose jobs get preempted; `slow` as by `slower`."""
    environment = cluster.env(**({"R1HPC_FAILPOINT": slow} if slow else {}))
    return submit(root, name, "--executor", "slurm", "--qos", "scavenger", *words, env=environment)


def slower(seconds: float, attempt: int | str = "") -> str:
    """A failpoint: each step of the attempt, or of all, takes so much longer."""
    return f"step.begin:sleep={seconds}::*:{attempt}"


def test_three_preemptions_a_time_limit_and_a_node_failure_change_nothing(
    root: Path, cluster: Cluster, undisturbed: RunDir
) -> None:
    """The proof: float-hex equal loss, gradient norm and learning rate; each sample once; losses bounded."""
    cluster.clear()
    # Slurm warns up to 30 s early (seen), so 105 to 135 s into an attempt: what is left after four of them,
    # 41 steps or more, takes the fifth longer than that.
    limit = ("-t", "3", "resources.signal_lead_s=45")
    slow = ",".join(slower(3.6 if attempt == 5 else 0.6, attempt) for attempt in range(1, 10))
    job = start(cluster, root, "disturbed", "--nodes", "4", *limit, *_SIZE, slow=slow)
    run, job_id = job.run, int(job.job_id)
    steps = iter((3, 7, 11, 14, 17))
    while sum(a.cause is Cause.preempted for a in read_history(run).attempts) < 3:
        wait_step(run, next(steps))
        wait_until("the job to run", lambda: cluster.state(job_id) == "RUNNING", 60, run)
        begun = len(read_history(run).attempts)
        cluster.preempt(job_id)
        wait_attempt(run, begun + 1)
    wait_step(run, _SAVE_EVERY * 2 + 3)
    wait_until("the job to run", lambda: cluster.state(job_id) == "RUNNING", 60, run)
    cluster.fail_node(cluster.node_list(job_id)[-1], declare=True)
    try:
        wait_until("the node failure to be seen", lambda: cluster.state(job_id) != "RUNNING", 60, run)
    finally:
        for node in cluster.node_names:
            cluster.restore_node(node)
    attempts = wait_over(run, 400)
    causes = Counter(a.cause for a in attempts)
    timeouts = causes.pop(Cause.timeout)
    assert timeouts >= 1
    assert causes == {Cause.preempted: 3, Cause.node_fail: 1, Cause.finished: 1}
    for before, after in pairwise(attempts):
        lost = (before.last_step or 0) - (after.resumed_from or 0)
        assert lost <= (_SAVE_EVERY if before.cause is Cause.node_fail else 0), before
    assert_same_run(run, undisturbed)


def test_six_preemptions_in_a_row_without_a_hold(root: Path, cluster: Cluster) -> None:
    """Leaving cleanly inside the grace time is held at the fifth time; asking for the requeue is not."""
    cluster.clear()
    size = ("train.num_steps=60", "checkpoint.save_every=1000", "train.global_batch_size=4")
    slow = ",".join(slower(0.6, attempt) for attempt in range(1, 7))
    job = start(cluster, root, "six", "--nodes", "1", "-t", "20", *size, slow=slow)
    run, job_id = job.run, int(job.job_id)
    for attempt in range(1, 7):
        wait_attempt(run, attempt)
        before = current_step(run)
        wait_step(run, before + 2)
        cluster.preempt(job_id)
    attempts = wait_over(run, 120)
    assert [a.cause for a in attempts] == [Cause.preempted] * 6 + [Cause.finished]
    assert all(a.last_step == a.last_committed_step for a in attempts)
    assert not read_steps(run).lost

    # Slurm may start a finished run once more; so may a person.
    again = cluster.run(["sbatch", "--parsable", str(run.script)], cwd=root).stdout.strip()
    assert cluster.wait_job(int(again)) == "COMPLETED"
    assert len(wait_over(run)) == 7


@pytest.mark.soak
@pytest.mark.parametrize("zero_stage", [1, 3])
def test_ranks_that_share_their_sequences_are_preempted_and_lose_nothing(
    root: Path, cluster: Cluster, zero_stage: int
) -> None:
    cluster.clear()
    shared = ("train.sequence_parallel=2", f"deepspeed.zero_stage={zero_stage}")
    words = ("--nodes", "2", "-t", "20", "resources.ranks_per_node=2", *shared, *_SIZE)
    quiet = start(cluster, root, f"shared-{zero_stage}", *words)
    assert [a.cause for a in wait_over(quiet.run, 300)] == [Cause.finished]
    job = start(cluster, root, f"shared-{zero_stage}-preempted", *words, slow=slower(0.3))
    for attempt, step in enumerate((5, 19, 33), start=1):
        wait_step(job.run, step)
        cluster.preempt(int(job.job_id))
        wait_attempt(job.run, attempt + 1)
    attempts = wait_over(job.run, 300)
    assert [a.cause for a in attempts] == [Cause.preempted] * 3 + [Cause.finished]
    assert_same_run(job.run, quiet.run)


def test_on_four_then_two_then_three_nodes(root: Path, cluster: Cluster) -> None:
    """Identical global batches on any number of nodes; the loss of the undisturbed run but for rounding.

    In float32, in which another order of summation moves the last of seven digits (1.0e-7 seen). Bfloat16
    rounds at the third: 1.2e-3 seen at step 56 with the same stops.
    """
    cluster.clear()
    exact = "train.precision=fp32"
    words = ("--executor", "local", "resources.ranks_per_node=4", *_SIZE, exact)
    undisturbed = submit(root, "exact", *words).run
    wait_over(undisturbed, 240)
    slow = f"{slower(0.5, 1)},{slower(0.5, 2)}"
    job = start(cluster, root, "elastic", "--nodes", "4", "-t", "20", *_SIZE, exact, slow=slow)
    for attempt, (step, nodes) in enumerate(((12, "2"), (28, "3")), start=1):
        wait_attempt(job.run, attempt)
        wait_step(job.run, step)
        job.run.stop.touch()
        assert wait_over(job.run)[-1].cause is Cause.stopped
        job = start(cluster, root, "elastic", "--resume", "--nodes", nodes, slow=slow)
    attempts = wait_over(job.run, 240)
    assert [a.nodes for a in attempts] == [4, 2, 3]
    assert attempts[-1].cause is Cause.finished
    assert_same_data(job.run, undisturbed)
    theirs = read_steps(undisturbed).column("loss")
    ours = read_steps(job.run).column("loss")
    assert max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True)) < 1e-5


def test_the_older_of_two_incarnations_is_refused(root: Path, cluster: Cluster) -> None:
    """slurmd dies and its tasks live on, while Slurm starts the job elsewhere under the same id."""
    cluster.clear()
    size = ("train.num_steps=60", "checkpoint.save_every=10", "train.global_batch_size=4")
    job = start(cluster, root, "twice", "--nodes", "1", "-t", "20", *size, slow=slower(2.0, 1))
    run, job_id = job.run, int(job.job_id)
    wait_step(run, 12)
    lonely = cluster.node_list(job_id)[0]
    cluster.fail_node(lonely, how="slurmd", declare=True)
    try:
        wait_attempt(run, 2)
        log = run.rank_log(1, 0)
        wait_until("the older incarnation's refusal", lambda: "has taken over" in log.read_text(), 120, run)
        attempts = wait_over(run, 180)
    finally:
        cluster.restore_node(lonely)
    assert [a.cause for a in attempts] == [Cause.node_fail, Cause.finished]
    assert attempts[1].job_id == str(job_id)
    # The run's own word comes first; slurmctld and slurmdbd hear of it a little later.
    wait_until("COMPLETED by sacct", lambda: cluster.sacct(job_id)[-1]["State"] == "COMPLETED", 60, run)


_HELD = {"R1HPC_FAILPOINT": "step.begin:sleep=0.2::*,end.requeue:stop:::1"}
"""`launch end` halts between the verdict on attempt 1, which is on record then, and its requeue."""


def preempt_held(root: Path, cluster: Cluster, name: str) -> Submitted:
    """A run whose attempt 1 was preempted and whose requeue has not been asked for yet."""
    size = ("train.num_steps=60", "checkpoint.save_every=1000", "train.global_batch_size=4")
    words = ("--executor", "slurm", "--qos", "scavenger", "--nodes", "1", "-t", "20", *size)
    job = submit(root, name, *words, env=cluster.env(**_HELD))
    wait_step(job.run, 3)
    cluster.preempt(int(job.job_id))
    wait_until("verdict", lambda: read_history(job.run).attempts[0].cause is not None, 60, job.run)
    assert read_history(job.run).attempts[0].requeued
    wait_until("the end to halt", lambda: is_halted(job.run), 60, job.run)
    return job


@pytest.fixture
def patient_cluster(cluster: Cluster) -> Iterator[Cluster]:
    """Whose grace is long enough for a test to act in."""
    cluster.clear()
    cluster.set_grace(120)
    yield cluster
    cluster.set_grace(GRACE_SECONDS)


def test_a_crash_of_slurmctld_does_not_cost_the_requeue(root: Path, patient_cluster: Cluster) -> None:
    """Killed when the run is about to ask, and back when it has asked twice: neither answer is final."""
    cluster = patient_cluster
    job = preempt_held(root, cluster, "crashed-controller")
    run, log = job.run, job.run.logs / f"slurm-{job.job_id}.out"
    cluster.kill_controller()
    try:
        go_on(run)
        wait_until("second try", lambda: log.read_text().count("trying again") >= 2, 90, run)
    finally:
        cluster.start_controller()
    attempts = wait_over(run, 180)
    assert [a.cause for a in attempts] == [Cause.preempted, Cause.finished]
    assert not read_steps(run).lost


def test_a_cancel_between_verdict_and_requeue_is_not_undone(root: Path, patient_cluster: Cluster) -> None:
    """Slurm would requeue a job that is being cancelled."""
    cluster = patient_cluster
    job = preempt_held(root, cluster, "late-cancel")
    cluster.cancel(int(job.job_id))
    go_on(job.run)
    attempts = wait_over(job.run, 60)
    assert [(a.cause, a.requeued) for a in attempts] == [(Cause.cancelled, False)]
    assert cluster.wait_job(int(job.job_id)) == "CANCELLED"
    assert cluster.job(int(job.job_id))["Restarts"] == "0"


@pytest.mark.soak
def test_a_step_longer_than_the_warning_is_requeued_all_the_same(root: Path, cluster: Cluster) -> None:
    """Busy when the limit strikes: the script leaves the ranks behind and asks for the requeue itself."""
    cluster.clear()
    size = ("train.num_steps=6", "checkpoint.save_every=1", "train.global_batch_size=4")
    # The fifth step of an attempt takes 300 s; the second attempt has only two to do.
    slow = cluster.env(R1HPC_FAILPOINT="step.begin:sleep=300::5")
    words = ("--executor", "slurm", "--nodes", "1", "-t", "1", "resources.signal_lead_s=20", *size)
    run = submit(root, "overrun", *words, env=slow).run
    attempts = wait_over(run, 300)
    assert [a.cause for a in attempts] == [Cause.timeout, Cause.finished]
    assert not attempts[0].inferred


def test_a_cancelled_run_stays_cancelled(root: Path, cluster: Cluster) -> None:
    """scancel from outside: the ranks save, and the script does not bring the job back."""
    cluster.clear()
    job = start(
        cluster, root, "cancelled", "--nodes", "1", "-t", "20", "train.num_steps=400", slow=slower(0.2)
    )
    wait_step(job.run, 3)
    cluster.cancel(int(job.job_id))
    attempts = wait_over(job.run, 90)
    assert [a.cause for a in attempts] == [Cause.cancelled]
    assert cluster.wait_job(int(job.job_id)) == "CANCELLED"
    assert attempts[0].last_committed_step == attempts[0].last_step
