"""Verdicts on answers whose value a mathematician decided by hand: verdicts.jsonl, one case a line.

All of them, with the tally by category: python -m pytest tests/tasks/test_verdicts.py -m soak -s
"""

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import math_verify
import pytest

from r1hpc.tasks.grading.verifier import Question, Verifier
from r1hpc.tasks.text.format import take_apart

Case = dict[str, Any]

CASES: list[Case] = [
    json.loads(line) for line in Path(__file__).with_name("verdicts.jsonl").read_text("utf-8").splitlines()
]
_SLOW = ("intervals", "expressions", "tuples", "equations", "latex")
_SOME = [case for n, case in enumerate(CASES) if case["category"] not in _SLOW or n % 12 == 0]
_KNOWN = {("-1", "i^2"), ("-1", r"e^{i\pi}"), (r"\frac{\sqrt{3}}{2}", r"\sin 60^\circ")}
"""(gold, answer) of right answers that are still refused."""


def _wrong(cases: Sequence[Case]) -> list[Case]:
    """The cases that r1hpc judges otherwise than expected."""
    said: dict[int, bool] = {}
    for judge in ("math", "choice"):
        asked = []
        for number, case in enumerate(cases):
            text = case["answer"]
            if "answer_in" in case:
                text = take_apart(text, boxed=case["answer_in"] == "boxed").answer
            if ("choices" in case) == (judge == "choice") and text is not None:
                asked.append((number, Question(text, case["gold"], {"choices": case.get("choices", [])})))
        with closing(Verifier(judge, {}, timeout_s=60)) as verifier:
            found = verifier.check([question for _, question in asked])
        said |= {number: verdict for (number, _), verdict in zip(asked, found, strict=True)}
    return [case for number, case in enumerate(cases) if said.get(number, False) != case["right"]]


def _wrong_by_math_verify(cases: Sequence[Case]) -> list[Case]:
    """The cases that math-verify alone judges otherwise, read as formulas, by which it errs least."""

    def parsed(text: str) -> Any:
        is_set = "$" in text or "\\boxed" in text
        return math_verify.parse(text if is_set else f"${text}$", parsing_timeout=None)

    def is_right(case: Case) -> bool:
        try:
            gold, answer = parsed(case["gold"]), parsed(case["answer"])
            return bool(math_verify.verify(gold, answer, timeout_seconds=None))
        except Exception:  # its parsers raise whatever they like
            return False

    return [case for case in cases if is_right(case) != case["right"]]


def _for_math_verify(cases: Sequence[Case]) -> list[Case]:
    return [case for case in cases if case["category"] not in ("choices", "thinking")]


def _named(cases: Sequence[Case]) -> set[tuple[str, str]]:
    return {(case["gold"], case["answer"]) for case in cases}


def test_the_file_has_a_verdict_a_case_and_both_of_each_category() -> None:
    keys = [(case["gold"], case["answer"], case.get("answer_in"), "choices" in case) for case in CASES]
    assert len(set(keys)) == len(keys)
    of_category = Counter((case["category"], case["right"]) for case in CASES)
    assert {right for category, right in of_category} == {True, False}
    assert len(CASES) > 1700
    assert all(count > 3 for (category, _), count in of_category.items() if category != "negations")


def test_verdicts() -> None:
    assert _named(_wrong(_SOME)) <= _KNOWN


def test_math_verify_alone_errs_more_often() -> None:
    some = _for_math_verify(CASES)[::20]
    theirs = _wrong_by_math_verify(some)
    print(f"math-verify alone is wrong in {len(theirs)} of {len(some)} cases")
    assert len(theirs) > len(some) / 10


@pytest.mark.soak
def test_all_verdicts() -> None:
    ours, theirs = _wrong(CASES), _wrong_by_math_verify(_for_math_verify(CASES))
    print(f"\nr1hpc: {len(ours)} wrong of {len(CASES)}: {Counter(case['category'] for case in ours)}")
    num = len(_for_math_verify(CASES))
    print(f"math-verify alone: {len(theirs)} wrong of {num}: {Counter(case['category'] for case in theirs)}")
    assert _named(ours) == _KNOWN
    assert len(theirs) > 200
