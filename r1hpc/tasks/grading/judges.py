"""List the judges, which decide whether an answer is right; exact, countdown and choice are here.

They run in the verifier's process (worker.py), never in the trainer.

A judge takes the answer's text, the item's own answer and its metadata, and returns True or False (a custom
reward term: a number). Text that it cannot read raises RefusedError. `bounded` judges are linear in a text of
bounded length. The others use third-party code, and get their answers one at a time.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pkgutil import resolve_name
from string import ascii_uppercase
from typing import Any

from r1hpc.tasks.grading.answers import SPACE, chosen
from r1hpc.tasks.grading.arithmetic import numbers, parse, value

Judge = Callable[[str, str, Mapping[str, Any]], bool]
OWN_VERDICT = "own_verdict"
OWN_SCORE = "own_score"
_HERE = "r1hpc.tasks.grading"
_OWN = "r1hpc.tasks.sandbox.user_code"


@dataclass(frozen=True)
class JudgeKind:
    """A judge, and how it is asked."""

    judge: Judge | str
    """The judge; or MODULE:FUNCTION, which makes it from the task's judge_settings."""
    bounded: bool
    prepares: bool = False
    """It has `prepare(metadata)`, called before the answers to an item, outside their time limit."""
    max_characters: int = 1024
    """A longer answer is refused before it is sent."""

    def load(self, settings: Mapping[str, Any]) -> Judge:
        """Return the judge; imports what it needs."""
        if not isinstance(self.judge, str):
            return self.judge
        judge: Judge = resolve_name(self.judge)(settings)
        return judge


def exact(text: str, answer: str, metadata: Mapping[str, Any]) -> bool:
    """True for the same characters, except blanks around them."""
    return text.strip(SPACE) == answer


def countdown(text: str, answer: str, metadata: Mapping[str, Any]) -> bool:
    """True for an expression that makes the target with each number exactly once."""
    tree = parse(text)
    if numbers(tree) != Counter(metadata["numbers"]):
        return False
    try:
        return value(tree) == Fraction(metadata["target"])
    except ZeroDivisionError:
        return False


def choice(text: str, answer: str, metadata: Mapping[str, Any]) -> bool:
    """True for the letter of the right choice, `C`, `(C)`, `C. with its text`, or for its text alone."""
    letter = chosen(text, metadata["choices"])
    texts = [str(said).strip(SPACE).casefold() for said in metadata["choices"]]
    said = dict(zip(ascii_uppercase, texts, strict=False))
    return letter == answer or (letter in said and said[letter] == said.get(answer))  # two may have one text


JUDGES = {
    "exact": JudgeKind(exact, bounded=True),
    "countdown": JudgeKind(countdown, bounded=True),
    "choice": JudgeKind(choice, bounded=True),
    "math": JudgeKind(f"{_HERE}.judge_math:load", bounded=False),
    "reasoning_gym": JudgeKind(f"{_HERE}.judge_gym:load", bounded=False, prepares=True, max_characters=16384),
    OWN_VERDICT: JudgeKind(f"{_OWN}:load_verdict", bounded=False, max_characters=16384),
    # Not a verdict but a number: a custom reward term, given the complete completion.
    OWN_SCORE: JudgeKind(f"{_OWN}:load_score", bounded=False, max_characters=1 << 20),
}
