"""Two models on the same questions: which is better, by how much, how sure, and after how many questions.

    greedy = Discordance(both=90, only_a=10, only_b=30, neither=70)
    greedy.difference()                          # B - A with its 95 % interval
    greedy.p_value                               # McNemar, exact
    sign_flip_p([0.0, 0.25, -0.5, ...])          # of mean differences by question, several samples each
    questions_needed([0.0, 1.0, ...])            # where one that may stop any time would have

The same question is asked of both, so its difficulty cancels: a fraction of the questions that two separate
samples would need.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from r1hpc.tasks.statistics import wilson

_NUM_FLIPS = 4_000
_SEED = 0
_BETS = np.array([s * b for b in (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9) for s in (-1, 1)])
"""Of the wealth, on each question's difference; both signs, since either model may be the better one."""
_Z95, _Z80 = 1.959963984540054, 0.8416212335729143


@dataclass(frozen=True)
class Discordance:
    """How many questions both answer rightly, only one of them, or neither."""

    both: int
    only_a: int
    only_b: int
    neither: int

    @property
    def total(self) -> int:
        return self.both + self.only_a + self.only_b + self.neither

    @property
    def p_value(self) -> float:
        """Of McNemar's exact test, two-sided: among discordant questions each model wins half, if equal."""
        n, k = self.only_a + self.only_b, min(self.only_a, self.only_b)
        tail = sum(math.comb(n, i) for i in range(k + 1))
        return min(1.0, float(2 * tail / 2**n)) if n else 1.0

    def difference(self) -> tuple[float, float, float]:
        """(B - A, low, high), 95 %: Newcombe 1998, Statistics in Medicine 17:2635, method 10."""
        n, (e, f, g, h) = self.total, (self.both, self.only_b, self.only_a, self.neither)
        b, a = (e + f) / n, (e + g) / n
        (b_low, b_high), (a_low, a_high) = wilson(e + f, n), wilson(e + g, n)
        phi = _correlation(e, f, g, h)
        down = _combined(b - b_low, a_high - a, phi)
        up = _combined(b_high - b, a - a_low, phi)
        return b - a, b - a - down, b - a + up


def _correlation(e: int, f: int, g: int, h: int) -> float:
    """Of the two models' answers, corrected for continuity as the method asks."""
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
    """Two-sided p of a mean difference by question: how often chance signs make one as large.

    Exact for models that are equal, whatever the spread, but for the number of drawn signs (4,000).
    """
    values = np.asarray(differences, float)
    draws = np.random.default_rng(_SEED).integers(0, 2, (_NUM_FLIPS, len(values)), np.int8)
    least, num_large = abs(values.sum()) - 1e-12, 0
    for part in np.array_split(draws, 40):  # as numbers of 64 bits all of them would take gigabytes
        num_large += int((np.abs(part.astype(float) @ (2 * values) - values.sum()) >= least).sum())
    return (num_large + 1) / (_NUM_FLIPS + 1)


def questions_needed(differences: Sequence[float], alpha: float = 0.05) -> int | None:
    """After how many questions one could have stopped, the models told apart; None: not within these.

    A bet on each question's difference, from -1 to 1, neither wins nor loses on average where the models are
    equal; so wealth of 1/alpha is reached in at most a share alpha of such comparisons, whenever one looks
    (Ville's inequality; Waudby-Smith and Ramdas 2023, arXiv 2010.09686). The questions must come in an order
    that has nothing to do with the answers.
    """
    growth: NDArray[np.float64] = np.log1p(np.outer(np.asarray(differences, float), _BETS)).cumsum(axis=0)
    log_wealth = np.logaddexp.reduce(growth, axis=1) - math.log(len(_BETS))
    reached = np.flatnonzero(log_wealth >= -math.log(alpha))
    return int(reached[0]) + 1 if len(reached) else None


def smallest_difference(differences: Sequence[float]) -> float | None:
    """What a comparison of this many questions with this spread tells apart in 8 cases of 10.

    None: no question was answered differently, which says nothing of the spread.
    """
    n = len(differences)
    if not any(differences):
        return None
    return float((_Z95 + _Z80) * np.std(differences, ddof=1) / math.sqrt(n)) if n > 1 else 1.0


def unseen_difference(num_questions: int) -> float:
    """The most by which two models may differ, 95 %, that answered so many questions alike: of all questions
    those that they answer differently could be this share, and none of these be among them."""
    return 1 - math.pow(0.025, 1 / num_questions)
