"""No worse is what the questions show, not what they fail to tell apart."""

import random
from typing import Any

import pytest

from r1hpc.base.errors import UsageError
from r1hpc.tasks.statistics import Verdict, compare_answers, judge_loss


def answers(right: list[bool]) -> list[dict[str, Any]]:
    return [
        {
            "prompt": f"question {index}",
            "expected": "7",
            "greedy_correct": correct,
            "greedy_length": 10,
            "num_samples": 1,
            "num_correct": int(correct),
            "mean_length": 10.0,
        }
        for index, correct in enumerate(right)
    ]


def verdict(original: list[bool], export: list[bool], margin: float = 0.02) -> Verdict:
    return judge_loss(compare_answers(answers(original), answers(export)), margin)


def test_what_the_questions_tell_apart_is_worse() -> None:
    """240 of 400 right, and 200 of them still. By hand, method 10 of Newcombe 1998: phi is 0.8114, Wilson's
    limits are 0.5513, 0.6468 and 0.4512, 0.5488."""
    found = verdict([True] * 240 + [False] * 160, [True] * 200 + [False] * 200)
    assert not found.no_worse
    assert found.text == "worse by 10.0% of the questions [7.0%, 12.9%]"


def test_one_file_under_two_labels_is_one_file() -> None:
    """evaluate.path and evaluate.sets name it differently."""
    a, b = ([each | {"task": label} for each in answers([True] * 9)] for label in ("test", "gsm8k"))
    assert compare_answers(a, b).num_questions == 9
    doubled = [*b, *({**each, "task": "other"} for each in b)]
    with pytest.raises(UsageError, match="no question was asked of both"):
        compare_answers(a, doubled)


def test_few_questions_show_nothing_and_more_are_asked_for() -> None:
    right = [True, False] * 20
    found = verdict(right, right)
    assert not found.no_worse
    assert "+0.0% of the questions" in found.text
    assert found.text.endswith("ask some 300 questions")


def test_a_model_that_is_never_right_has_nothing_to_lose() -> None:
    found = verdict([False] * 1000, [False] * 1000)
    assert not found.no_worse
    assert "right in 0.0% of the questions, where a loss of 2.0% would not show" in found.text


def test_no_worse_is_said_where_the_margin_is_excluded() -> None:
    right = [True, False] * 500
    found = verdict(right, right)
    assert found.no_worse
    assert found.text.startswith("no worse: +0.0% of the questions [-")


def test_a_loss_at_the_margin_is_called_none_in_at_most_the_share_of_the_interval() -> None:
    """Exports that lose exactly the margin: 2.5 % of them may pass, and three standard errors."""
    rng, draws = random.Random(1), 400
    passed = 0
    for _ in range(draws):
        original = [rng.random() < 0.6 for _ in range(400)]
        export = [rng.random() < (1 - 0.07 / 0.6 if was else 0.05) for was in original]
        passed += verdict(original, export, margin=0.05).no_worse
    assert passed <= draws * (0.025 + 3 * (0.025 * 0.975 / draws) ** 0.5)
