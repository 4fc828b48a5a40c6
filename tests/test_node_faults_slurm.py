"""Nodes, disks and records at fault on a real Slurm: which node is excluded, and which fault is no node's.

    pytest tests/test_node_faults_slurm.py

The ranks only wait (tests/light_runs.py).
"""

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from r1hpc.attempt.state.state import State, read_situation
from r1hpc.base.files import read_records
from r1hpc.base.run_dir import RunDir
from r1hpc.telemetry.records.attempts import Cause, read_history
from tests.cluster import Cluster
from tests.light_runs import LightRun
from tests.runs import CHECKOUT, run_environment, wait_over, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

_SCAVENGER = "--qos=scavenger"


# -- a begin that fails ---------------------------------------------------------------------------------


@contextmanager
def blind(cluster: Cluster, node: str, folder: Path) -> Iterator[None]:
    """The node sees an empty folder that cannot be written, as where a file system is not mounted."""
    pid = cluster.state_record.processes[f"slurmd.{node}"][0]
    inside = ["nsenter", "-t", str(pid), "-m"]
    subprocess.run([*inside, "mount", "-t", "tmpfs", "-o", "ro", "none", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run([*inside, "umount", "-l", str(folder)], check=True)


def test_a_node_that_does_not_see_the_run_is_excluded_and_the_run_finishes_elsewhere(
    on_cluster: Cluster, tmp_path: Path
) -> None:
    root = tmp_path / "runs"
    run = LightRun(root, "blind", on_cluster, patience="1 1")
    first = on_cluster.node_names[0]
    with blind(on_cluster, first, root):
        job = run.submit(_SCAVENGER, R1HPC_LIGHT_LAST="1")
        run.wait_over()
    assert [a.cause for a in run.attempts] == [Cause.finished]
    assert first not in run.attempts[0].node_names
    assert on_cluster.job(job)["ExcNodeList"] == first
    (excluded,) = [e for e in read_records(run.run.attempts) if e["event"] == "excluded"]
    assert (excluded["node"], excluded["job_id"]) == (first, str(job))
    assert "could not write into the run folder" in excluded["reason"]


def test_train_sh_on_a_node_that_sees_nothing_runs_elsewhere(on_cluster: Cluster, tmp_path: Path) -> None:
    """The node sees neither the folder that sbatch was called in nor the run root below it."""
    place, first = tmp_path / "place", on_cluster.node_names[0]
    place.mkdir()
    script = tmp_path / "train.sh"
    script.write_text((CHECKOUT / "sbatch" / "train.sh").read_text().replace("2 5 10 20 30 30 30", "1 1"))
    words = ["--nodes=1", "--time=15", "--mem=1000", str(script), str(CHECKOUT / "jobs" / "smoke.yaml")]
    words += ["train.num_steps=2", "--run-name", "blind"]
    environment = run_environment(
        on_cluster.env(R1HPC_PYTHON=sys.executable, PYTHONPATH=str(CHECKOUT), R1HPC_RUN_ROOT="")
    )
    with blind(on_cluster, first, place):
        done = subprocess.run(
            ["sbatch", "--parsable", *words],
            cwd=place,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        job = int(done.stdout)
        wait_until("another node", lambda: on_cluster.job(job)["ExcNodeList"] == first, 60)
        run = RunDir(place / "runs" / "blind")
        wait_until("its folder", run.attempts.is_file, 60)
        assert [a.cause for a in wait_over(run, 180)] == [Cause.finished]
    assert read_history(run).attempts[0].node_names != (first,)
    log = place / f"slurm-{job}.out"  # written after the record that `wait_over` looks at
    wait_until("the log's last word", lambda: "ended: finished" in log.read_text(), 60)


@pytest.mark.parametrize("options", [(), ("--array=3",)], ids=["job", "task of an array"])
def test_a_node_on_which_begin_fails_is_excluded_with_the_reason(
    on_cluster: Cluster, tmp_path: Path, options: tuple[str, ...]
) -> None:
    """An interpreter that this node cannot start."""
    run = LightRun(tmp_path, "broken", on_cluster, patience="1 1")
    first = on_cluster.node_names[0]
    with blind(on_cluster, first, Path(sys.prefix)):
        run.submit(*options, R1HPC_LIGHT_LAST="1")
        run.wait_over()
    assert [a.cause for a in run.attempts] == [Cause.finished]
    (excluded,) = [e for e in read_records(run.run.attempts) if e["event"] == "excluded"]
    assert excluded["node"] == first
    assert excluded["reason"] == f"{sys.executable} cannot be started"


def test_a_disk_that_is_full_for_a_moment_does_not_cost_the_run(on_cluster: Cluster, tmp_path: Path) -> None:
    """On one node, in whose mount namespace the run root is a small file system."""
    run = LightRun(tmp_path / "small", "full", on_cluster, patience="1 1 1 1 1 1 1 1 1 1 1 1")
    shutil.copytree(tmp_path / "small", tmp_path / "origin", symlinks=True)
    node = on_cluster.node_names[0]
    pid = on_cluster.state_record.processes[f"slurmd.{node}"][0]

    def inside(*argv: str) -> int:
        return subprocess.run(["nsenter", "-t", str(pid), "-m", *argv], stderr=subprocess.DEVNULL).returncode

    small, seen = tmp_path / "small", RunDir(Path(f"/proc/{pid}/root{tmp_path}/small/full"))
    assert inside("mount", "-t", "tmpfs", "-o", "size=1m", "none", str(small)) == 0
    try:
        assert inside("cp", "-a", f"{tmp_path}/origin/full", str(small)) == 0
        assert inside("cp", "/dev/zero", f"{small}/ballast") == 1  # no room
        job = run.submit(f"--nodelist={node}", R1HPC_LIGHT_LAST="1")
        on_cluster.wait_job(job, {"RUNNING"})
        time.sleep(5)
        assert on_cluster.state(job) == "RUNNING"
        assert not read_history(seen).attempts
        assert inside("rm", f"{small}/ballast") == 0
        wait_until("its end", seen.finished.exists, 60)
        assert on_cluster.wait_job(job) == "COMPLETED"
        assert [a.cause for a in read_history(seen).attempts] == [Cause.finished]
    finally:
        inside("umount", "-l", str(small))


# -- records that were lost ------------------------------------------------------------------------------


def test_emptied_records_cost_no_node_and_hold_the_job_with_a_reason(
    on_cluster: Cluster, tmp_path: Path
) -> None:
    run = LightRun(tmp_path, "emptied", on_cluster, patience="1 1")
    run.submit(_SCAVENGER, R1HPC_FAILPOINT="end.requeue:sleep=3:::1")
    run.wait_rank(1)
    on_cluster.run(["scancel", "--signal=USR2", str(run.job)])
    run.wait_log("ended: preempted")
    kept = run.run.attempts.read_text()
    run.run.attempts.write_text("")
    wait_until("the hold", lambda: "JobHeld" in on_cluster.job(run.job).get("Reason", ""), 90, run.run)
    assert on_cluster.job(run.job)["ExcNodeList"] == "(null)"
    assert read_situation(run.run).detail.startswith("attempts.jsonl is empty or gone: restore it")
    run.run.attempts.write_text(kept)
    wait_until(
        "its comment", lambda: "but attempt 1 is on disk" in read_situation(run.run).detail, 20, run.run
    )
    assert read_situation(run.run).state is State.requeued
    on_cluster.run(["scontrol", "release", str(run.job)])
    assert [a.cause for a in run.wait_over()] == [Cause.preempted, Cause.finished]


# -- a node that is taken down --------------------------------------------------------------------------


def test_a_node_that_is_taken_down_is_a_node_failure_and_counts(on_cluster: Cluster, tmp_path: Path) -> None:
    """The rank on the other node gets SIGTERM, saves and leaves, as in a preemption."""
    run = LightRun(tmp_path, "down", on_cluster, nodes="2")
    run.submit()
    run.wait_rank(1)
    time.sleep(2)
    lost = on_cluster.node_list(run.job)[-1]
    on_cluster.fail_node(lost, declare=True)
    try:
        attempts = run.wait_over()
    finally:
        on_cluster.restore_node(lost)
    assert [a.cause for a in attempts] == [Cause.node_fail, Cause.finished]
    assert attempts[0].detail == "a node of the job went down"


# -- a mistake of the user's ----------------------------------------------------------------------------


def test_data_that_cannot_be_used_costs_no_node(on_cluster: Cluster, tmp_path: Path) -> None:
    """A recipe whose source is no JSON: one try, on one node."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "own.jsonl").write_text("no JSON\n")
    source = "{name: own, kind: jsonl, root: own, glob: '*.jsonl'}"
    (tmp_path / "own.yaml").write_text(f"name: own\ntokenizer: {{kind: bytes}}\nsources: [{source}]\n")
    settings = ("stage=pretrain", f"data.recipe={tmp_path}/own.yaml")
    run = LightRun(tmp_path / "runs", "mistaken", on_cluster, settings=settings)
    run.submit()
    assert on_cluster.wait_job(run.job) == "FAILED"
    assert "again in" not in run.log
    assert on_cluster.job(run.job)["ExcNodeList"] == "(null)"
    situation = read_situation(run.run)
    assert situation.state is State.failed
    assert situation.detail.startswith("refused: the dataset could not be built from")
