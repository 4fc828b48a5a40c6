"""Each term says what its name says, from 0 to 1; the punishment from -1 to 0."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1hpc.base.errors import UsageError
from r1hpc.tasks.problems.task import Item
from r1hpc.tasks.rewards import TERMS, Completion, Judged, term_named


def _judged(text: str, prompt: str = "2+2=", num_tokens: int = 10, correct: bool = False) -> Judged:
    item, completion = Item(0, prompt, "4"), Completion(text, num_tokens, False)
    return Judged(item, completion, correct, False, max_completion_length=40)


@given(st.text(max_size=200), st.text(max_size=50), st.integers(0, 100))
def test_every_term_lies_between_0_and_1(text: str, prompt: str, num_tokens: int) -> None:
    judged = _judged(text, prompt, num_tokens)
    values = {name: term(judged) for name, term in TERMS.items()}
    assert values.pop("overlong") <= 0.0
    assert all(0.0 <= value <= 1.0 for value in values.values())


@pytest.mark.parametrize(
    ("num_tokens", "truncated", "punished"),
    [(1, False, 0.0), (32, False, 0.0), (34, False, -0.25), (40, False, -1.0), (40, True, -1.0)],
)
def test_the_soft_overlong_punishment(num_tokens: int, truncated: bool, punished: float) -> None:
    """DAPO, 2503.14476 eq. 13, with L_max 40 and L_cache 8: (L_max - L_cache - |y|) / L_cache in between."""
    judged = replace(_judged(""), completion=Completion("", num_tokens, truncated))
    assert TERMS["overlong"](judged) == pytest.approx(punished)


def test_accuracy() -> None:
    assert TERMS["accuracy"](_judged("", correct=True)) == 1.0
    assert TERMS["accuracy"](_judged("")) == 0.0


@pytest.mark.parametrize(
    ("prompt", "text", "share"),
    [
        ("How many?", "<think>four</think>", 1.0),
        ("How many?", "<think>\u56db\u56db</think>", 0.0),
        ("How many?", "two\u56db\u56db\u56db", 0.5),
        ("\u591a\u5c11\uff1f", "<think>\u56db</think><answer>4</answer>", 1.0),
        ("\u591a\u5c11\uff1f", "<think>\u3088\u3093</think>", 1.0),
        ("\u0441\u043a\u043e\u043b\u044c\u043a\u043e", "\u0447\u0435four", 1 / 3),
        ("How many?", "\uff46\uff4f\uff55\uff52", 1.0),
        ("2+2=", "four", 1.0),
        ("How many?", "4", 1.0),
        ("How many?", "", 1.0),
    ],
)
def test_language_is_the_share_of_the_prompts_script(prompt: str, text: str, share: float) -> None:
    assert TERMS["language"](_judged(text, prompt)) == pytest.approx(share)


@pytest.mark.parametrize(("num_tokens", "value"), [(0, 1.0), (10, 0.75), (40, 0.0), (50, 0.0)])
def test_efficiency_tokens_falls_with_length(num_tokens: int, value: float) -> None:
    assert TERMS["efficiency_tokens"](_judged("", num_tokens=num_tokens)) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", 0.0),
        ("1", 0.0),
        ("12", 0.0),
        ("1234567", 1.0),
        ("1111111", 0.0),
        ("a b a b c", 0.75),
        ("one two", 0.0),
    ],
)
def test_diversity_is_the_entropy_of_bigrams(text: str, value: float) -> None:
    assert TERMS["diversity"](_judged(f"<think>{text}</think>")) == pytest.approx(value)


def test_megabytes_are_looked_at_in_part() -> None:
    judged = _judged("spam \u56db" * 10**6, "How many?")
    assert TERMS["language"](judged) == pytest.approx(0.8, abs=0.01)
    assert TERMS["diversity"](judged) < 0.1


def test_an_unknown_term_is_named() -> None:
    with pytest.raises(UsageError, match=r"did you mean 'accuracy'.*efficiency_tokens"):
        term_named("acuracy")
