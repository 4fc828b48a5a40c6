"""Several tasks in one run: exact shares, own judges, a report of each."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from r1hpc.base.errors import UsageError
from r1hpc.config.schema.rl import EvaluateConfig, RewardConfig, RolloutConfig, TaskConfig
from r1hpc.config.schema.run import RunConfig, TrainConfig
from r1hpc.tasks.problems.registry import make_task
from r1hpc.tasks.problems.task import Task, check_num_held_out, members
from r1hpc.tasks.rewards import Completion, Scorer
from r1hpc.tasks.text.format import compose
from r1hpc.tasks.try_out import check_questions


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


def test_weights_that_rounding_changes_are_refused_for_a_new_run(tmp_path: Path) -> None:
    def check(sums: float, game: float, code: Path | None = None) -> None:
        mix = {"sums": {"name": "chain_sum", "weight": sums}, "game": {"name": "countdown", "weight": game}}
        check_questions(RunConfig(stage="traces", task=TaskConfig(mix=mix)), code)

    with pytest.raises(UsageError, match="would become sums: 99, game: 1"):
        check(150, 1)
    check(150, 1, code=tmp_path)  # a resumed run keeps 99 to 1
    check(99, 1)
    check(0.7, 0.3)


def test_a_task_with_too_few_held_out_questions_limits_the_mixture(tmp_path: Path) -> None:
    mix: dict[str, Any] = {"sums": {"name": "chain_sum", "weight": 1}}
    mix |= {"mine": {"name": "file", "weight": 3, "options": {"path": _questions(tmp_path, 30)}}}
    task = make_task(TaskConfig(mix=mix))
    there = members(task)["mine"].num_questions(held_out=True)
    assert there is not None
    assert 0 < there < 6
    with pytest.raises(UsageError, match=r"evaluate.num_items is 64, but task sums \+ mine has no more than"):
        check_num_held_out(task, 64)


def test_the_prompts_of_each_list_are_looked_at_not_only_until_the_shortest_repeats(tmp_path: Path) -> None:
    """A longer one would stop the run in the middle."""
    parts = {"few": _questions(tmp_path, 30, "few"), "many": _questions(tmp_path, 400, "many")}
    mix = {
        label: {"name": "file", "options": {"path": path, "template": "{question}"}}
        for label, path in parts.items()
    }
    config = RunConfig(
        stage="rl",
        task=TaskConfig(mix=mix),
        rollout=RolloutConfig(num_prompts=64),
        train=TrainConfig(num_steps=20, global_batch_size=512),
        evaluate=EvaluateConfig(num_items=2),
    )
    asked = {item.prompt for item in check_questions(config) if item.prompt.startswith("many")}
    assert len(asked) > 340, "nine in ten of 400"


def _questions(folder: Path, number: int, name: str = "mine") -> str:
    path = folder / f"{name}.jsonl"
    rows = [{"question": f"{name} {n}=", "answer": str(n)} for n in range(number)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("stage", ["rl", "evaluate"])
def test_held_out_prompts_are_looked_at_too(tmp_path: Path, stage: str) -> None:
    """One of them may be the longest, and would end the run at its first evaluation."""
    options = {"path": _questions(tmp_path, 60), "template": "{question}"}
    task = make_task(TaskConfig("file", options=options))
    held_out = {task.item(index, held_out=True).prompt for index in range(4)}
    config = RunConfig(
        stage=stage, task=TaskConfig("file", options=options), evaluate=EvaluateConfig(num_items=4)
    )
    assert held_out <= {item.prompt for item in check_questions(config)}
