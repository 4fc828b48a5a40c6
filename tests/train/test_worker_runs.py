"""Trainers and rollout workers as runs: killed and damaged, each rollout is whole, and its record replays."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r1hpc.attempt.state.state import read_situation
from r1hpc.base.run_dir import RunDir
from r1hpc.telemetry.records.attempts import Cause, read_history
from r1hpc.telemetry.records.metrics import last_steps, read_steps
from r1hpc.train.exchange.mailbox import group_path, read_beat, read_boxes
from r1hpc.train.rollout.groups import read_groups
from tests.runs import at, command_output, held, submit, wait_over, wait_until
from tests.train.test_rl_disturbed import weights_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

WORDS = (
    *("rl.max_staleness=2", "train.num_steps=12", "checkpoint.save_every=4", "evaluate.every=0"),
    *("resources.ranks_per_node=2", "evaluate.num_items=2", "limits.max_crashes=9"),
)
"""Six rollouts of eight groups, with two updates each."""
NUM_ROLLOUTS, NUM_ITEMS = 6, 8


def start_trainer(root: Path, name: str, *words: str, env: dict[str, str] | None = None) -> RunDir:
    return submit(root, name, *WORDS, *words, job="jobs/rl_smoke.yaml", env=env).run


def start_worker(trainer: RunDir, name: str, *failpoints: str) -> RunDir:
    words = (f"workers.trainer={trainer.path}", "resources.gpus_per_node=0", "limits.max_crashes=9")
    return submit(trainer.path.parent, name, *words, job="jobs/rollout.yaml", env=at(*failpoints)).run


def records(run: RunDir) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(run.trained.glob("*.json"))]


def tear_one(trainer: RunDir, item: int) -> bool:
    """Cut the file of an item's group in the box of a worker, once it is announced."""
    for worker in trainer.workers.glob("*"):
        for box in read_boxes(worker):
            beat = read_beat(box)
            for group in beat["groups"] if beat else []:
                if group["item"] == item:
                    os.truncate(group_path(box, group["number"]), 100)
                    return True
    return False


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunDir]:
    """One worker and later the trainer are killed with SIGKILL, and one group's file is damaged."""
    root = tmp_path_factory.mktemp("runs")
    torn = root / "torn"
    env = at(held(torn, 3, rank=0), "update.begin:kill9:0:6:1")
    words = ("workers.patience_s=100", "workers.silence_s=5")
    run = start_trainer(root, "trainer", *words, env=env)
    # Between a group's file and its announcement, in its first attempt.
    workers = [start_worker(run, "killed", "box.commit:kill9:0:3:1"), start_worker(run, "other")]
    try:
        wait_until("a group of item 9", lambda: tear_one(run, 9), 200, run)
        torn.touch()
        wait_over(run)
        for worker in workers:
            wait_over(worker)
        yield run
    finally:
        for started in (run, *workers):
            if not read_situation(started).state.is_over:
                command_output(["-m", "r1hpc.cancel", str(started.path)])


def test_every_run_goes_on_after_its_kill_and_is_finished(trainer: RunDir) -> None:
    root = trainer.path.parent
    causes = {
        name: [attempt.cause for attempt in read_history(RunDir(root / name)).attempts]
        for name in ("trainer", "killed", "other")
    }
    assert causes == {
        "trainer": [Cause.crash, Cause.finished],
        "killed": [Cause.crash, Cause.finished],
        "other": [Cause.finished],
    }
    assert sorted(read_steps(trainer).effective) == list(range(1, 13))


def test_each_item_is_trained_on_once_by_weights_that_were_not_too_old(trainer: RunDir) -> None:
    lines = records(trainer)
    items = [item for record in lines for item, _ in record["groups"]]
    assert items == list(range(NUM_ROLLOUTS * NUM_ITEMS))
    assert {worker for record in lines for _, worker in record["groups"]} >= {"killed", "other"}
    assert max(record["staleness_max"] for record in lines) <= 2
    assert max(record["staleness_mean"] for record in lines) > 0


def test_a_damaged_group_is_dropped_by_name_and_sampled_again(trainer: RunDir) -> None:
    dropped = [one for record in records(trainer) for one in record["dropped"]]
    [(item, worker, reason)] = [one for one in dropped if "first" not in one[2]]
    assert (item, "sha256" in reason) == (9, True)
    assert worker in ("killed", "other")


def test_its_record_replays_to_the_same_weights(trainer: RunDir, tmp_path: Path) -> None:
    replay = start_trainer(tmp_path, "replay", f"rl.replay={trainer.path}")
    wait_over(replay)
    assert weights_of(replay) == weights_of(trainer)
    losses = [[step.loss for step in read_steps(one).effective.values()] for one in (replay, trainer)]
    assert losses[0] == losses[1]


def test_without_workers_the_trainer_samples_itself_and_waits_once(trainer: RunDir, tmp_path: Path) -> None:
    """Its first rollout is what the workers sampled, with the same weights and random streams."""
    run = start_trainer(tmp_path, "alone", "workers.patience_s=3")
    wait_over(run)
    extras = [step.extra or {} for step in read_steps(run).effective.values()]
    first = [extra for extra in extras if extra["update"] == 0]
    assert [line["worker_groups"] for line in first] == [0] * NUM_ROLLOUTS
    assert all(line["workers_wait_s"] < 2 for line in first[1:])
    assert last_steps(run, 1)[-1].global_step == 12
    ours, theirs = (read_groups(one.record(0).with_suffix(".npz"))[1] for one in (run, trainer))
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    np.testing.assert_array_equal(ours.rewards, theirs.rewards)
    np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-4)
