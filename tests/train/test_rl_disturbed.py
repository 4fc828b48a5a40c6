"""Reinforcement learning on two real DeepSpeed ranks, disturbed in every phase: the same run to the bit.

pytest tests/train/test_rl_disturbed.py -m soak       # about four minutes on two quiet cores
"""

import hashlib
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from r1hpc.base.run_dir import RunDir
from r1hpc.telemetry.records.attempts import Cause, read_history
from r1hpc.telemetry.records.evaluations import read_evaluations
from r1hpc.telemetry.records.metrics import Step, audit_ledger, read_ledger, read_steps
from tests.runs import submit, wait_over

pytestmark = pytest.mark.timeout(900)

GRPO = ("rl.num_iterations=2", "limits.max_crashes=9", "train.num_steps=20")
"""Two passes over a rollout in halves: four updates, so that a save falls in the middle of them."""
PPO = (
    "rl.algorithm=ppo",
    "rl.kl_coef=0.05",
    "rl.num_iterations=2",
    "limits.max_crashes=9",
    "train.num_steps=20",
)

# phase, what happens, to which rank, at its nth time in that attempt, in which attempt
DISTURBANCES = (
    "evaluate.batch:term:1:1:1",  # before the first step
    "rollout.batch:term:0:2:2",
    "reward.begin:kill9:1:2:3",
    "update.begin:kill9:0:6:4",  # in the middle of a rollout's updates
    "reward.begin:term:0:1:5",
    "save.written:kill9:1:1:6",
    "update.begin:term:1:2:7",
    "evaluate.batch:term:1:1:8",  # between two updates of a rollout
    "evaluate.batch:kill9:0:1:9",
)
STOPPED = {1, 2, 5, 7, 8}
"""The attempts that were ended by SIGTERM."""


def follow_through(root: Path, name: str, *words: str, disturbed: bool, timeout_s: float = 600) -> RunDir:
    """A run of jobs/rl_smoke.yaml, waited for."""
    env = {**os.environ, **({"R1HPC_FAILPOINT": ",".join(DISTURBANCES)} if disturbed else {})}
    job = submit(root, name, *words, job="jobs/rl_smoke.yaml", env=env)
    wait_over(job.run, timeout_s)
    return job.run


def weights_of(run: RunDir) -> str:
    return hashlib.sha256((run.model / "model.safetensors").read_bytes()).hexdigest()


def facts_of(step: Step) -> dict[str, Any]:
    """Everything a step says but times, and who took it."""
    extra = {key: value for key, value in (step.extra or {}).items() if not key.endswith("_time_s")}
    return {"loss": step.loss, "grad_norm": step.grad_norm, "lr": step.lr, "tokens": step.tokens, **extra}


def assert_same_learning(disturbed: RunDir, undisturbed: RunDir) -> None:
    """Rewards, losses, prompts in order, completions and the weights at the end: the same bits."""
    ours, theirs = read_steps(disturbed).effective, read_steps(undisturbed).effective
    assert {n: facts_of(step) for n, step in ours.items()} == {
        n: facts_of(step) for n, step in theirs.items()
    }
    data = [
        {step: record.data for step, record in read_ledger(run).items()} for run in (disturbed, undisturbed)
    ]
    assert data[0] == data[1]
    judged = [
        {step: {**line, "attempt": 0, "time": 0} for step, line in read_evaluations(run).items()}
        for run in (disturbed, undisturbed)
    ]
    assert judged[0] == judged[1]
    assert audit_ledger(disturbed).exactly_once
    assert weights_of(disturbed) == weights_of(undisturbed)


def assert_little_was_lost(run: RunDir, stopped: set[int], save_every: int) -> None:
    """Asked to stop, an attempt loses no update; killed, an interval, and one that is being written."""
    for attempt, num_lost in Counter(step.attempt for step in read_steps(run).lost).items():
        assert num_lost <= (0 if attempt in stopped else 2 * save_every), f"attempt {attempt}"


@pytest.mark.soak  # GRPO goes through the same on Slurm: tests/test_reasoning_slurm.py
@pytest.mark.parametrize(
    "algorithm",
    [pytest.param(GRPO, id="grpo"), pytest.param(PPO, id="ppo")],
)
def test_disturbed_in_every_phase_it_is_the_same_run(tmp_path: Path, algorithm: tuple[str, ...]) -> None:
    quiet = follow_through(tmp_path, "quiet", *algorithm, disturbed=False)
    run = follow_through(tmp_path, "disturbed", *algorithm, disturbed=True)
    causes = [attempt.cause for attempt in read_history(run).attempts]
    expected = [Cause.preempted if n in STOPPED else Cause.crash for n in range(1, len(DISTURBANCES) + 1)]
    assert causes == [*expected, Cause.finished]
    assert_same_learning(run, quiet)
    assert_little_was_lost(run, STOPPED, save_every=4)
    log = run.rank_log(3, 0).read_text()
    assert "groups were already done" in log, "what attempt 2 had sampled was not used again"
