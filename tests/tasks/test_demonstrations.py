"""What stage traces writes, and what of it is tried before the stage is submitted."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from r1hpc.base.errors import UsageError
from r1hpc.config.schema.rl import GenerateConfig, RewardConfig, TaskConfig
from r1hpc.config.schema.run import RunConfig
from r1hpc.tasks.problems.asked_items import demonstrate
from r1hpc.tasks.problems.registry import make_task
from r1hpc.tasks.text.format import take_apart
from r1hpc.tasks.try_out import check_questions
from tests.tasks.own_code import TASK, write

_TRACES = RunConfig(stage="traces", task=TaskConfig(options={"num_terms": 3}))


def _part(path: Path) -> dict[str, object]:
    return {"name": "file", "options": {"path": str(path)}}


@pytest.mark.parametrize("form", ["tags", "boxed"])
def test_an_answer_is_shown_in_the_form_that_counts(form: str) -> None:
    config = replace(_TRACES, reward=RewardConfig(answer_in=form))
    task = make_task(config.task)
    shown = [demonstrate(task, config, index) for index in range(40)]
    assert {each.thinking for each in shown} == {True, False}
    for each in shown:
        parts = take_apart(each.completion, boxed=form == "boxed")
        assert (parts.answer, parts.well_formed) == (each.item.answer, True)
        assert bool(parts.thinking) == each.thinking
        assert ("<answer>" in each.completion) == (form == "tags")


def test_an_answer_without_reasoning_to_show_is_found_before_the_queue(
    tmp_path: Path,
) -> None:
    rows = [{"question": f"{n}?", "answer": f"It is {n}. #### {n}"} for n in range(200)]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = GenerateConfig(num_items=1000, thinking_share=1.0)
    config = RunConfig(
        stage="traces", task=TaskConfig(name="file", options={"path": str(path)}), generate=shown
    )
    mixed = replace(config, task=TaskConfig(mix={"words": _part(path), "sums": {"name": "chain_sum"}}))
    for each in (config, mixed):
        check_questions(each)
    rows[150]["answer"] = "150"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UsageError, match=r"no reasoning before #### .* set generate\.thinking_share=0"):
        check_questions(config)
    with pytest.raises(UsageError, match=r"no reasoning before #### .* set generate\.thinking_share=0"):
        check_questions(mixed)


def test_of_ones_own_task_many_are_tried(tmp_path: Path) -> None:
    """One of a hundred cannot be shown."""
    text = TASK.replace(
        "return f\"{metadata['number']}+",
        "return '</think>' if prompt == '2*7=' else f\"{metadata['number']}+",
    )
    config = RunConfig(
        stage="traces",
        task=TaskConfig(f"{write(tmp_path, 'mine.py', text)}:Doubling"),
        generate=GenerateConfig(num_items=1000, thinking_share=1.0),
    )
    with pytest.raises(UsageError, match=r"mine\.py:Doubling: the thinking of item \d+ holds one of <think>"):
        check_questions(config)


@pytest.mark.parametrize("answer", ["\\boxed{42}", "Six times seven. #### \\boxed{42}"])
def test_an_answer_that_is_a_box_is_not_boxed_again(tmp_path: Path, answer: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"question": f"{n}?", "answer": answer}) + "\n" for n in range(20)))
    config = RunConfig(
        stage="traces",
        task=TaskConfig(name="file", options={"path": str(path), "template": "{question} In \\boxed{}."}),
        reward=RewardConfig(answer_in="boxed"),
        generate=GenerateConfig(num_items=5, thinking_share=0.0),
    )
    check_questions(config)
    assert demonstrate(make_task(config.task), config, 0).completion == "<think></think>\\boxed{42}"
