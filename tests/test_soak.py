"""Thirty kills of whole runs at random moments; `make soak`. R1HPC_SEED repeats a printed seed."""

import os
import random
import signal
import time
from itertools import pairwise
from pathlib import Path

import pytest

from r1hpc.base.rundir import RunDir
from r1hpc.telemetry.attempts import Cause, read_history
from r1hpc.telemetry.metrics import read_steps
from tests.runs import assert_same_run, kill_rank, rank_pids, submit, wait_attempt, wait_over, wait_until

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3000)]

_KILLS = 30
_SAVE_EVERY = 5
_SIZE = (
    "--nodes",
    "2",
    "train.num_steps=400",
    f"checkpoint.save_every={_SAVE_EVERY}",
    "train.global_batch_size=8",
)
_PATIENT = ("limits.max_crashes=-1", "limits.max_attempts_without_checkpoint=1000")


def test_thirty_kills_of_whole_runs(tmp_path: Path) -> None:
    seed = int(os.environ.get("R1HPC_SEED", time.time_ns() % 10**6))
    print(f"R1HPC_SEED={seed}")
    chance = random.Random(seed)
    quiet = submit(tmp_path, "quiet", *_SIZE).run
    wait_over(quiet)
    slow = {**os.environ, "R1HPC_FAILPOINT": "step.begin:sleep=0.15::*"}
    run = submit(tmp_path, "killed", *_SIZE, *_PATIENT, env=slow).run
    for kill in range(1, _KILLS + 1):
        wait_attempt(run, kill)
        wait_until("two ranks", lambda: len(rank_pids(run)) == 2, 60, run)
        # Most moments lie in training and saving, some in the start-up.
        time.sleep(chance.uniform(1, 11))
        kill_something(run, chance)
    attempts = wait_over(run, 300)
    assert len(attempts) == _KILLS + 1
    assert {a.cause for a in attempts[:-1]} <= {Cause.crash}
    assert attempts[-1].cause is Cause.finished
    for before, after in pairwise(attempts):
        if before.last_step is not None:
            assert before.last_step - (after.resumed_from or 0) <= _SAVE_EVERY
    print(f"{len(read_steps(run).lost)} steps lost in {_KILLS} kills")
    assert_same_run(run, quiet)


def kill_something(run: RunDir, chance: random.Random) -> None:
    """SIGKILL one rank or both. The run must not be over: then there is nothing left to kill."""
    assert read_history(run).attempts[-1].cause is None, "the run ended before all kills: make it longer"
    victims = chance.choice([[0], [1], [0, 1]])
    for rank in victims:
        try:
            kill_rank(run, rank, signal.SIGKILL)
        except (KeyError, ProcessLookupError):
            continue
