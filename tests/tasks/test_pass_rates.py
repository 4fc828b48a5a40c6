"""Questions solved every other time are asked most; which are asked is a function of what is known."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from r1hpc.base.errors import ConfigError, UsageError
from r1hpc.config.schema.rl import RlConfig, TaskConfig
from r1hpc.tasks.problems.curriculum import MOST_PASSED_OVER, PassRates, check_comes_again
from r1hpc.tasks.problems.registry import make_task
from r1hpc.tasks.problems.task import Task

HARD, HALF, EASY = 0.0, 0.5, 1.0


@pytest.fixture
def task(tmp_path: Path) -> Task:
    path = tmp_path / "questions.jsonl"
    lines = [json.dumps({"question": f"question {n}", "answer": str(n)}) for n in range(60)]
    path.write_text("\n".join(lines) + "\n")
    return make_task(TaskConfig(name="file", options={"path": str(path)}))


def known(task: Task, *rates: float) -> tuple[PassRates, dict[str, float]]:
    """Pass rates of all questions, dealt in turn; and by prompt."""
    found, num = {}, task.num_questions()
    assert num is not None
    table = PassRates(seed=0)
    for index in range(num):
        prompt = task.item(index).prompt
        found[prompt] = rates[index % len(rates)]
        table.add(prompt, found[prompt])
    return table, found


def test_what_is_not_known_is_asked_in_order(task: Task) -> None:
    assert list(islice(PassRates(0).chosen(task, 17), 20)) == list(range(17, 37))


def test_questions_are_asked_in_proportion_to_the_variance_of_their_reward(task: Task) -> None:
    table, rates = known(task, HARD, HALF, 0.9, EASY)
    last, asked = 0, Counter[float]()
    for index in islice(table.chosen(task, 1000), 4000):
        asked[rates[task.item(index).prompt]] += 1
        last = index
    there = Counter(rates[task.item(index).prompt] for index in range(1000, last + 1))
    share = {rate: asked[rate] / there[rate] for rate in there}
    assert share[HALF] == 1
    assert share[0.9] == pytest.approx(0.36, abs=0.05)
    assert share[HARD] == pytest.approx(0.1, abs=0.04)
    assert share[EASY] == pytest.approx(0.1, abs=0.04)


def test_where_all_is_known_to_be_solved_a_bounded_number_is_passed_over(task: Task) -> None:
    table, _ = known(task, EASY)
    asked = list(islice(table.chosen(task, 0), 200))
    gaps = [b - a for a, b in zip([-1, *asked], asked, strict=False)]
    assert max(gaps) == MOST_PASSED_OVER + 1


def test_newer_answers_count_more_and_the_words_name_the_question() -> None:
    table = PassRates(0)
    table.add("What is  1+1?", 0.0)
    table.add("what is 1+1?", 1.0)
    assert (len(table), table.mean) == (1, 0.5)
    table.add("What is 1+1?", 1.0)
    assert table.mean == 0.75


def test_it_goes_on_from_its_state_as_it_would_have(task: Task) -> None:
    table, _ = known(task, 0.1, 0.7, 0.95)
    other = PassRates(0)
    other.restore(json.loads(json.dumps(table.state())))
    assert list(islice(other.chosen(task, 70), 50)) == list(islice(table.chosen(task, 70), 50))
    assert list(islice(PassRates(1).chosen(task, 70), 50)) == list(range(70, 120))


def test_questions_that_never_come_again_are_refused(task: Task) -> None:
    check_comes_again(task)
    with pytest.raises(UsageError, match=r"asks new ones without end: take task.name=file"):
        check_comes_again(make_task(TaskConfig(name="countdown")))


def test_dynamic_sampling_would_keep_the_rates_from_being_learnt() -> None:
    with pytest.raises(ConfigError, match=r"rl.by_pass_rate with rl.max_resamples=3: .* take one"):
        RlConfig(by_pass_rate=True, max_resamples=3)
