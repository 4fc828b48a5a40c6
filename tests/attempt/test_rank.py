"""A rank that cannot even begin leaves an outcome all the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from r1hpc.attempt.state.cause import FAILED, read_outcomes
from r1hpc.base.files import write_json
from r1hpc.config import load
from tests.recorded import RecordedRun

_RANK = """
import sys
from r1hpc.attempt.rank import run_rank
sys.executable = "/nowhere/python"  # of which the watchdog starts another one
run_rank(sys.argv[1])
"""

_WARNED = """
import os, signal, sys
from r1hpc import launch
from r1hpc.attempt import rank
from r1hpc.attempt.workload import Outcome, Workload

number = signal.Signals[sys.argv[2]]
signal.signal(number, lambda *_: print("lost"))  # as submitit does
read = rank.read
rank.read = lambda path: (os.kill(os.getpid(), number), read(path))[1]

class Stopped(Workload):
    def run(self, job):
        return Outcome(False, reason=job.requests.reason)

rank.workload_of = lambda stage: Stopped()
launch.run_rank(sys.argv[1])
"""


def _start(made: RecordedRun, script: str, *words: str) -> "subprocess.CompletedProcess[str]":
    """The only rank of the run's first attempt."""
    made.begin()
    load.save(load.load(None, ["stage=traces", "resources.gpus_per_node=0"]), made.run.config)
    facts = {"attempt": 1, "token": "t", "dataset_path": "", "ranks": 1}
    made.run.attempt_dir(1).mkdir()
    write_json(made.run.attempt_dir(1) / "attempt.json", facts)
    place = {"R1HPC_ATTEMPT": "1", "R1HPC_LOCAL_RANK": "0", "R1HPC_LOCAL_WORLD_SIZE": "1"}
    argv = [sys.executable, "-c", script, str(made.run.path), *words]
    return subprocess.run(argv, env={**os.environ, **place}, capture_output=True, text=True, timeout=60)


def test_a_rank_whose_watchdog_cannot_start_says_so(tmp_path: Path) -> None:
    made = RecordedRun(tmp_path / "demo")
    done = _start(made, _RANK)
    assert done.returncode == 1, done.stderr
    (outcome,) = read_outcomes(made.run, 1)
    assert outcome.kind == FAILED
    assert "/nowhere/python" in outcome.detail


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR2"])
def test_a_warning_before_the_rank_listens_is_kept_for_it(tmp_path: Path, name: str) -> None:
    made = RecordedRun(tmp_path / "demo")
    done = _start(made, _WARNED, name)
    assert (done.returncode, "lost" in done.stdout) == (0, False), done.stdout + done.stderr
    (outcome,) = read_outcomes(made.run, 1)
    assert outcome.reason == name
