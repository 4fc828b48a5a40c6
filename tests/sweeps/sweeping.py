"""Sweeps in tests, by the command a user takes.

answer = sweep(tmp_path, str(job), "train.seed=0..2", "--executor", "local")
"""

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from r1hpc.sweeps.definition import SweepDir
from r1hpc.telemetry.records.attempts import read_history
from tests.runs import CHECKOUT, run_environment, wait_until


def call(
    root: Path, *words: str, env: Mapping[str, str] | None = None, command: str = "sweep"
) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", f"r1hpc.{command}", *words]
    if "--run-root" not in words:
        argv[4:4] = ["--run-root", str(root / "runs")]
    return subprocess.run(
        argv, cwd=CHECKOUT, env=run_environment(env), capture_output=True, text=True, timeout=240
    )


def sweep(root: Path, *words: str, env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The JSON object of a call that must succeed."""
    done = call(root, "--json", *words, env=env)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def actions(answer: Mapping[str, Any]) -> dict[str, str]:
    return {each["point"]: each["action"] for each in answer["points"]}


def wait_states(
    root: Path, folder: str, timeout_s: float, env: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Poll the table until no point waits or runs and the end of every attempt is on record; the states."""
    deadline = time.monotonic() + timeout_s
    while True:
        rows = sweep(root, folder, env=env)["rows"]
        states = {name: state for row in rows for name, state in row["points"].items()}
        if not set(states.values()) & {"queued", "running", "requeued"}:
            break
        assert time.monotonic() < deadline, states
        time.sleep(2)
    # FINISHED is there a moment before the end of the attempt is on record.
    runs = [SweepDir(Path(folder)).stage(name) for name in states]
    wait_until("ends", lambda: all(a.cause for run in runs for a in read_history(run).attempts), 60)
    return states
