"""GPU-hours of a real Slurm with every way a job can end, against `sacct -D` added up by hand.

    pytest tests/accounting/test_accounting_slurm.py       # two minutes, of which one is a time limit

The cluster's nodes have four GPUs each as far as Slurm knows. The run trains on CPU ranks inside an
allocation of GPUs, which costs what it holds, used or not.
"""

import json
import re
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from r1hpc import report
from r1hpc.accounting.open_ledger import report_run
from r1hpc.telemetry.records.attempts import Cause
from tests.cluster import Cluster
from tests.runs import Submitted, submit, wait_attempt, wait_over, wait_step, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


@pytest.fixture
def on_cluster(on_cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The cluster, for commands that this process runs itself; runs lie under tmp_path/runs."""
    monkeypatch.setenv("R1HPC_RUN_ROOT", str(tmp_path / "runs"))
    return on_cluster


def test_every_way_to_end_is_accounted_to_the_second(
    on_cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() - 1))
    jobs = _start_plain_jobs(on_cluster)
    run = _preempt_twice(on_cluster, tmp_path / "runs")
    _lose_a_node(on_cluster, jobs["node_fail"])
    on_cluster.cancel(jobs["cancelled"], jobs["waiting"])
    for job in jobs.values():
        on_cluster.wait_job(job, timeout=120)
    causes = [a.cause for a in wait_over(run.run, 180)]
    assert causes == [Cause.preempted, Cause.preempted, Cause.finished]
    # After requeues of its own a job that exits 0 is called PREEMPTED and run once more; then it leaves.
    on_cluster.wait_job(int(run.job_id), {"COMPLETED"}, timeout=60)
    dump = _settled_dump(on_cluster, began, tmp_path / "dump.txt")

    by_hand = _sum_by_hand(dump)
    assert set(by_hand["state"]) >= {"COMPLETED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "REQUEUED"}
    for source in (["--sacct-file", str(dump)], ["--start", began]):
        hours = _report(capsys, *source)["gpu_hours"]
        assert hours["source"] == "sacct"
        assert round(3600 * hours["total"]) == by_hand["total"][""]
        assert _in_seconds(hours["by_state"]) == by_hand["state"]
        assert _in_seconds(hours["by_qos"]) == by_hand["qos"]
        assert _in_seconds(hours["by_run"]) == {
            "demo": by_hand["job"][run.job_id],
            "unknown": by_hand["total"][""] - by_hand["job"][run.job_id],
        }
    _check_the_run(run, by_hand["job"][run.job_id])


def _start_plain_jobs(cluster: Cluster) -> dict[str, int]:
    """One for each way to end, on two of the nodes."""
    quiet = ("--output=/dev/null", "--mem=100", "--nodelist=r1n3")
    own = ("--output=/dev/null", "--mem=100", "--nodelist=r1n4")
    hetero = "#SBATCH --gres=gpu:1 --mem=100\n#SBATCH hetjob\n#SBATCH --gres=gpu:2 --mem=100\nsleep 4"
    return {
        "timeout": cluster.submit("sleep 300", "--time=1", "--gres=gpu:1", *quiet),
        "completed": cluster.submit("sleep 5", "--job-name=a|b", "--gres=gpu:a100:1", *quiet),
        "array": cluster.submit("sleep 3", "--array=0-2", "--gres=gpu:1", "--job-name=|", *quiet),
        "cancelled": cluster.submit("sleep 300", "--time=5", "--gres=gpu:1", *quiet),
        "no_gpu": cluster.submit("sleep 3", *quiet),
        "hetero": cluster.submit(hetero, "--output=/dev/null", "--time=5"),
        "node_fail": cluster.submit("sleep 30", "--time=5", "--nodes=1", "--gres=gpu:2", *own),
        "waiting": cluster.submit("sleep 300", "--begin=now+2hours", "--gres=gpu:4", *quiet),
    }


def _preempt_twice(cluster: Cluster, root: Path) -> Submitted:
    words = (
        "--executor",
        "slurm",
        "--qos",
        "scavenger",
        "--nodes",
        "2",
        "-t",
        "20",
        "resources.nodelist=r1n[1-2]",
    )
    size = ("train.num_steps=40", "checkpoint.save_every=15", "resources.exclusive=true")
    slow = cluster.env(R1HPC_FAILPOINT="step.begin:sleep=1::*:1,step.begin:sleep=1::*:2")
    job = submit(root, "demo", *words, *size, env=slow)
    for attempt, step in ((1, 5), (2, 12)):
        wait_attempt(job.run, attempt)
        wait_step(job.run, step)
        cluster.preempt(int(job.job_id))
        wait_attempt(job.run, attempt + 1)
    return job


def _lose_a_node(cluster: Cluster, job: int) -> None:
    """The node of a running job goes down; Slurm starts the job again when it is back."""
    cluster.wait_job(job, {"RUNNING", "COMPLETED"})
    if cluster.state(job) != "RUNNING":  # the run took longer than the job: once more, for this test's sake
        cluster.run(["scontrol", "requeue", str(job)])
        cluster.wait_job(job, {"RUNNING"})
    (node,) = cluster.node_list(job)
    time.sleep(2)
    cluster.fail_node(node, declare=True)
    try:
        wait_until("the node failure to be seen", lambda: cluster.state(job) != "RUNNING", 60)
    finally:
        cluster.restore_node(node)


def _settled_dump(cluster: Cluster, began: str, path: Path) -> Path:
    """What sacct prints once the database knows every end; all that is asked for, in another order."""
    argv = ["sacct", "-D", "-X", "-P", "--allusers", "-S", began]
    argv += ["-o", "JobName,QOS,State,AllocTRES,ElapsedRaw,End,Start,JobID,User,Account,Partition,NNodes"]

    def settled() -> bool:
        path.write_text(cluster.run(argv).stdout)
        return "RUNNING" not in path.read_text() and "PENDING" not in path.read_text()

    wait_until("every end in the database", settled, 60)
    return path


def _sum_by_hand(dump: Path) -> dict[str, dict[str, int]]:
    """GPU-seconds: the columns from the right, for a name may hold the separator."""
    found: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    seen = set()
    for line in dump.read_text().splitlines()[1:]:
        qos, state, tres, elapsed, _, start, job, *_ = line.split("|")[-11:]
        assert (job, start) not in seen or start == "Unknown"
        seen.add((job, start))
        if start in ("Unknown", "None"):
            continue
        counts = re.findall(r"gres/gpu=(\d+)", tres)
        gpu_seconds = int(counts[0]) * int(elapsed) if counts else 0
        for group, key in (("total", ""), ("qos", qos), ("state", state.split()[0]), ("job", job)):
            found[group][key] += gpu_seconds
    return {group: dict(sums) for group, sums in found.items()}


def _check_the_run(run: Submitted, charged_s: int) -> None:
    """The split adds up to what Slurm charged, and the run's own record is as long but for its starts."""
    ledger = report_run(run.run, time.time()).ledger
    assert ledger.source == "sacct"
    assert ledger.split().allocated == 1000 * charged_s
    assert {entry.allocation.gpus for entry in ledger.attempts} == {8}
    split = ledger.split()
    assert min(split.useful, split.startup, split.save) > 0
    for entry in ledger.attempts:
        own = entry.inside
        assert len(own) <= 1, "an allocation of Slurm holds one attempt"
        for each in own:
            assert each.attempt.gpus == 8
            # Slurm's times are whole seconds.
            assert entry.allocation.start - 1 <= each.attempt.start <= each.end <= entry.allocation.end + 1
    assert [entry.attempt for entry in ledger.attempts if entry.inside] == [1, 2, 3]
    assert 0 < sum(a.gpus * a.hours for a in ledger.own) < charged_s / 3600
    assert ledger.queue_s > 0


def _report(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert report.main([*argv, "--json"]) == 0
    shown: dict[str, Any] = json.loads(capsys.readouterr().out)
    return shown


def _in_seconds(hours: dict[str, float]) -> dict[str, int]:
    return {key: round(3600 * value) for key, value in hours.items()}
