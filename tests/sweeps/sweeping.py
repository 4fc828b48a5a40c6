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

from tests.runs import CHECKOUT, run_environment


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
    """Poll the table until no point waits or runs; the states by point."""
    deadline = time.monotonic() + timeout_s
    while True:
        rows = sweep(root, folder, env=env)["rows"]
        states = {name: state for row in rows for name, state in row["points"].items()}
        if not set(states.values()) & {"queued", "running", "requeued"}:
            return states
        assert time.monotonic() < deadline, states
        time.sleep(2)
