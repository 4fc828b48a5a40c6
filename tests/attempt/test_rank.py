"""A rank that cannot even begin leaves an outcome all the same."""

import os
import subprocess
import sys
from pathlib import Path

from r1hpc.attempt.outcome import FAILED, read_outcomes
from r1hpc.base.files import write_json
from r1hpc.config import load
from tests.recorded import RecordedRun

_RANK = """
import sys
from r1hpc.attempt.rank import run_rank
sys.executable = "/nowhere/python"  # of which the watchdog starts another one
run_rank(sys.argv[1])
"""


def test_a_rank_whose_watchdog_cannot_start_says_so(tmp_path: Path) -> None:
    made = RecordedRun(tmp_path / "demo")
    made.begin()
    load.save(load.load(None, ["stage=traces", "resources.gpus_per_node=0"]), made.run.config)
    facts = {"attempt": 1, "token": "t", "dataset_path": "", "ranks": 1}
    made.run.attempt_dir(1).mkdir()
    write_json(made.run.attempt_dir(1) / "attempt.json", facts)
    place = {"R1HPC_ATTEMPT": "1", "R1HPC_LOCAL_RANK": "0", "R1HPC_LOCAL_WORLD_SIZE": "1"}
    argv = [sys.executable, "-c", _RANK, str(made.run.path)]
    done = subprocess.run(argv, env={**os.environ, **place}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    (outcome,) = read_outcomes(made.run, 1)
    assert outcome.kind == FAILED
    assert "/nowhere/python" in outcome.detail
