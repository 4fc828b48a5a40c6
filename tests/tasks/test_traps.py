"""The judges on 1,269 traps with clear answers, written before the judge was changed: traps.jsonl.

Half of them were held out: their failures were counted, and not looked at while the judge was mended. The
figures: python -m pytest tests/tasks/test_traps.py -m slow -s
"""

import json
from collections import Counter
from pathlib import Path

import pytest

from r1hpc.tasks.grading.answers import chosen, plain_number, unescaped
from r1hpc.tasks.grading.phrases import is_denied, plainer, spelled_number
from r1hpc.tasks.text.format import take_apart
from tests.tasks.test_verdicts import Case, _for_math_verify, _wrong, _wrong_by_math_verify

TRAPS: list[Case] = [
    json.loads(line) for line in Path(__file__).with_name("traps.jsonl").read_text("utf-8").splitlines()
]


def _tally(wrong: list[Case], of: list[Case]) -> tuple[float, float]:
    """Return the shares of wrong accepts and of wrong refusals."""
    accepts, refusals = (
        sum(case["right"] == right for case in wrong) / sum(case["right"] == right for case in of)
        for right in (False, True)
    )
    return accepts, refusals


def test_every_class_has_40_traps_and_1000_are_there() -> None:
    assert len(TRAPS) > 1000
    assert min(Counter(case["category"] for case in TRAPS).values()) >= 40


@pytest.mark.slow
def test_traps() -> None:
    for held_out in (False, True):
        half = [case for case in TRAPS if case["held_out"] == held_out]
        accepts, refusals = _tally(_wrong(half), half)
        print(
            f"\nheld out: {held_out}; {len(half)} traps; {accepts:.2%} wrong accepts, {refusals:.2%} refusals"
        )
        assert accepts < 0.015
        assert refusals < 0.02


@pytest.mark.slow
def test_no_identity_that_math_verify_accepts_is_refused() -> None:
    right = [case for case in TRAPS if case["category"] == "identities" and case["right"]]
    refused = _wrong(right)
    assert [case for case in refused if case not in _wrong_by_math_verify(right)] == []
    theirs = _wrong_by_math_verify(_for_math_verify(TRAPS))
    accepts, refusals = _tally(theirs, _for_math_verify(TRAPS))
    print(f"\nmath-verify: {accepts:.2%} wrong accepts, {refusals:.2%} wrong refusals")


@pytest.mark.parametrize(
    ("text", "english"),
    [
        ("答案是42", "the answer is 42"),
        ("41 oder 5 Millionen", "41 or 5000000"),
        ("2 mil millones", "2000000000"),
        ("42千克", "42千克"),
        ("3、4", "3, 4"),
        ("Die Antwort ist 42", "the answer is 42"),
        ("25 pour cent", "25 \\%"),
    ],
)
def test_words_in_english(text: str, english: str) -> None:
    assert " ".join(plainer(text).split()) == english


@pytest.mark.parametrize(
    ("text", "is_so"),
    [
        *(
            ("nicht 42", True),
            ("не 42", True),
            ("42ではない", True),
            ("plus de 42", True),
            ("twice 42", True),
        ),
        *(("42 Millionen", False), ("The square root of 16 is 4", False), ("18 wrong answers", False)),
        *(("42 Äpfel", False), ("共42人", False), ("a speed of 60 km/h", False), ("42의 절반", True)),
    ],
)
def test_denied(text: str, is_so: bool) -> None:
    assert is_denied(text) is is_so


def test_numbers_of_several_notations() -> None:
    for text, fraction in (
        ("0.1\\overline{6}", "1/6"),
        ("0.(9)", "1"),
        ("-0.333...", "-1/3"),
        ("3.14...", "3.14.."),
    ):
        assert unescaped(text).replace("...", "..") == fraction
    assert spelled_number("three thousand and five") == 3005
    assert spelled_number("a dozen eggs") is None
    assert plain_number("3 1/2") == plain_number("3.5")


def test_a_choice_in_words() -> None:
    choices = ["Rome", "Bonn", "Paris"]
    for text in (
        "(b) Bonn",
        "B (Bonn)",
        "Option B is correct",
        "The correct option is B) Bonn.",
        "\uff22",
        "选B",
    ):
        assert chosen(text, choices) == "B", text
    for text in ("B (Paris)", "不选B", "B或C", "Option B is wrong", "neither B nor C"):
        assert chosen(text, choices) is None, text


def test_a_box_after_a_blank() -> None:
    assert take_apart("So \\boxed {42}", boxed=True).answer == "42"
