"""A run on a user's own task and reward: killed, it goes on to the bit with the code it was frozen with."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from r1hpc.telemetry.records.attempts import Cause
from tests.runs import (
    CHECKOUT,
    assert_same_run,
    at,
    held,
    kill_rank,
    run_environment,
    submit,
    wait_over,
    wait_step,
)
from tests.tasks.own_code import REWARD, TASK, write

pytestmark = pytest.mark.timeout(400)


def _job(folder: Path) -> str:
    """jobs/rl_smoke.yaml on one rank, with own code."""
    task, reward = write(folder, "my_task.py", TASK), write(folder, "rewards.py", REWARD)
    job = yaml.safe_load((CHECKOUT / "jobs" / "rl_smoke.yaml").read_text())
    job["task"] = {"name": f"{task}:Doubling", "options": {"largest": 50}}
    job["reward"]["terms"] = {"accuracy": 1.0, f"{reward}:brevity": 0.2}
    job["rollout"] |= {"max_prompt_length": 5, "num_prompts": 4}
    job["train"]["num_steps"] = 6
    job["checkpoint"]["save_every"] = 2
    job["evaluate"] = {"num_items": 2, "num_samples": 2}
    job["resources"]["ranks_per_node"] = 1
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump(job))
    return str(path)


def test_killed_and_resumed_it_is_the_same_and_an_edit_reaches_it_in_no_way(tmp_path: Path) -> None:
    job = _job(tmp_path)
    quiet = submit(tmp_path / "runs", "quiet", job=job).run
    never = at(held(tmp_path / "never", 4))
    disturbed = submit(tmp_path / "runs", "disturbed", job=job, env=never).run
    for name in ("my_task.py", "rewards.py"):
        write(tmp_path, name, "raise RuntimeError('edited')\n")
    wait_step(disturbed, 3)
    kill_rank(disturbed, 0, signal.SIGKILL)
    assert wait_over(disturbed)[-1].cause is Cause.finished
    assert [attempt.cause for attempt in wait_over(quiet)] == [Cause.finished]
    assert_same_run(disturbed, quiet)

    words = ["--resume", "--run-root", str(tmp_path / "runs"), "--run-name", "quiet", "train.num_steps=8"]
    again = [sys.executable, "-m", "r1hpc.submit", *words, "--executor", "local"]
    done = subprocess.run(again, cwd=CHECKOUT, env=run_environment(), capture_output=True, text=True)
    assert done.returncode == 2
    assert "my_task.py:Doubling has changed since this run began with it (my_task.py in " in done.stderr
    assert done.stderr.count("\n") == 1
