"""What an answer's text says, however it is written, and what a majority of such answers is."""

from typing import Any

import pytest

from r1hpc.tasks.grading.answers import chosen, counted_as
from r1hpc.tasks.statistics import majority

CHOICES = ["Rome", "Bonn", "C. elegans"]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        *[(said, "B") for said in ("B", "(B)", "B.", "B. Bonn", "bonn", " Bonn ")],
        *[
            (said, "B")
            for said in (r"\text{B}", r"\text{(B)}", r"\mathbf{B}", "$B$", "**B**", r"\text{Bonn}")
        ],
        *[(said, "B") for said in (r"\boxed{B}", "(b)", "B\nBonn", "B - Bonn", "Bonn.", "**B.** Bonn")],
        *[(said, "B") for said in ("The answer is B", "Option B.", "Answer: (B)")],
        *[(said, None) for said in ("I think A", "Option A or option B", "Neither option A nor option B")],
        *[(said, None) for said in ("not option B", "I rule out option B", "s", "b", "answer: I")],
        ("So the correct answer is (B).", "B"),
        ("$C. elegans$", "C"),
        ("C. elegans", "C"),
        ("Both", None),
        ("", None),
    ],
)
def test_the_choice_that_is_meant(text: str, letter: str | None) -> None:
    assert chosen(text, CHOICES) == letter


@pytest.mark.parametrize(
    ("text", "choices"),
    [
        ("`list.append`", ["`list.append`", "`list.add`"]),
        ("**Paris**", ["**Paris**", "Rome"]),
        (r"\boxed{5}", [r"\boxed{5}", "6"]),
        ("`x`", ["`x`", "`y`"]),
    ],
)
def test_a_choice_may_be_written_in_marks_itself(text: str, choices: list[str]) -> None:
    assert chosen(text, choices) == "A"


@pytest.mark.parametrize(
    ("judge", "form", "texts"),
    [
        ("choice", "B", ["B", "(B)", "B. Bonn", "bonn"]),
        ("choice", "both", ["Both", "both "]),
        ("math", "1/2", ["0.5", r"\dfrac{1}{2}", "1/2", r"$\frac12$", "2 / 4"]),
        ("math", "-1/2", ["-0.5", r"-\frac{1}{2}", "-1/2."]),
        ("math", "1234", ["1,234", "$1234.00", "1234.", "**1234**", "`1,234`"]),
        ("math", "paris", ["Paris", "paris.", r"\text{Paris}"]),
        ("math", "apple, bee", ["bee, apple", "Apple and bee"]),
        ("math", "x+1", ["x + 1", "x+1", r"$\left x+1 \right$"]),
        ("math", "12 cm", ["12 cm", "12  cm", r"12\text{ cm}", r"$12\,\mathrm{cm}$"]),
        ("exact", "a b", ["a b", " a b\n"]),
    ],
)
def test_wrong_answers_count_together_however_they_are_written(
    judge: str, form: str, texts: list[str]
) -> None:
    """Else a model that writes a wrong answer in many ways would be right by its majority."""
    votes: list[list[Any]] = [["right", True]] * (len(texts) - 1)
    votes += [[counted_as(text, judge, {"choices": CHOICES}), False] for text in texts]
    assert {said for said, right in votes if not right} == {form}
    assert not majority(votes)


@pytest.mark.parametrize(
    ("judge", "texts"),
    [
        ("math", ["x+1", "1+x", "1/0", "0", "3 1/2", "31/2", "1, 234", "1234", "2 3", "23", "B", "b"]),
        ("math", ["3  1/2", "31/2", "2  3", "23", "x  y", "xy", r"2\,4", "24"]),
        ("math", [r"\leftarrow", r"\rightarrow", "x" * 2000, "x" * 2001]),
        ("exact", ["bee, apple", "apple, bee", "0.5", "1/2", "Paris", "paris"]),
        ("own_verdict", ["A. Smith", "A"]),
        ("choice", ["A", "B", "Both", "None"]),
    ],
)
def test_what_is_not_known_to_be_equal_stays_apart(judge: str, texts: list[str]) -> None:
    metadata = {"choices": CHOICES if judge == "choice" else None}
    assert len({counted_as(text, judge, metadata) for text in texts}) == len(texts)
