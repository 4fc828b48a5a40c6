"""reasoning-gym's generators: pure items, their own scorers, and none of the evaluation these do."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from reasoning_gym.factory import DATASETS

from r1hpc.base.errors import UsageError
from r1hpc.config.schema.rl import RewardConfig, TaskConfig
from r1hpc.tasks.grading import judge_gym
from r1hpc.tasks.problems import gym_worker
from r1hpc.tasks.problems.listed import held_out_key
from r1hpc.tasks.problems.registry import make_task
from r1hpc.tasks.problems.task import Item, Task, check_num_held_out, is_held_out
from r1hpc.tasks.rewards import Completion, Scorer
from r1hpc.tasks.text.format import compose

_EVALUATING = ("countdown", "spiral_matrix", "n_queens", "puzzle24", "binary_matrix", "string_insertion")
"""Their score_answer calls eval or sympy.parse_expr on the answer."""
_SAMPLE = ("number_sorting", "bitwise_arithmetic", "simple_integration", "list_functions")


def _some(names: Sequence[str], num_default: int) -> list[Any]:
    """Starting a process and importing the package takes seconds: the others are for the soak."""
    late = [pytest.param(name, marks=pytest.mark.soak) for name in names[num_default:]]
    return [*names[:num_default], *late]


@pytest.fixture(scope="module")
def gcd() -> Task:
    return _task("gcd")


def _task(name: str, **options: object) -> Task:
    return make_task(TaskConfig(f"reasoning_gym:{name}", 5, options))


def _right(task: Task, item: Item, texts: list[str], timeout_s: float = 30.0) -> list[bool]:
    completions = [Completion(compose("", text), 9, False) for text in texts]
    with Scorer(RewardConfig(timeout_s=timeout_s), task, max_completion_length=99) as scorer:
        return [score.correct for score in scorer.score_groups([(item, completions)])[0]]


@pytest.mark.parametrize("name", _some(_SAMPLE + _EVALUATING, 2))
def test_its_own_answers_are_right(name: str) -> None:
    task = _task(name)
    items = [task.item(index) for index in range(3)] + [task.item(0, held_out=True)]
    groups = [
        (item, [Completion(task.demonstration(item, False), 9, False)]) for item in items if item.answer
    ]
    with Scorer(RewardConfig(timeout_s=30.0), task, max_completion_length=99) as scorer:
        assert all(score.correct and score.well_formed for (score,) in scorer.score_groups(groups))


@pytest.mark.parametrize("name", ["polynomial_multiplication"])
def test_items_are_pure_across_processes(name: str) -> None:
    """polynomial_multiplication follows Python's hash seed, which differs from process to process."""
    first, second = _task(name), _task(name)
    forward = [first.item(index) for index in range(4)]
    assert forward[::-1] == [second.item(index) for index in (3, 2, 1, 0)]


@pytest.mark.parametrize("name", _some(_EVALUATING, 2))
def test_a_scorer_that_evaluates_does_not(name: str, tmp_path: Path) -> None:
    canary = tmp_path / "evaluated"
    task = _task(name)
    code = f"__import__('os').system('touch {canary}')"
    attempts = [code, f"[{code}]", f"open('{canary}', 'w')", "71**33**12", "9**9**9**9", f"print({code})"]
    assert not any(_right(task, task.item(0), attempts))
    assert not canary.exists()


def test_a_finite_generator_is_walked_within_its_size() -> None:
    task = _task("list_functions", size=30)
    assert {task.item(index).metadata["source_index"] for index in range(50)} <= set(range(30))


def test_the_id_names_the_package_version_and_the_options(gcd: Task) -> None:
    assert gcd.id.startswith("reasoning_gym:gcd 0.")
    assert _task("gcd", min_numbers=3, max_numbers=3).id != gcd.id


