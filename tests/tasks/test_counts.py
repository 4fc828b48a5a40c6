"""A stage that asks more questions than there are is told from which item on they come again."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from r1hpc.config.schema.rl import GenerateConfig, RlConfig, RolloutConfig, TaskConfig
from r1hpc.config.schema.run import RunConfig, TrainConfig
from r1hpc.tasks.problems.asked_items import asked_items, repeated
from r1hpc.tasks.problems.file import QuestionFile
from r1hpc.tasks.problems.registry import make_task
from r1hpc.tasks.try_out import check_questions


@pytest.fixture
def task(tmp_path: Path) -> TaskConfig:
    rows = [{"question": f"{n}+{n}", "answer": str(2 * n)} for n in range(200)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TaskConfig("file", options={"path": str(tmp_path / "sums.jsonl")})


def _notes(config: RunConfig) -> list[str]:
    return repeated(config, make_task(config.task))


def _rl(task: TaskConfig, num_steps: int, **rl: Any) -> RunConfig:
    rollout = RolloutConfig(num_prompts=8, num_generations=4)
    train = TrainConfig(num_steps=num_steps, global_batch_size=32)
    return RunConfig(stage="rl", task=task, rollout=rollout, train=train, rl=RlConfig(**rl))


def test_rl_is_told_where_a_pass_ends(task: TaskConfig) -> None:
    there = make_task(task).num_questions()
    assert there
    first = there % 8
    one_pass = _rl(replace(task, first_item=first), there // 8)
    assert asked_items(one_pass) == range(first, there)
    assert _notes(one_pass) == []
    (said,) = _notes(_rl(replace(task, first_item=first + 1), there // 8))
    assert said.startswith(
        f"task file is asked items {first + 1} to {there}, and has {there} different questions"
    )
    assert f"from item {there} on they come again" in said
    (said,) = _notes(_rl(task, 100))
    assert f"is asked items 0 to 799, and has {there} different" in said
    (said,) = _notes(_rl(task, 10, max_resamples=2))
    assert "items 0 to at most 239, and" in said


def test_rl_beyond_the_first_pass_is_told(task: TaskConfig) -> None:
    a_pass = make_task(task).num_questions() or 0
    (said,) = _notes(_rl(replace(task, first_item=a_pass), 1))
    assert said.endswith("all of them are among the earlier items, which earlier stages may have shown")


def test_a_pass_has_a_question_as_often_as_it_stands_in_the_list(tmp_path: Path) -> None:
    rows = [{"question": f"{n % 90}+0", "answer": str(n % 90)} for n in range(100)]
    (tmp_path / "twice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = TaskConfig("file", options={"path": str(tmp_path / "twice.jsonl")})
    made = make_task(task)
    assert isinstance(made, QuestionFile)
    a_pass, different = made.items_per_pass(), made.num_questions()
    assert different < a_pass
    at = 7 * a_pass - 5

    def notes(num_items: int) -> list[str]:
        wanted = GenerateConfig(num_items=num_items, first_item=at)
        return _notes(RunConfig(stage="generate", task=task, generate=wanted))

    assert notes(5) == []
    (said,) = notes(6)
    assert f"has {different} different questions: from item {at + 5} on they come again" in said


def test_of_few_questions_that_are_drawn_no_item_is_promised() -> None:
    few = TaskConfig(options={"num_terms": 2})
    there = make_task(few).num_questions() or 0

    def notes(num_items: int) -> list[str]:
        wanted = GenerateConfig(num_items=num_items, first_item=11)
        return _notes(RunConfig(stage="generate", task=few, generate=wanted))

    assert notes(there) == []
    (said,) = notes(there + 1)
    assert said.endswith(f"from item {there + 11} on at the latest they come again")


@pytest.mark.parametrize(("stage", "held_out"), [("traces", False), ("generate", False), ("generate", True)])
def test_demonstrations_and_completions_are_told_too(task: TaskConfig, stage: str, held_out: bool) -> None:
    there = make_task(task).num_questions(held_out) or 0

    def notes(first_item: int, num_items: int) -> list[str]:
        wanted = GenerateConfig(num_items=num_items, first_item=first_item, held_out=held_out)
        return _notes(RunConfig(stage=stage, task=task, generate=wanted))

    assert notes(2, there - 2) == []
    assert notes(1000 * there, there) == [], "far on, and still one pass"
    (said,) = notes(2, there)
    assert ("held-out questions" in said) == held_out
    assert said.endswith(f"from item {there} on they come again")


def test_of_questions_that_are_drawn_nothing_is_said() -> None:
    assert _notes(RunConfig(stage="generate", generate=GenerateConfig(num_items=10**6))) == []


def test_of_several_tasks_each_is_looked_at(task: TaskConfig) -> None:
    part = {"name": "file", "options": task.options}
    mixed = TaskConfig(mix={"sums": {**part, "weight": 2}, "drawn": {"name": "chain_sum"}})
    there = make_task(task).num_questions() or 0

    def notes(first_item: int, num_items: int) -> list[str]:
        wanted = GenerateConfig(num_items=num_items, first_item=first_item)
        return _notes(RunConfig(stage="generate", task=mixed, generate=wanted))

    one_pass = there // 2 * 3
    assert notes(0, one_pass) == notes(2 * 3 * there, one_pass) == []
    assert notes(one_pass - 2, 4) == [], "no block lies wholly in these"
    (said,) = notes(one_pass - 3, 9)
    assert said.startswith(f"task sums is asked its items {one_pass // 3 * 2 - 2} to ")
    assert said.endswith(f"has {there} different questions: from item {there} on they come again")


def test_a_new_run_is_told_and_one_of_before_is_not(task: TaskConfig, tmp_path: Path) -> None:
    config = RunConfig(stage="traces", task=task, generate=GenerateConfig(num_items=500, thinking_share=0.0))
    said: list[str] = []
    check_questions(config, tmp_path, said.append)
    assert said == []
    check_questions(config, None, said.append)
    assert said == _notes(config) != []
