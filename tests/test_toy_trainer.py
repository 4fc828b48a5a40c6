"""A stage of another package that trains: swept with rungs, drilled, tracked; and one that is broken."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from r1hpc.base.run_dir import RunDir
from r1hpc.telemetry.records.attempts import Cause
from tests.runs import CHECKOUT, submit, wait_over, wait_until
from tests.toy_package import install_toy


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    install_toy(tmp_path / "site")
    return {**os.environ, "PYTHONPATH": str(tmp_path / "site")}


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "descending.yaml"
    content = {
        "stage": "descending",
        "options": {"steps": 60, "pause_s": 0.02},
        "resources": {"gpus_per_node": 0},
        "checkpoint": {"save_every": 10},
    }
    path.write_text(yaml.safe_dump(content))
    return path


def command(environment: dict[str, str], *words: str) -> "subprocess.CompletedProcess[str]":
    argv = [sys.executable, "-m", *words]
    return subprocess.run(argv, cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("options.stepz=3", "unknown key 'options.stepz' (did you mean 'steps'?)"),
        ("options.steps=many", "options.steps is 'many': it must be a whole number"),
        ("options.rate=7", "options.rate is 7.0: it must be above 0.0 and at most 1.0"),
    ],
)
def test_its_options_are_checked_by_their_type(
    job: Path, environment: dict[str, str], override: str, words: str
) -> None:
    done = command(environment, "r1hpc.submit", str(job), override, "--dry-run")
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr


def test_its_steps_are_planned(job: Path, environment: dict[str, str]) -> None:
    done = command(environment, "r1hpc.submit", str(job), "--dry-run", "--json")
    assert json.loads(done.stdout)["plan"]["num_steps"] == 60


@pytest.mark.slow
def test_it_is_drilled(tmp_path: Path, job: Path, environment: dict[str, str]) -> None:
    words = ("r1hpc.drill", str(job), "--executor", "local", "--run-root", str(tmp_path), "--json")
    verdict = json.loads(command(environment, *words).stdout)
    assert verdict["passed"]
    kept = {check["check"] for check in verdict["checks"]}
    assert {"loss and gradient norm equal to the bit", "every sample exactly once"} <= kept


@pytest.mark.slow
def test_its_steps_are_tracked(tmp_path: Path, job: Path, environment: dict[str, str]) -> None:
    pytest.importorskip("tensorboard")
    run = submit(tmp_path, "tracked", "monitor.trackers=[tensorboard]", job=str(job), env=environment).run
    wait_over(run)
    folder = run.trackers / "tensorboard"
    wait_until("tracked", lambda: any(folder.glob("events.*")), 60, run)


@pytest.mark.slow
def test_a_sweep_stops_its_worse_points(tmp_path: Path, job: Path, environment: dict[str, str]) -> None:
    words = (str(job), "options.rate=0.4,0.1", "options.pause_s=0.1", "--rungs", "2", "--keep", "0.5")
    place = ("--run-root", str(tmp_path), "--run-name", "swept", "--executor", "local")
    done = command(environment, "r1hpc.sweep", *words, *place, "--by", "loss")
    assert done.returncode == 0, done.stderr
    worse = RunDir(next((tmp_path / "swept").glob("*0.1*")))
    wait_until("stopped", worse.stop.exists, 60, worse)
    assert [attempt.cause for attempt in wait_over(worse)] == [Cause.stopped]


def broken(environment: dict[str, str], old: str, new: str) -> None:
    module = Path(environment["PYTHONPATH"], "toy_trainer.py")
    text = module.read_text()
    assert old in text
    module.write_text(text.replace(old, new))


_BEFORE = "    def steps("
_CHECKS_NOTHING = "    def check_settings(self, config, facts): return None\n\n"
_DIVIDES = "    def check(self, config, facts): return 1 / 0\n\n"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (_BEFORE, _CHECKS_NOTHING + _BEFORE, "its check_settings() returned NoneType, not Checked"),
        (_BEFORE, _DIVIDES + _BEFORE, "its check() failed (ZeroDivisionError"),
        ("return steps", "return 'many'", "its steps() returned str, not int or None"),
        ("WORKLOAD = Descending()", "WORKLOAD = Descending(", "cannot be loaded (SyntaxError"),
        ("WORKLOAD = Descending()", "", "cannot be loaded (AttributeError"),
    ],
)
def test_a_broken_package_costs_one_sentence(
    job: Path, environment: dict[str, str], old: str, new: str, words: str
) -> None:
    broken(environment, old, new)
    done = command(environment, "r1hpc.submit", str(job), "--dry-run")
    assert done.returncode in (1, 2)
    assert words in done.stderr
    assert "stage descending" in done.stderr
    assert "Traceback" not in done.stderr
