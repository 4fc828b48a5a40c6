"""A ninth stage, added by another package: planned, checked, run, stopped, killed, resumed, reported."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from r1hpc.telemetry.records.attempts import Cause
from tests.runs import CHECKOUT, command_output, rank_pids, submit, wait_over, wait_until
from tests.toy_package import install_toy, write_toy_job


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    install_toy(tmp_path / "site")
    return {**os.environ, "PYTHONPATH": str(tmp_path / "site")}


def refused(environment: dict[str, str], *words: str) -> str:
    command = [sys.executable, "-m", "r1hpc.submit", *words, "--dry-run"]
    done = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    return done.stderr


def test_its_settings_are_checked_before_the_queue(tmp_path: Path, environment: dict[str, str]) -> None:
    job = str(write_toy_job(tmp_path / "toy.yaml", count=3))
    assert "options.count=N" in refused(environment, job, "options.count=many")
    assert (
        "it may be one of pretrain, traces, sft, rl, rollout, generate, evaluate, serve, script, counting"
        in refused(environment, job, "stage=countin")
    )


def test_it_is_killed_and_goes_on_where_it_was(tmp_path: Path, environment: dict[str, str]) -> None:
    job = write_toy_job(tmp_path / "toy.yaml", count=80, pause_s=0.05)
    run = submit(tmp_path, "toy", job=str(job), env=environment).run
    wait_until("counting", lambda: (run.path / "counted-0.json").exists(), 60, run)
    os.kill(rank_pids(run)[0], signal.SIGKILL)
    assert [a.cause for a in wait_over(run)] == [Cause.crash, Cause.finished]
    shown = command_output(["-m", "r1hpc.status", str(run.path)], environment)
    assert "counted: 80" in shown