def test_making_the_item_again_is_not_in_an_answers_time(gcd: Task) -> None:
    """And a process that was replaced makes it again."""
    first, second = gcd.item(0), gcd.item(1)
    groups = [(item, [Completion(compose("", item.answer), 9, False)]) for item in (first, second, first)]
    with Scorer(RewardConfig(timeout_s=5.0), gcd, max_completion_length=99) as scorer:
        assert [score.correct for (score,) in scorer.score_groups(groups)] == [True] * 3
        worker = scorer._verifiers[""]._worker
        assert worker is not None
        os.kill(worker.pid, signal.SIGKILL)
        assert [score.correct for (score,) in scorer.score_groups(groups[:1])] == [True]
        assert (scorer.stats.restarts, scorer.stats.crashes) == (1, 0)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_every_generator_that_names_an_answer_finds_it_right() -> None:
    """intermediate_integration may name an integral that it could not solve; that is refused."""
    wrong = set()
    for name in sorted(DATASETS.keys() - {"composite", "intermediate_integration"}):
        task = _task(name)
        items = [item for item in map(task.item, range(4)) if item.answer]
        if not all(_right(task, item, [item.answer]) == [True] for item in items):
            wrong.add(name)
    assert not wrong


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("game_of_life_halting", "banana"),
        ("coin_flip", "0"),
        ("complex_arithmetic", "nan"),
        ("puzzle24", "10*2 + 10 - 6"),
    ],
)
def test_no_text_answers_every_question(name: str, text: str) -> None:
    task = _task(name)
    items = [task.item(index) for index in range(8)]
    assert not any(_right(task, item, [text])[0] for item in items)
    assert all(_right(task, item, [item.answer])[0] for item in items)


def test_a_sign_in_front_is_arithmetic() -> None:
    """`27*(-2 + (5 - 55 + 62)/2)` is one of its own answers."""
    judge = judge_gym.load({"generator": "countdown", "seed": 3, "options": {}})
    for index in range(300):
        judge.prepare({"source_index": index})
        assert judge(judge._entry["answer"], "", {"source_index": index})


def test_letters_that_cancel_are_no_countdown() -> None:
    task = _task("countdown")
    item = task.item(0)
    assert _right(task, item, [item.answer, f"{item.answer} + a - a", f"({item.answer})*a/a"]) == [
        True,
        False,
        False,
    ]


def test_no_thinking_to_show(gcd: Task) -> None:
    with pytest.raises(UsageError, match="thinking_share=0"):
        gcd.demonstration(gcd.item(0), thinking=True)


def test_no_answer_to_show(gcd: Task) -> None:
    """Such as rubiks_cube's: many are right, and it names none."""
    with pytest.raises(UsageError, match="names no answer"):
        gcd.demonstration(Item(0, "?", ""), thinking=False)


class Failing:
    """A source of questions that fails so often before it answers."""

    def __init__(self, num_failures: int) -> None:
        self.left = num_failures

    def ask(self, index: int, limit_s: float) -> dict[str, str]:
        self.left -= 1
        if self.left >= 0:
            return {"error": "ZeroDivisionError: division by zero"}
        return {"question": f"what is {index}?", "answer": str(index)}


def test_a_source_that_its_generator_cannot_make_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    task = _task("gcd")
    monkeypatch.setattr(task, "_source", Failing(3))
    item = task.item(0)
    assert f"what is {item.answer}?" in item.prompt
    monkeypatch.setattr(task, "_source", Failing(1000))
    with pytest.raises(UsageError, match="ZeroDivisionError"):
        task.item(0)


def test_a_generator_of_few_items_says_how_many(gcd: Task) -> None:
    assert gcd.num_questions(held_out=True) is None
    few = _task("gcd", size=40, template="{question}")
    for held_out in (False, True):
        asked = {few.item(index, held_out).prompt for index in range(400)}
        assert few.num_questions(held_out) == len(asked)
        assert {is_held_out(held_out_key(question)) for question in asked} == {held_out}
    there = few.num_questions(held_out=True)
    assert there
    check_num_held_out(few, there)
    with pytest.raises(UsageError, match=rf"evaluate.num_items is 40, but .* no more than {there} held-out"):
        check_num_held_out(few, 40)


def test_where_there_are_too_many_to_count_there_are_as_many_as_indices() -> None:
    handler, size = gym_worker.ready("gcd", 5, {"size": 1001})
    assert (handler(gym_worker.COUNT), size) == (None, 1001)
    assert _task("gcd", size=1001).num_questions(held_out=True) == 1001
