"""Compute an evaluation's figures, and the difference of two models on the same questions, with intervals.

Paired questions cancel their difficulty: this needs a fraction of the questions of two separate samples.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_Z95 = 1.959963984540054
_NUM_FLIPS = 4_000
_SEED = 0
_Z80 = 0.8416212335729143


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Return the probability that one of k of the samples is correct: 1 - C(n-c, k) / C(n, k). Unbiased,
    unlike 1 - (1 - c/n)^k (Chen et al., arXiv 2107.03374, eq. 1)."""
    if num_samples - num_correct < k:
        return 1.0
    missed = 1.0
    for i in range(num_samples - num_correct + 1, num_samples + 1):
        missed *= 1.0 - k / i
    return 1.0 - missed


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


def wilson(num_correct: float, num_items: float) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson 1927); valid at 0 and 1, where the normal one has no width.

    Counts need not be whole: if some items are the same question, num_items is the number of different ones,
    and num_correct the share of it.
    """
    return _wilson(num_correct / num_items, num_items)


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
    return mean, *_wilson(mean, n if alike else min(n * mean * (1 - mean) / variance, n * num_samples))


def _wilson(p: float, n: float) -> tuple[float, float]:
    z = _Z95
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At 0 and 1 the share is the interval's own end; rounding must not put it outside.
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))


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

    def difference(self) -> tuple[float, float, float]:
        """Return (B - A, low, high), 95 %: Newcombe 1998, Statistics in Medicine 17:2635, method 10."""
        n, (e, f, g, h) = self.total, (self.both, self.only_b, self.only_a, self.neither)
        b, a = (e + f) / n, (e + g) / n
        (b_low, b_high), (a_low, a_high) = wilson(e + f, n), wilson(e + g, n)
        phi = _correlation(e, f, g, h)
        down = _combined(b - b_low, a_high - a, phi)
        up = _combined(b_high - b, a - a_low, phi)
        return b - a, b - a - down, b - a + up


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
