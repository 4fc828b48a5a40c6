"""`shard build --engine slurm` on the real Slurm: stages in order, one preempted, the same dataset."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from r1hpc.corpus.build.build import build_dataset
from r1hpc.corpus.inspect.describe import audit
from tests.cluster import Cluster
from tests.cluster.processes import until
from tests.corpus.corpus import write_recipe
from tests.corpus.test_prepare import STAGES, prose, source, write_lines

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Cleaning, deduplication, decontamination and a mixture of two sources."""
    write_lines(tmp_path / "a.jsonl", [prose(n) for n in range(40)])
    write_lines(tmp_path / "b.jsonl", [prose(n) for n in range(100, 140)] + [prose(3)])
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": prose(500)[50:250], "answer": "7"}) + "\n")
    return write_recipe(tmp_path, sources=[source("a"), source("b")], **STAGES)


def build(cluster: Cluster, *words: str, failpoint: str = "") -> subprocess.CompletedProcess[str]:
    """`shard build` as a user of the cluster types it."""
    command = [sys.executable, "-m", "r1hpc.shard", "build", *words, "--engine", "slurm", "--json"]
    return cluster.run(command, check=False, R1HPC_FAILPOINT=failpoint)


def test_a_preempted_build_on_three_nodes_is_the_local_one(
    idle_cluster: Cluster, recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "data" / "out"
    words = (str(recipe), "--out", str(out), "--jobs", "3", "--qos", "scavenger", "-t", "10")
    done = build(idle_cluster, *words, failpoint="data.build.span:sleep=15::1")
    assert done.returncode == 0, done.stderr
    jobs = json.loads(done.stdout)["jobs"]
    assert list(jobs) == ["evaluation", "clean", "tokenizer", "tokens", "publish"]
    again = build(idle_cluster, *words)
    assert (again.returncode, "is being built by job" in again.stderr) == (1, True)
    running = ["squeue", "-h", "-j", jobs["clean"], "-t", "RUNNING", "-o", "%A"]
    elements: list[str] = []

    def is_one_running() -> bool:
        elements[:] = idle_cluster.run(running).stdout.split()
        return bool(elements)

    until("an element of clean runs", is_one_running, 120)
    victim = int(elements[0])
    idle_cluster.preempt(victim)
    idle_cluster.wait_restarts(victim, 1, timeout=120)
    idle_cluster.wait_job(int(jobs["publish"]), {"COMPLETED"}, timeout=200)
    alone = build_dataset(recipe, tmp_path / "alone")
    assert audit(out) == audit(alone.path)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    there = build(idle_cluster, *words)
    assert (there.returncode, json.loads(there.stdout)["jobs"]) == (0, {})


def test_a_stage_that_fails_ends_the_build_and_leaves_its_log(idle_cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{broken\n" * 20)
    broken = write_recipe(
        tmp_path, sources=[source("a")], clean={"rules": ["c4"]}, tokenizer=STAGES["tokenizer"]
    )
    out = tmp_path / "data" / "out"
    done = build(idle_cluster, str(broken), "--out", str(out), "--jobs", "2", "-t", "10")
    jobs = json.loads(done.stdout)["jobs"]
    idle_cluster.wait_job(int(jobs["publish"]), {"CANCELLED"}, timeout=120)
    logs = out.parent / ".staging-out" / "jobs"
    assert "a.jsonl at 0: not JSON" in "".join(path.read_text() for path in logs.glob("*.out"))
