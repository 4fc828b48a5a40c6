"""Items are pure functions of seed and index, and held-out questions are never asked in training."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1hpc.base.errors import UsageError
from r1hpc.config.schema.rl import TaskConfig
from r1hpc.tasks.problems.registry import make_task
from r1hpc.tasks.problems.task import Draws, Task, check_num_held_out, is_held_out

_TASKS = ("chain_sum", "countdown")
_INDEX = st.integers(0, 2**40)


def _task(name: str, seed: int = 0, **options: object) -> Task:
    return make_task(TaskConfig(name, seed, options))


@pytest.mark.parametrize("name", _TASKS)
@given(index=_INDEX, seed=st.integers(0, 2**31), held_out=st.booleans())
def test_an_item_depends_on_seed_and_index_alone(name: str, index: int, seed: int, held_out: bool) -> None:
    assert _task(name, seed).item(index, held_out) == _task(name, seed).item(index, held_out)


def test_an_item_is_the_same_in_every_process() -> None:
    """Pinned: another answer here means that running checkpoints continue with other questions."""
    assert _task("chain_sum").item(7).prompt == "162669="
    assert _task("countdown").item(7).prompt == "11,1,10:22?"
    code = (
        "from r1hpc.config.schema.rl import TaskConfig; from r1hpc.tasks.problems.registry import make_task;"
        "print(*(make_task(TaskConfig(n)).item(3).prompt for n in ('chain_sum', 'countdown')))"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": hash},
        ).stdout
        for hash in ("1", "2")
    }
    assert said == {f"{_task('chain_sum').item(3).prompt} {_task('countdown').item(3).prompt}\n"}


@pytest.mark.parametrize("name", _TASKS)
def test_held_out_questions_are_not_in_training(name: str) -> None:
    task = _task(name)
    asked = {task.item(index).prompt for index in range(3000)}
    kept = {task.item(index, held_out=True).prompt for index in range(300)}
    assert asked.isdisjoint(kept)
    assert len(asked) > 2000


@given(index=_INDEX)
def test_chain_sum_holds_out_by_its_prompt(index: int) -> None:
    task = _task("chain_sum")
    assert not is_held_out(task.item(index).prompt)
    assert is_held_out(task.item(index, held_out=True).prompt)


def test_countdown_holds_out_every_order_of_the_same_numbers() -> None:
    task = _task("countdown", max_number=5, max_target=20)
    part = [{_unordered(task.item(i, held_out).prompt) for i in range(400)} for held_out in (False, True)]
    assert part[0]
    assert part[1]
    assert part[0].isdisjoint(part[1])


def _unordered(prompt: str) -> tuple[list[str], str] | str:
    numbers, _, target = prompt.partition(":")
    return f"{sorted(numbers.split(','))}{target}"


def test_about_a_tenth_is_held_out() -> None:
    share = sum(is_held_out(f"{number:06d}=") for number in range(10_000)) / 10_000
    assert 0.08 < share < 0.12


def test_seeds_ask_differently() -> None:
    first, second = _task("chain_sum", 0), _task("chain_sum", 1)
    assert [first.item(i).prompt for i in range(5)] != [second.item(i).prompt for i in range(5)]
    assert first.id != second.id


def test_the_id_names_the_options() -> None:
    assert _task("chain_sum", num_terms=7).id != _task("chain_sum").id
    assert _task("chain_sum", num_terms=6).id == _task("chain_sum").id


@given(st.integers(1, 200), st.integers(0, 10))
def test_shuffled_is_a_permutation(count: int, key: int) -> None:
    assert sorted(Draws(key).shuffled(count)) == list(range(count))


def test_draws_are_spread() -> None:
    draws = Draws("spread")
    counts = [0] * 6
    for _ in range(6000):
        counts[draws.below(6)] += 1
    assert all(800 < count < 1200 for count in counts)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (TaskConfig("chainsum"), "did you mean 'chain_sum'"),
        (TaskConfig("chain_sum", 0, {"num_term": 3}), "did you mean 'num_terms'"),
        (TaskConfig("chain_sum", 0, {"num_terms": "3"}), "wants int"),
        (TaskConfig("chain_sum", 0, {"num_terms": True}), "wants int"),
        (TaskConfig("chain_sum", 0, {"num_terms": 1}), "takes 2 to 64"),
        (TaskConfig("countdown", 0, {"num_numbers": 99}), "takes 2 to 8"),
        (TaskConfig("reasoning_gym:gdc"), "did you mean 'gcd'"),
        (TaskConfig("reasoning_gym:gcd", 0, {"nonsense": 1}), "task.options do not suit"),
        (TaskConfig("jsonl"), "task.options.path=FILE"),
        (TaskConfig("jsonl", 0, {"path": "/nonexistent/x.jsonl"}), "is not there"),
    ],
)
def test_what_a_user_gets_wrong_is_named(config: TaskConfig, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make_task(config)


def test_no_more_questions_are_asked_than_there_are() -> None:
    task = _task("chain_sum", num_terms=2)
    there = {held_out: task.num_questions(held_out) for held_out in (False, True)}
    drawn = {held_out: len({task.item(i, held_out).prompt for i in range(2000)}) for held_out in there}
    assert there == drawn
    assert sum(drawn.values()) == 100
    check_num_held_out(task, drawn[True])
    with pytest.raises(UsageError, match=f"is {drawn[True] + 1}, .* no more than {drawn[True]} held-out"):
        check_num_held_out(task, drawn[True] + 1)
    check_num_held_out(_task("chain_sum"), 10**9)  # of six digits there are enough
