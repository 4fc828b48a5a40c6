"""Compare two models' answers to the same questions, question by question.

The verdict is on accuracy: of the samples, averaged by question, if each question has several in both; else
of the greedy answers. Other figures do not affect it, so the error rate is that of one test.

Two models without a significant difference need not be equal: too few questions never show one. B is no worse
if the comparison does not call it worse, and the interval of its loss ends before the margin
(non-inferiority; Piaggio et al., JAMA 2012, 308:2594).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from r1hpc.base.errors import UsageError
from r1hpc.tasks.stats.intervals import (
    Discordance,
    mean_interval,
    pass_at_k,
    sign_flip_p,
    smallest_difference,
    unseen_difference,
    wilson,
)

ALPHA = 0.05
Line = Mapping[str, Any]
"""Keys: prompt, expected, greedy_correct, greedy_length, num_samples, num_correct, mean_length."""
Pair = tuple[Line, Line]


@dataclass(frozen=True)
class Difference:
    """One figure of both models, averaged over the questions."""

    a: float
    b: float
    low: float
    """Lower end of B - A, 95 %."""
    high: float


@dataclass(frozen=True)
class Comparison:
    """Comparison of two models' answers to the same questions."""

    num_questions: int
    only_in_a: int
    """Questions that B was not asked."""
    only_in_b: int
    is_sampled: bool
    """The verdict is on samples, not on greedy answers."""
    accuracy: Difference
    p_value: float
    smallest: float | None
    """Difference of accuracy that this many questions detect in 8 cases of 10."""
    greedy: Difference
    discordance: Discordance
    pass_at: dict[int, Difference]
    tokens: Difference
    """An answer's length."""
    tokens_a_correct_answer: tuple[float | None, float | None]
    """Tokens sampled for each correct answer; None: none is correct."""
    disagreements: tuple[Pair, ...]
    """Questions on which they differ, the largest differences first."""

    @property
    def verdict(self) -> str:
        """Return the better one, "a" or "b"; empty without a significant difference."""
        if self.p_value >= ALPHA:
            return ""
        return "b" if self.accuracy.b > self.accuracy.a else "a"


def compare_answers(a: Sequence[Line], b: Sequence[Line]) -> Comparison:
    """Compare two models' answers to the questions that both were asked; a repeated one counts once. Raise
    UsageError if there is no such question."""
    asked_of_a, asked_of_b = _asked(a, b)
    pairs = [(line, asked_of_b[question]) for question, line in asked_of_a.items() if question in asked_of_b]
    if not pairs:
        every = (*asked_of_a, *asked_of_b)
        labels = " and ".join(sorted({question[2] for question in every if question[2:]}))
        of = f" (theirs are of {labels})" if labels else ""
        raise UsageError(
            f"no question was asked of both{of}: evaluate them on the same task, test file and seed, "
            "with the same task.options.template"
        )
    most = min(min(x["num_samples"], y["num_samples"]) for x, y in pairs)
    is_sampled = most > 1
    differences = [_share(y, is_sampled) - _share(x, is_sampled) for x, y in pairs]
    counts = [(bool(x["greedy_correct"]), bool(y["greedy_correct"])) for x, y in pairs]
    greedy = Discordance(
        both=counts.count((True, True)),
        only_a=counts.count((True, False)),
        only_b=counts.count((False, True)),
        neither=counts.count((False, False)),
    )
    _, low, high = greedy.difference()
    first, second = (greedy.both + greedy.only_a, greedy.both + greedy.only_b)
    greedy_accuracy = Difference(first / len(pairs), second / len(pairs), low, high)
    largest = sorted(range(len(pairs)), key=lambda i: (-abs(differences[i]), i))
    return Comparison(
        num_questions=len(pairs),
        only_in_a=len(asked_of_a) - len(pairs),
        only_in_b=len(asked_of_b) - len(pairs),
        is_sampled=is_sampled,
        accuracy=_mean_share(pairs, lambda line: _share(line, True)) if is_sampled else greedy_accuracy,
        p_value=sign_flip_p(differences) if is_sampled else greedy.p_value,
        smallest=smallest_difference(differences),
        greedy=greedy_accuracy,
        discordance=greedy,
        pass_at={
            k: _mean_share(pairs, lambda line, k=k: pass_at_k(line["num_samples"], line["num_correct"], k))
            for k in (2**e for e in range(1, most.bit_length()))
        },
        tokens=_mean(pairs, lambda line: _length(line, is_sampled)),
        tokens_a_correct_answer=(
            _cost([x for x, _ in pairs], is_sampled),
            _cost([y for _, y in pairs], is_sampled),
        ),
        disagreements=tuple(pairs[i] for i in largest if differences[i]),
    )


