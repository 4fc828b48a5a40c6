"""A sweep on a real Slurm: 27 points in a scavenger queue, preempted, each run once, at most 4 at a time."""

import os
from pathlib import Path

import pytest

from r1hpc.sweeps.definition import SweepDir
from r1hpc.telemetry.records.attempts import Cause, read_history
from tests.cluster import Cluster
from tests.runs import wait_attempt
from tests.sweeps.sweeping import actions, sweep, wait_states
from tests.toy_package import install_toy, write_toy_job

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

_AT_MOST = 4


def test_preempted_points_run_once_and_the_table_is_right(tmp_path: Path, idle_cluster: Cluster) -> None:
    setup = install_toy(tmp_path / "site")
    job = write_toy_job(tmp_path / "toy.yaml", count=1, setup=setup)
    site = os.pathsep.join(filter(None, [str(tmp_path / "site"), os.environ.get("PYTHONPATH")]))
    env = idle_cluster.env(PYTHONPATH=site)
    words = [str(job), "options.count=3,5,8", "options.pause_s=0.1,0.2,0.3", "train.seed=0..2"]
    words += ["options.bad=[5,1]", "limits.max_crashes=0", "--executor", "slurm", "--qos", "scavenger"]
    answer = sweep(tmp_path, *words, "--at-most", str(_AT_MOST), env=env)
    jobs = [each["job_id"] for each in answer["points"]]
    assert len(set(jobs)) == 27
    shown = idle_cluster.job(int(jobs[26]))["Dependency"]
    assert shown.startswith(f"afterany:{jobs[26 - _AT_MOST]}")
    assert set(actions(sweep(tmp_path, *words, "--at-most", "4", env=env)).values()) <= {
        "at work",
        "finished",
    }

    there = SweepDir(tmp_path / "runs" / "toy-sweep")
    for number in (0, 5, 10, 15, 20):
        run = there.stage(answer["points"][number]["point"])
        wait_attempt(run, 1, 120)
        if not run.finished.exists():
            idle_cluster.preempt(int(jobs[number]))
    states = wait_states(tmp_path, str(there.path), 400, env)
    bad = {name for name, state in states.items() if state != "finished"}
    assert bad == {f"count_5-pause_s_{pause}-seed_1" for pause in ("0.1", "0.2", "0.3")}
    attempts = {name: read_history(there.stage(name)).attempts for name in states}
    causes = [a.cause for each in attempts.values() for a in each]
    assert causes.count(Cause.finished) == 24
    assert causes.count(Cause.crash) == 3
    assert causes.count(Cause.preempted) >= 1
    edges = sorted(
        (t, s) for each in attempts.values() for a in each for t, s in ((a.start, 1), (a.end or 0, -1))
    )
    assert max(sum(step for _, step in edges[: n + 1]) for n in range(len(edges))) <= _AT_MOST
    rows = sweep(tmp_path, str(there.path), env=env)["rows"]
    found = {tuple(row["settings"].values()): (row["mean"], len(row["values"])) for row in rows}
    pauses = ("0.1", "0.2", "0.3")
    assert found == {(str(c), p): (float(c), 2 if c == 5 else 3) for c in (3, 5, 8) for p in pauses}
