"""What an evaluation says and how sure it is: pass@k without bias, majority votes, intervals.

pass_at_k(num_samples=16, num_correct=3, k=8)
wilson(num_correct=240, num_items=256)              # a share
share_interval([0.0, 0.5, 1.0], num_samples=2)      # a mean over items, of shares
"""

import math
from collections.abc import Hashable, Sequence
from typing import Any

_Z95 = 1.959963984540054


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Probability that one of k of the samples is correct: 1 - C(n-c, k) / C(n, k).

    Unbiased, unlike 1 - (1 - c/n)^k (Chen et al., arXiv 2107.03374, eq. 1).
    """
    if num_samples - num_correct < k:
        return 1.0
    missed = 1.0
    for i in range(num_samples - num_correct + 1, num_samples + 1):
        missed *= 1.0 - k / i
    return 1.0 - missed


def majority(votes: Sequence[Sequence[Any]]) -> bool:
    """Whether the answer that most samples give is right (self-consistency, Wang et al., arXiv 2203.11171).

    Args:
        votes: [answer as it is counted (answer_forms.counted_as), whether it is right] of each sample. Right
            answers count together; None is no vote. Of equally many the one given first counts.
    """
    counts: dict[object, int] = {}
    for text, right in votes:
        if text is not None:
            key = True if right else " ".join(str(text).split())
            counts[key] = counts.get(key, 0) + 1
    return bool(counts) and max(counts, key=lambda key: counts[key]) is True


def wilson(num_correct: float, num_items: float) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927); sensible at 0 and 1, where the normal one has no width.

    Counts need not be whole: of items of which some are the same question, num_items is the number of
    different ones, and num_correct the share of it.
    """
    return _wilson(num_correct / num_items, num_items)


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high): 95 %, normal, over items: of differences, or lengths. One item has no width."""
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
    """(mean, low, high): 95 %, over items, of shares of each one's samples, which are not independent.

    Wilson's, of as many independent samples as would vary as the items do: n p (1 - p) / s^2 (the design
    effect of Kish 1965), and no more than there are. Where all items are alike, which says nothing of how
    they vary, of one each.

    Args:
        num_samples: of each item.
        questions: what each item asks, where some ask the same: those are one for the interval.
    """
    mean = math.fsum(values) / len(values)
    if questions is not None:
        asked: dict[Hashable, list[float]] = {}
        for question, value in zip(questions, values, strict=True):
            asked.setdefault(question, []).append(value)
        values = [math.fsum(each) / len(each) for each in asked.values()]
    n = len(values)
    variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1) if n > 1 else 0.0
    alike = variance < 1e-12  # but for rounding
    return mean, *_wilson(mean, n if alike else min(n * mean * (1 - mean) / variance, n * num_samples))


def _wilson(p: float, n: float) -> tuple[float, float]:
    z = _Z95
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At 0 and 1 the share is the interval's own end; rounding must not put it outside.
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))