def _asked(a: Sequence[Line], b: Sequence[Line]) -> list[dict[tuple[str, ...], Line]]:
    """Return each side's lines by question; without the task's label if with it none is shared. evaluate.path
    and evaluate.sets give one file two labels."""
    asked: list[dict[tuple[str, ...], Line]] = [{_question(line): line for line in lines} for lines in (a, b)]
    if asked[0].keys() & asked[1].keys():
        return asked
    unlabelled = [{question[:2]: line for question, line in each.items()} for each in asked]
    is_unique = all(len(each) == len(bare) for each, bare in zip(asked, unlabelled, strict=True))
    return unlabelled if is_unique else asked


def _question(line: Line) -> tuple[str, str, str]:
    return str(line["prompt"]), str(line["expected"]), str(line.get("task", ""))


def _share(line: Line, is_sampled: bool) -> float:
    return float(line["num_correct"] / line["num_samples"] if is_sampled else line["greedy_correct"])


def _length(line: Line, is_sampled: bool) -> float:
    return float(line["mean_length"] if is_sampled else line["greedy_length"])


def _mean(pairs: Sequence[Pair], figure: Any) -> Difference:
    values = [(figure(x), figure(y)) for x, y in pairs]
    _, low, high = mean_interval([y - x for x, y in values])
    a, b = (sum(column) / len(values) for column in zip(*values, strict=True))
    return Difference(a, b, low, high)


def _mean_share(pairs: Sequence[Pair], figure: Any) -> Difference:
    """Return `_mean` of shares; if no question differs, the interval is that of unseen differences."""
    found = _mean(pairs, figure)
    if found.low == found.high:
        unseen = unseen_difference(len(pairs))
        gain = found.b - found.a
        return replace(found, low=max(-1.0, gain - unseen), high=min(1.0, gain + unseen))
    return found


def _cost(lines: Sequence[Line], is_sampled: bool) -> float | None:
    correct = sum(_share(line, is_sampled) for line in lines)
    return sum(_length(line, is_sampled) for line in lines) / correct if correct else None


@dataclass(frozen=True)
class Verdict:
    """Verdict on B compared with A."""

    no_worse: bool
    text: str


def judge_loss(found: Comparison, margin: float) -> Verdict:
    """Return the verdict on B; `margin` is the unacceptable loss of accuracy, as a share of the questions."""
    accuracy, won = found.accuracy, found.discordance
    gain, low, high = accuracy.b - accuracy.a, accuracy.low, accuracy.high
    least, _ = wilson(won.both + won.only_a, found.num_questions)
    if found.verdict == "a":
        return Verdict(False, f"worse by {-gain:.1%} of the questions [{-high:.1%}, {-low:.1%}]")
    if least <= margin:
        return Verdict(
            False,
            f"not shown to be no worse: the original is right in {accuracy.a:.1%} of the questions, where "
            f"a loss of {margin:.1%} would not show",
        )
    seen = f"{gain:+.1%} of the questions [{low:+.1%}, {high:+.1%}]"
    if low < -margin:
        return Verdict(
            False,
            f"not shown to be no worse: {seen}, so a loss of more than {margin:.1%} is not excluded; ask "
            f"{_enough(found.num_questions, gain, low, margin)}",
        )
    return Verdict(True, f"no worse: {seen}, so a loss of more than {margin:.1%} is excluded")


def _enough(num_questions: int, gain: float, low: float, margin: float) -> str:
    """Return how many questions would do at the same difference: intervals shrink with the square root."""
    if gain <= -margin:
        return "more questions"
    more = num_questions * ((gain - low) / (gain + margin)) ** 2
    return f"some {math.ceil(more / 100) * 100:,} questions"
