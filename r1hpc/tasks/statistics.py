"""Compute an evaluation's figures with intervals, and compare two models' answers question by question.

Used by evaluations, r1hpc.compare, and the measurement of a quantised export. Paired questions cancel their
difficulty: this needs a fraction of the questions of two separate samples.

The verdict on two models is on accuracy: of the samples, averaged by question, if each question has several
in both; else of the greedy answers. Other figures do not affect it, so the error rate is that of one test.
Two models without a significant difference need not be equal: too few questions never show one. B is no worse
if the comparison does not call it worse, and the interval of its loss ends before the margin
(non-inferiority; Piaggio et al., JAMA 2012, 308:2594).
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from r1hpc.base.errors import UsageError

_Z95 = 1.959963984540054
_NUM_FLIPS = 4_000
_SEED = 0
_Z80 = 0.8416212335729143


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Return the probability that one of k of the samples is correct: 1 - C(n-c, k) / C(n, k). Unbiased,
    unlike 1 - (1 - c/n)^k (Chen et al., arXiv 2107.03374, eq. 1)."""
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def majority(votes: Sequence[Sequence[Any]]) -> bool:
    """True if the answer of most samples is right (self-consistency, Wang et al., arXiv 2203.11171).

    Args:
        votes: [answer in its counted form (answers.counted_as), whether it is right] of each sample. Right
            answers count together; None is no vote. In a tie the one given first counts.
    """
    counts: dict[object, int] = {}
    for text, right in votes:
        if text is not None:
            key = True if right else " ".join(str(text).split())
            counts[key] = counts.get(key, 0) + 1
    return bool(counts) and max(counts, key=lambda key: counts[key]) is True


def wilson(p: float, n: float) -> tuple[float, float]:
    """Return the 95 % interval of the share `p` of `n` items (Wilson 1927); valid at 0 and 1, where the
    normal one has no width. If some items are the same question, `n` is the number of different ones."""
    z = _Z95
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At 0 and 1 the share is the interval's own end; rounding must not put it outside.
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return (mean, low, high): 95 %, normal, over items: of differences, or lengths. One has no width."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return mean, mean, mean
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = _Z95 * deviation / math.sqrt(n)
    return mean, mean - half, mean + half


def share_interval(
    values: Sequence[float], num_samples: int, questions: Sequence[Hashable] | None = None
) -> tuple[float, float, float]:
    """Return (mean, low, high): 95 %, over items, of shares of each one's samples, which are not independent.

    Wilson's interval, for as many independent samples as would vary as the items do: n p (1 - p) / s^2 (the
    design effect of Kish 1965), and no more than there are. If all items are alike, which says nothing about
    their variance, for one each.

    Args:
        num_samples: of each item.
        questions: the question of each item, if some are the same: those count as one.
    """
    mean = math.fsum(values) / len(values)
    if questions is not None:
        asked: dict[Hashable, list[float]] = {}
        for question, value in zip(questions, values, strict=True):
            asked.setdefault(question, []).append(value)
        values = [math.fsum(each) / len(each) for each in asked.values()]
    n = len(values)
    variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1) if n > 1 else 0.0
    alike = variance < 1e-12  # except for rounding
    return mean, *wilson(mean, n if alike else min(n * mean * (1 - mean) / variance, n * num_samples))


@dataclass(frozen=True)
class Discordance:
    """Number of questions that both answer correctly, only one of them, or neither."""

    both: int
    only_a: int
    only_b: int
    neither: int

    @property
    def total(self) -> int:
        return self.both + self.only_a + self.only_b + self.neither

    @property
    def p_value(self) -> float:
        """Return p of McNemar's exact test, two-sided: equal models each win half of the discordant ones."""
        n, k = self.only_a + self.only_b, min(self.only_a, self.only_b)
        tail = sum(math.comb(n, i) for i in range(k + 1))
        return min(1.0, float(2 * tail / 2**n)) if n else 1.0

    def difference(self) -> "Difference":
        """Return both accuracies: Newcombe 1998, Statistics in Medicine 17:2635, method 10."""
        n, (e, f, g, h) = self.total, (self.both, self.only_b, self.only_a, self.neither)
        b, a = (e + f) / n, (e + g) / n
        (b_low, b_high), (a_low, a_high) = wilson(b, n), wilson(a, n)
        phi = _correlation(e, f, g, h)
        down = _combined(b - b_low, a_high - a, phi)
        up = _combined(b_high - b, a - a_low, phi)
        return Difference(a, b, b - a - down, b - a + up)


def _correlation(e: int, f: int, g: int, h: int) -> float:
    """Return the correlation of both models' answers, with the method's continuity correction."""
    margins = (e + f) * (g + h) * (e + g) * (f + h)
    if not margins:
        return 0.0
    product = e * h - f * g
    n = e + f + g + h
    corrected = max(product - n / 2, 0.0) if product > 0 else float(product)
    return corrected / math.sqrt(margins)


def _combined(one: float, other: float, phi: float) -> float:
    return math.sqrt(max(0.0, one * one - 2 * phi * one * other + other * other))


def sign_flip_p(differences: Sequence[float]) -> float:
    """Return the two-sided p of a mean difference by question: how often random signs make one as large.
    Exact for equal models, whatever the variance, except for the number of drawn signs (4,000)."""
    values = np.asarray(differences, float)
    draws = np.random.default_rng(_SEED).integers(0, 2, (_NUM_FLIPS, len(values)), np.int8)
    least, num_large = abs(values.sum()) - 1e-12, 0
    for part in np.array_split(draws, 40):  # all at once, as 64-bit numbers, would take gigabytes
        num_large += int((np.abs(part.astype(float) @ (2 * values) - values.sum()) >= least).sum())
    return (num_large + 1) / (_NUM_FLIPS + 1)


def smallest_difference(differences: Sequence[float]) -> float | None:
    """Return the difference that this many questions with this variance detect in 8 cases of 10. None: no
    question was answered differently, which says nothing about the variance."""
    n = len(differences)
    if not any(differences):
        return None
    return float((_Z95 + _Z80) * np.std(differences, ddof=1) / math.sqrt(n)) if n > 1 else 1.0


def unseen_difference(num_questions: int) -> float:
    """Return the largest possible difference, 95 %, of two models that answered all these questions alike:
    their discordant questions could be this share of all, and none be among these."""
    return 1 - math.pow(0.025, 1 / num_questions)


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
    """Compare answers to the questions that both were asked, each once; UsageError if there is none."""
    asked_of_a, asked_of_b = _by_question(a, b)
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
    greedy_accuracy = greedy.difference()
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


def _by_question(a: Sequence[Line], b: Sequence[Line]) -> list[dict[tuple[str, ...], Line]]:
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
    no_worse: bool
    text: str


def judge_loss(found: Comparison, margin: float) -> Verdict:
    """Return the verdict on B; `margin` is the unacceptable loss of accuracy, as a share of the questions."""
    accuracy, won = found.accuracy, found.discordance
    gain, low, high = accuracy.b - accuracy.a, accuracy.low, accuracy.high
    least, _ = wilson((won.both + won.only_a) / found.num_questions, found.num_questions)
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
