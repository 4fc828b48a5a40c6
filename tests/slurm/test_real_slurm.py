"""The slurm package against a real cluster: four nodes of four GPUs, preemption by QOS."""

import os
import threading
import time
from pathlib import Path

import pytest

from r1hpc.base.run_dir import RunDir
from r1hpc.config.schema.cluster import ResourcesConfig
from r1hpc.config.schema.run import RunConfig
from r1hpc.slurm import payload, submitit_job
from r1hpc.slurm.probe import probe_cluster
from r1hpc.slurm.requeue import JobState, controller_time, job_state, requeue
from r1hpc.slurm.sacct import sacct_records
from r1hpc.slurm.script import make_script, render
from tests.cluster import Cluster
from tests.cluster.processes import until

pytestmark = pytest.mark.slurm


@pytest.fixture
def on_cluster(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    for name, value in cluster.env().items():
        monkeypatch.setenv(name, value)
    return cluster


def entry(run_dir: str) -> None:
    """What each rank runs here: note who it is."""
    rank = os.environ["SLURM_PROCID"]
    words = [
        os.environ.get(name, "") for name in ("SLURM_LOCALID", "OMP_NUM_THREADS", "HF_TOKEN", "R1HPC_ATTEMPT")
    ]
    (Path(run_dir) / f"rank_{rank}.txt").write_text(" ".join(words))


def test_the_probe_knows_the_cluster(on_cluster: Cluster) -> None:
    facts = probe_cluster(partition="short", qos="scavenger")
    assert (facts.preempt_mode, facts.max_time_s, facts.unknown) == ("REQUEUE", 300, ())
    assert facts.gpus_per_node == 4
    assert facts.grace_s is not None
    assert facts.kill_wait_s is not None
    assert probe_cluster(qos="normal").preempt_mode == "OFF"


def test_a_submission_runs_one_task_per_rank(
    on_cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path / "run")
    run.create()
    run.config.touch()  # by which the job script knows that it sees the run folder
    run.code.mkdir(mode=0o700)
    # In place of the frozen code: this checkout, and a launcher that needs no training package.
    root = Path(__file__).parents[2]
    (run.code / "tests").symlink_to(root / "tests")
    (run.code / "r1hpc").mkdir()
    for part in (root / "r1hpc").iterdir():
        if part.name != "launch.py":
            (run.code / "r1hpc" / part.name).symlink_to(part)
    (run.code / "r1hpc" / "launch.py").write_text(
        "import sys, pathlib\n"
        "def run_rank(run_dir):\n"
        "    from tests.slurm.test_real_slurm import entry\n"
        "    entry(run_dir)\n"
        "if __name__ == '__main__':\n"
        "    run = pathlib.Path(sys.argv[2])\n"
        "    if sys.argv[1] == 'begin':\n"
        "        (run / 'logs' / 'attempt_1').mkdir()\n"
        "        print(1)\n"
        "    else:\n"
        "        (run / 'end.txt').write_text(' '.join(sys.argv[3:]))\n"
    )
    monkeypatch.setenv("HF_TOKEN", "planted")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    resources = ResourcesConfig(nodes=2, ranks_per_node=2, cpus_per_task=3, time="5", signal_lead_s=30)
    run.script.write_text(render(make_script(run, RunConfig(resources=resources))))
    job_id = submitit_job.submit(run, 4)
    assert job_id.isdigit()
    on_cluster.wait_job(int(job_id))
    log = (run.logs / f"slurm-{job_id}.out").read_text()
    assert (run.path / "end.txt").read_text() == "--attempt 1 --status 0", log
    said = [(run.path / f"rank_{rank}.txt").read_text() for rank in range(4)]
    assert said == ["0 3  1", "1 3  1", "0 3  1", "1 3  1"]
    assert all((run.logs / "attempt_1" / f"rank_{rank}.out").is_file() for rank in range(4))
    assert payload.path_of(run.path, job_id).is_file()


def test_a_requeue_is_accepted_once_and_again_and_accounted(on_cluster: Cluster) -> None:
    node = on_cluster.node_names[0]
    options = ("--time=5", f"--nodelist={node}", "--gres=gpu:1", "--output=/dev/null")
    job = on_cluster.submit("sleep 100", *options)
    on_cluster.wait_job(job, {"RUNNING"})
    state = job_state(str(job))
    assert (state.live, state.restarts) == (True, 0)
    assert state.end_time is not None
    assert state.limit_at == state.end_time
    assert abs(controller_time() - time.time()) < 5
    assert abs(state.end_time - time.time() - 300) < 30
    with on_cluster.drained(node):  # it cannot begin again before it was looked at
        assert requeue(str(job)) is True
        on_cluster.wait_job(job, {"PENDING"})
        assert requeue(str(job)) is True  # "Job is pending execution"
        assert job_state(str(job)).restarts == 1
        on_cluster.cancel(job)
    on_cluster.wait_job(job, {"CANCELLED"})
    assert job_state(str(job)).live is False
    until("REQUEUED by sacct", lambda: [r.state for r in sacct_records(str(job))][:1] == ["REQUEUED"], 60)
    records = sacct_records(str(job))
    assert records[0].gpus == 1
    assert records[0].start is not None
    assert abs(records[0].start - time.time()) < 120


def test_a_requeue_outlives_a_crash_of_slurmctld(
    on_cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    job = on_cluster.submit("sleep 100", "--time=5", "--output=/dev/null")
    on_cluster.wait_saved([job])
    back = threading.Timer(6, on_cluster.start_controller)

    def crash(state: JobState) -> None:
        """Between the first look at the job and the request."""
        if back.ident is None:
            on_cluster.kill_controller()
            back.start()

    try:
        assert requeue(str(job), check=crash) is True
    finally:
        back.join()
    assert "Unexpected message received" in capsys.readouterr().err
    assert job_state(str(job)).restarts == 1
    on_cluster.cancel(job)


def test_a_job_that_may_not_be_requeued(on_cluster: Cluster) -> None:
    job = on_cluster.submit("sleep 100", "--no-requeue", "--time=5", "--output=/dev/null")
    on_cluster.wait_job(job, {"RUNNING"})
    assert job_state(str(job)).requeue is False
    assert requeue(str(job)) is False
    on_cluster.cancel(job)


def test_slurm_does_not_know_a_job_that_never_was(on_cluster: Cluster) -> None:
    assert job_state("999999").states == frozenset()
    assert requeue("999999") is False
