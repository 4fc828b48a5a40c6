"""What an answer's text says, however it is written, and what a majority of such answers is."""

from typing import Any

import pytest

from r1hpc.tasks.answer_forms import chosen, counted_as
from r1hpc.tasks.statistics import majority

CHOICES = ["Rome", "Bonn", "C. elegans"]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        *[(said, "B") for said in ("B", "(B)", "B.", "B. Bonn", "bonn", " Bonn ")],
        ("C. elegans", "C"),
        ("Both", None),
        ("", None),
    ],
)
def test_the_choice_that_is_meant(text: str, letter: str | None) -> None:
    assert chosen(text, CHOICES) == letter


@pytest.mark.parametrize(
    ("metadata", "form", "texts"),
    [
        ({"choices": CHOICES}, "B", ["B", "(B)", "B. Bonn", "bonn"]),
        ({}, "1/2", ["0.5", r"\dfrac{1}{2}", "1/2", r"$\frac12$", "2/4"]),
        ({}, "-1/2", ["-0.5", r"-\frac{1}{2}", "-1/2."]),
        ({}, "1234", ["1,234", "$1234.00", "1234."]),
        ({}, "paris", ["Paris", "paris.", r"\text{Paris}"]),
        ({}, "x+1", ["x + 1", "x+1", r"$\left x+1 \right$"]),
    ],
)
def test_wrong_answers_count_together_however_they_are_written(
    metadata: dict[str, Any], form: str, texts: list[str]
) -> None:
    """Else a model that writes a wrong answer in many ways would be right by its majority."""
    votes: list[list[Any]] = [["right", True]] * (len(texts) - 1)
    votes += [[counted_as(text, metadata), False] for text in texts]
    assert {said for said, right in votes if not right} == {form}
    assert not majority(votes)


def test_what_is_not_known_to_be_equal_stays_apart() -> None:
    texts = ["x+1", "1+x", "1/0", "0", "x" * 2000, "x" * 2001, "B", "b"]
    assert len({counted_as(text, {}) for text in texts}) == len(texts)
