"""A note says if a stage asks more items than its task has questions."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from r1hpc.config.schema.rl import GenerateConfig, RlConfig, RolloutConfig, TaskConfig
from r1hpc.config.schema.run import RunConfig, TrainConfig
from r1hpc.tasks.dry_check import check_questions
from r1hpc.tasks.problems.asked import asked_items, repeated
from r1hpc.tasks.problems.registry import make_task


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


def test_a_pass_is_asked_without_a_note(task: TaskConfig) -> None:
    there = make_task(task).num_questions()
    assert there
    one_pass = _rl(replace(task, first_item=7), there // 8)
    assert asked_items(one_pass) == range(7, 7 + there // 8 * 8)
    assert _notes(one_pass) == []
    (said,) = _notes(_rl(task, 100))
    assert said == f"task file is asked 800 items, and {there} questions come before one comes again"
    (said,) = _notes(_rl(task, 10, max_resamples=2))
    assert "asked up to 240 items" in said


@pytest.mark.parametrize(("stage", "held_out"), [("traces", False), ("generate", False), ("generate", True)])
def test_demonstrations_and_completions_are_told_too(task: TaskConfig, stage: str, held_out: bool) -> None:
    there = make_task(task).num_questions(held_out) or 0

    def notes(num_items: int) -> list[str]:
        wanted = GenerateConfig(num_items=num_items, first_item=2, held_out=held_out)
        return _notes(RunConfig(stage=stage, task=task, generate=wanted))

    assert notes(there) == []
    (said,) = notes(there + 1)
    assert ("held-out questions" in said) == held_out


def test_of_questions_without_end_nothing_is_said() -> None:
    assert _notes(RunConfig(stage="generate", generate=GenerateConfig(num_items=10**6))) == []


def test_the_scarcest_task_of_a_mixture_counts(task: TaskConfig) -> None:
    part = {"name": "file", "options": task.options}
    mixed = TaskConfig(mix={"sums": {**part, "weight": 2}, "drawn": {"name": "chain_sum"}})
    there = make_task(task).num_questions() or 0

    def notes(num_items: int) -> list[str]:
        return _notes(RunConfig(stage="generate", task=mixed, generate=GenerateConfig(num_items=num_items)))

    assert notes(there // 2 * 3) == []
    (said,) = notes(there // 2 * 3 + 1)
    assert said.startswith("task sums + drawn is asked")


def test_a_new_run_is_told_and_one_of_before_is_not(task: TaskConfig, tmp_path: Path) -> None:
    config = RunConfig(stage="traces", task=task, generate=GenerateConfig(num_items=500, thinking_share=0.0))
    said: list[str] = []
    check_questions(config, tmp_path, said.append)
    assert said == []
    check_questions(config, None, said.append)
    assert said == _notes(config) != []
