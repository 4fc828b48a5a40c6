"""Test files are asked whole and in order, every question once."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from r1hpc.base.errors import UsageError
from r1hpc.config.schema.rl import EvaluateConfig, RewardConfig, TaskConfig
from r1hpc.config.schema.run import ModelConfig, RunConfig
from r1hpc.plan.topology.parts import num_items
from r1hpc.tasks.problems.benchmark import Benchmarks, with_counted_sets
from r1hpc.tasks.try_out import _counts_tags, check_questions


def _file(folder: Path, name: str, count: int) -> str:
    path = folder / name
    rows = [{"question": f"{n} and {n}?", "answer": str(2 * n)} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _config(**evaluate: Any) -> RunConfig:
    task = TaskConfig(options={"template": "{question}"})
    return RunConfig(stage="evaluate", task=task, evaluate=EvaluateConfig(**evaluate))


def _asked(config: RunConfig) -> list[str]:
    benchmarks = Benchmarks.of(config)
    assert benchmarks is not None
    return [benchmarks.item(index).prompt for index in range(num_items(with_counted_sets(config)))]


@pytest.mark.parametrize(
    ("there", "wanted", "asked"), [(30, 30, 30), (600, None, 600), (600, 600, 600), (600, 9, 9)]
)
def test_a_file_is_asked_whole_and_in_order(
    tmp_path: Path, there: int, wanted: int | None, asked: int
) -> None:
    config = _config(path=_file(tmp_path, "test.jsonl", there), num_items=wanted)
    assert _asked(config) == [f"{n} and {n}?" for n in range(asked)]


def test_more_than_there_are_is_refused_and_a_row_that_stands_twice_counts_once(tmp_path: Path) -> None:
    path = Path(_file(tmp_path, "test.jsonl", 30))
    with pytest.raises(UsageError, match=r"asks 31 questions of test, but test.jsonl has 30: set evaluate"):
        _asked(_config(path=str(path), num_items=31))
    path.write_text(path.read_text() * 2)
    assert len(_asked(_config(path=str(path)))) == 30
    with pytest.raises(UsageError, match=r"has 30 \(60 rows, some of them the same\)"):
        _asked(_config(path=str(path), num_items=31))


def test_who_counts_boxes_does_not_ask_for_tags(tmp_path: Path) -> None:
    """The template that is taken where none is given asks for <answer>."""
    path = _file(tmp_path, "test.jsonl", 30)
    boxed = replace(_config(path=path), reward=RewardConfig(answer_in="boxed"))
    in_tags = ModelConfig(system_prompt="Answer inside <answer></answer>.")
    in_boxes = TaskConfig(options={"template": "{question} Put the answer within \\boxed{}."})
    for said, config in (
        ("the template of the prompts", replace(boxed, task=TaskConfig())),
        (
            "the template of the prompts",
            replace(boxed, stage="rl", task=TaskConfig(name="file", options={"path": path})),
        ),
        (r"model\.system_prompt", replace(boxed, model=in_tags)),
    ):
        with pytest.raises(UsageError, match=f"answer_in=boxed .*{said} asks for <answer> tags"):
            check_questions(config)
    check_questions(boxed)
    check_questions(replace(boxed, model=in_tags, task=in_boxes))  # open-r1: a box inside the tags
    with Path(path).open("a") as file:  # a question about tags
        file.write('{"question": "What is <answer>?", "answer": "1"}\n')
        file.write('{"question": "What is \\\\boxed{1}?", "answer": "1"}\n')
    check_questions(boxed)
    rl = replace(boxed, stage="rl", task=TaskConfig(name="file", options={"path": path}))
    with pytest.raises(UsageError, match="the template of the prompts asks for <answer> tags"):
        check_questions(rl)


def test_who_counts_tags_does_not_ask_for_a_box(tmp_path: Path) -> None:
    asked = _config(path=_file(tmp_path, "test.jsonl", 30))
    in_boxes = TaskConfig(options={"template": "{question} Put the answer within \\boxed{}."})
    with pytest.raises(
        UsageError, match=r"answer_in=tags .* asks for \\boxed\{\}: set reward.answer_in=boxed"
    ):
        check_questions(replace(asked, task=in_boxes))
    check_questions(asked)
    check_questions(replace(asked, task=in_boxes, reward=RewardConfig(answer_in="boxed")))
    rl = replace(asked, stage="rl", task=TaskConfig(name="chain_sum"))
    assert _counts_tags(rl)
    own = RewardConfig(terms={"rew.py:score": 1.0})
    assert not _counts_tags(replace(rl, reward=own)), "it is given the whole completion"


def test_each_set_may_have_a_judge_of_its_own(tmp_path: Path) -> None:
    one, two = _file(tmp_path, "one.jsonl", 5), _file(tmp_path, "two.jsonl", 3)
    config = _config(sets={"a": {"path": one, "judge": "exact"}, "b": {"path": two}})
    benchmarks = Benchmarks.of(config)
    assert benchmarks is not None
    assert [each.judge for each in benchmarks.members.values()] == ["exact", "math"]
    with pytest.raises(UsageError, match=r"evaluate.sets.a.judge is 'near'"):
        Benchmarks.of(_config(sets={"a": {"path": one, "judge": "near"}}))


def test_several_files_one_after_the_other_under_their_labels(tmp_path: Path) -> None:
    one, two = _file(tmp_path, "one.jsonl", 5), _file(tmp_path, "two.jsonl", 3)
    sets: dict[str, Any] = {
        "a": {"path": one},
        "b": {"path": two, "num_items": 2, "template": "Q {question}"},
    }
    benchmarks = Benchmarks.of(_config(sets=sets))
    assert benchmarks is not None
    items = [benchmarks.item(index) for index in range(benchmarks.num_items)]
    assert [item.task for item in items] == ["a"] * 5 + ["b"] * 2
    assert [item.index for item in items] == list(range(7))
    assert items[5].prompt == "Q 0 and 0?"
    counted = with_counted_sets(_config(sets=sets))
    assert [part["num_items"] for part in counted.evaluate.sets.values()] == [5, 2]
    assert with_counted_sets(counted) == counted


def test_the_id_follows_content_number_and_columns(tmp_path: Path) -> None:
    def name(config: RunConfig) -> str:
        benchmarks = Benchmarks.of(config)
        assert benchmarks is not None
        return benchmarks.id

    config = _config(path=_file(tmp_path, "test.jsonl", 30))
    first = name(config)
    assert name(with_counted_sets(config)) == first
    assert name(replace(config, evaluate=replace(config.evaluate, num_items=29))) != first
    _file(tmp_path, "test.jsonl", 31)
    assert name(replace(config, evaluate=replace(config.evaluate, num_items=30))) != first


def test_of_several_files_the_one_that_has_too_few_says_how_to_ask_fewer(tmp_path: Path) -> None:
    sets = {"few": {"path": _file(tmp_path, "few.jsonl", 3)}, "many": {"path": _file(tmp_path, "m.jsonl", 9)}}
    with pytest.raises(UsageError, match=r"set evaluate.sets.few.num_items=3, or leave it out"):
        _asked(_config(sets=sets, num_items=8))


def _noted(config: RunConfig) -> list[str]:
    notes: list[str] = []
    check_questions(config, note=notes.append)
    return notes


def test_solutions_without_an_answer_that_is_marked_are_noted(tmp_path: Path) -> None:
    path = tmp_path / "solved.jsonl"
    solutions = ["2 and 2 is 4\n#### 4", "#### 4", r"\boxed{4}", "4 apples", "As 2 and 2 is 4 it is 4."]
    rows = [{"question": f"{n}?", "answer": answer} for n, answer in enumerate(solutions)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (said,) = _noted(_config(path=str(path)))
    assert said.startswith(f"1 of 5 answers in {path} have neither #### nor a box")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[2:]))
    assert _noted(_config(path=str(path))) == []
