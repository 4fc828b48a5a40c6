"""Question and answer pairs from a file."""

import json
from pathlib import Path

import pytest

from r1hpc.base.errors import UsageError
from r1hpc.config.schema.rl import RewardConfig, TaskConfig
from r1hpc.tasks.problems.registry import make_task
from r1hpc.tasks.problems.task import Task
from r1hpc.tasks.rewards import Completion, Scorer
from r1hpc.tasks.text.format import compose

_ROWS = [
    {
        "question": f"What is {n} + {n}? {{braces}} {{0}}",
        "answer": f"Twice {n}: <<2*{n}={2 * n}>>{2 * n}.\n#### {2 * n:,}",
    }
    for n in range(990, 1090)
]


def _write(folder: Path, rows: list[object]) -> str:
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return str(path)


def _task(folder: Path, rows: list[object] | None = None, seed: int = 0, **options: object) -> Task:
    path = _write(folder, _ROWS if rows is None else rows)  # type: ignore[arg-type]
    return make_task(TaskConfig("jsonl", seed, {"path": path, **options}))


def test_each_pass_asks_every_question_once_in_its_own_order(tmp_path: Path) -> None:
    task = _task(tmp_path)
    part = {False: 0, True: 0}
    for held_out in part:
        first = task.item(0, held_out)
        size = next(i for i in range(1, 200) if task.item(i, held_out).metadata["epoch"] == 1)
        passes = [[task.item(p * size + i, held_out).prompt for i in range(size)] for p in (0, 1)]
        assert set(passes[0]) == set(passes[1])
        assert len(set(passes[0])) == size
        assert size < 5 or passes[0] != passes[1]
        assert task.num_questions(held_out) == size
        assert first == task.item(0, held_out)
        part[held_out] = size
    assert sum(part.values()) == len(_ROWS)
    assert part[True] < 30


def test_a_question_that_stands_twice_is_counted_once(tmp_path: Path) -> None:
    once, twice = _task(tmp_path), _task(tmp_path, [*_ROWS, *_ROWS])
    assert [twice.num_questions(part) for part in (False, True)] == [
        once.num_questions(part) for part in (False, True)
    ]


def test_parts_share_no_question_whatever_its_case(tmp_path: Path) -> None:
    shouted = [{**row, "question": f" {row['question'].upper()}\n"} for row in _ROWS]
    task = _task(tmp_path, [*_ROWS, *shouted], template="{question}")
    asked = {" ".join(task.item(i).prompt.casefold().split()) for i in range(400)}
    kept = {" ".join(task.item(i, held_out=True).prompt.casefold().split()) for i in range(100)}
    assert asked.isdisjoint(kept)


def test_the_question_stands_in_the_template_as_it_is(tmp_path: Path) -> None:
    item = _task(tmp_path, template="Q: {question} A: {0}").item(0)
    assert item.prompt.startswith("Q: What is ")
    assert item.prompt.endswith("{braces} {0} A: {0}")


def test_demonstrations_are_right_and_well_formed(tmp_path: Path) -> None:
    task = _task(tmp_path)
    items = [task.item(index) for index in range(80)]
    groups = [
        (item, [Completion(task.demonstration(item, thinking), 9, False) for thinking in (True, False)])
        for item in items
    ]
    assert "<<" not in groups[0][1][0].text
    assert groups[0][1][0].text.startswith("<think>Twice ")
    with Scorer(RewardConfig(timeout_s=30.0), task, max_completion_length=99) as scorer:
        assert all(s.correct and s.well_formed for group in scorer.score_groups(groups) for s in group)


@pytest.mark.parametrize(
    ("answer", "text", "right"),
    [
        ("42", "42", True),
        ("42", "42.0", True),
        ("42", "$42", True),
        ("42", r"\boxed{42}", True),
        ("42", "the answer is 42", True),
        ("42", "40 + 2", True),
        ("42", "43", False),
        ("42", "-42", False),
        ("42", "\u0664\u0662", False),
        ("42", "", False),
        ("-3", "-3", True),
        ("1/2", r"\frac{1}{2}", True),
        ("1/2", "0.5", True),
        (r"\frac12", "0.5", True),
        ("2x", "2", False),
        ("2x", "x+x", True),
        ("(1,2)", "(1, 2)", True),
        ("(1,2)", "(1,3)", False),
        ("(x+1)^2", "x^2+2x+1", True),
        ("yes", "yes", True),
        ("yes", "no", False),
    ],
)
def test_math_verify_judges(tmp_path: Path, answer: str, text: str, right: bool) -> None:
    """The answer after ####, in what math-verify takes for equal."""
    row = {"question": "?", "answer": answer}
    task = _task(tmp_path, [row])
    item = task.item(0, held_out=not _trains(task))
    with Scorer(RewardConfig(timeout_s=30.0), task, max_completion_length=99) as scorer:
        (score,) = scorer.score_groups([(item, [Completion(compose("", text or " "), 9, False)])])[0]
    assert score.correct == right


def _trains(task: Task) -> bool:
    try:
        task.item(0)
    except UsageError:
        return False
    return True


def test_the_id_follows_the_content_not_the_place(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert _task(tmp_path / "a").id == _task(tmp_path / "b").id
    assert _task(tmp_path / "a", _ROWS[1:]).id != _task(tmp_path / "b").id  # type: ignore[arg-type]
    assert _task(tmp_path / "a", seed=1).id != _task(tmp_path / "b").id


@pytest.mark.parametrize(
    "row",
    [
        {"question": "?"},
        {"question": 1, "answer": "2"},
        {"question": "?", "answer": "think ####"},
        {"question": "?", "answer": "<answer>1</answer>"},
        [],
        "text",
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, row: object) -> None:
    with pytest.raises(UsageError, match=r"pairs.jsonl:2"):
        _task(tmp_path, [_ROWS[0], row])


def test_a_line_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"question": "?", "answer": "1"}\n\xff\xfe\n')
    with pytest.raises(UsageError, match=r"x.jsonl:2"):
        make_task(TaskConfig("jsonl", 0, {"path": str(tmp_path / "x.jsonl")}))


def test_a_part_without_questions(tmp_path: Path) -> None:
    task = _task(tmp_path, [])
    with pytest.raises(UsageError, match="no training questions"):
        task.item(0)


def test_a_template_without_its_place(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\{question\} exactly once"):
        _task(tmp_path, template="no place")


def test_no_thinking_to_show(tmp_path: Path) -> None:
    task = _task(tmp_path, [{"question": f"{n}?", "answer": "4"} for n in range(20)])
    assert task.demonstration(task.item(0), thinking=False) == compose("", "4")
    with pytest.raises(UsageError, match="thinking_share=0"):
        task.demonstration(task.item(0), thinking=True)
