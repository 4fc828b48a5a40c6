"""Several tasks in one run: exact shares, own judges, a report of each."""

from collections import Counter
from typing import Any

import pytest

from r1hpc.base.errors import UsageError
from r1hpc.config.reasoning import RewardConfig, TaskConfig
from r1hpc.tasks.completion import compose
from r1hpc.tasks.mixture import check_weights
from r1hpc.tasks.registry import make_task
from r1hpc.tasks.rewards import Completion, Scorer
from r1hpc.tasks.task import Task


def _mix(seed: int = 0, **weights: float) -> Task:
    names = {"sums": "chain_sum", "game": "countdown", "more": "chain_sum"}
    mix: dict[str, Any] = {label: {"name": names[label], "weight": w} for label, w in weights.items()}
    return make_task(TaskConfig(seed=seed, mix=mix))


def test_every_block_holds_the_weights_exactly_in_an_order_of_its_own() -> None:
    task = _mix(sums=0.7, game=0.3)
    blocks = [[task.item(10 * b + i).task for i in range(10)] for b in range(20)]
    assert all(Counter(block) == {"sums": 7, "game": 3} for block in blocks)
    assert len({tuple(block) for block in blocks}) > 10
    assert [task.item(7), task.item(7)] == [_mix(sums=0.7, game=0.3).item(7)] * 2
    assert task.item(7).index == 7


def test_each_tasks_items_come_in_its_own_order_none_left_out() -> None:
    task, alone = _mix(sums=2, game=1), make_task(TaskConfig("chain_sum"))
    mine = [item.prompt for item in map(task.item, range(60)) if item.task == "sums"]
    assert sorted(mine) == sorted(alone.item(index).prompt for index in range(40))


def test_each_is_judged_by_its_own_judge_and_shown_by_itself() -> None:
    task = _mix(sums=1, game=1)
    items = [task.item(index) for index in range(8)]
    assert len({item.task for item in items}) == 2
    groups = [
        (item, [Completion(text, 9, False) for text in (task.demonstration(item, True), compose("", "x"))])
        for item in items
    ]
    with Scorer(RewardConfig(), task, max_completion_length=64) as scorer:
        scores = scorer.score_groups(groups)
    assert [[score.correct for score in group] for group in scores] == [[True, False]] * 8


def test_the_id_names_tasks_and_weights() -> None:
    ids = {_mix(sums=1, game=1).id, _mix(sums=1, game=2).id, _mix(3, sums=1, game=1).id, _mix(sums=1).id}
    assert len(ids) == 4
    assert _mix(sums=0.5, game=0.5).id == _mix(sums=2, game=2).id


def test_weights_that_are_too_far_apart() -> None:
    with pytest.raises(UsageError, match="too far apart or too fine"):
        _mix(sums=1, game=1e-6)
    assert _mix(sums=150, game=1), "a run of before goes on, as 99 to 1"
    with pytest.raises(UsageError, match="would become sums: 99, game: 1"):
        check_weights({"sums": 150, "game": 1})
    check_weights({"sums": 99, "game": 1})
    check_weights({"sums": 0.7, "game": 0.3})
