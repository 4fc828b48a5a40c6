"""A sweep on this machine: a few points at a time, one fails, and the second call goes on."""

import os
from pathlib import Path

from r1hpc.base.lock import is_free
from r1hpc.sweeps.definition import SweepDir
from r1hpc.telemetry.records.attempts import read_history
from tests.runs import wait_until
from tests.sweeps.sweeping import actions, call, sweep, wait_states
from tests.toy_package import install_toy, write_toy_job

_GRID = ("options.count=3,5,8", "train.seed=0..2", "options.bad=[5,1]", "limits.max_crashes=0")


def test_one_failing_point_harms_none_and_the_rest_is_skipped_or_resumed(tmp_path: Path) -> None:
    install_toy(tmp_path / "site")
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    words = [str(write_toy_job(tmp_path / "toy.yaml", count=1, pause_s=0.2)), "--executor", "local", *_GRID]
    assert set(actions(sweep(tmp_path, *words, "--at-most", "3", env=env)).values()) == {"submitted"}
    there = SweepDir(tmp_path / "runs" / "toy-sweep")
    states = wait_states(tmp_path, str(there.path), 200, env)
    assert {name for name, state in states.items() if state != "finished"} == {"count_5-seed_1"}
    assert states["count_5-seed_1"] == "failed"
    attempts = [read_history(there.stage(name)).attempts for name in states]
    assert [len(each) for each in attempts] == [1] * 9
    edges = sorted((time, step) for (a,) in attempts for time, step in ((a.start, 1), (a.end or 0.0, -1)))
    running = [sum(step for _, step in edges[: n + 1]) for n in range(len(edges))]
    assert 1 < max(running) <= 3
    table = sweep(tmp_path, str(there.path), env=env)["rows"]
    assert [(row["settings"], row["mean"], len(row["values"])) for row in table] == [
        ({"options.count": "3"}, 3.0, 3),
        ({"options.count": "5"}, 5.0, 2),
        ({"options.count": "8"}, 8.0, 3),
    ], "in the order of the sweep: nothing tells which way a count is better"
    report = call(tmp_path, str(there.path), env=env, command="report").stdout
    assert all(name in report for name in states)
    assert (there.stage("count_3-seed_0").code / "r1hpc").samefile(there.shared.code / "r1hpc")

    wait_until("the supervisor's end", lambda: is_free(there.lock), 60)
    more = [word.replace("0..2", "0..3") for word in words]
    again = actions(sweep(tmp_path, *more, env=env))
    assert [again[f"count_3-seed_{n}"] for n in range(4)] == ["finished"] * 3 + ["submitted"]
    assert again["count_5-seed_1"] == "resumed"
    refused = call(tmp_path, *[word.replace("0..2", "0..4") for word in words], env=env)
    assert "runs here (process" in refused.stderr
    assert call(tmp_path, str(there.path), env=env, command="cancel").returncode == 0
    wait_until("the end of the cancelled sweep", lambda: is_free(there.lock), 60)


def test_a_second_command_names_the_supervisor_that_has_not_yet_begun(tmp_path: Path) -> None:
    install_toy(tmp_path / "site")
    slow = "import sys, time\nif 'chain' in sys.orig_argv:\n    time.sleep(30)\n"
    (tmp_path / "site" / "sitecustomize.py").write_text(slow)
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    words = [str(write_toy_job(tmp_path / "toy.yaml", count=1)), "--executor", "local", "options.count=3,5"]
    assert set(actions(sweep(tmp_path, *words, env=env)).values()) == {"submitted"}
    there = SweepDir(tmp_path / "runs" / "toy-sweep")
    assert "runs here (process" in call(tmp_path, *words[:-1], "options.count=3,5,8", env=env).stderr
    assert call(tmp_path, str(there.path), env=env, command="cancel").returncode == 0
    wait_until("the end of the cancelled sweep", lambda: is_free(there.lock), 60)
