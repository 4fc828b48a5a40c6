"""pass@k and intervals against what they mean."""

from itertools import combinations
from statistics import fmean

import pytest

from r1hpc.tasks.statistics import mean_interval, pass_at_k, share_interval, wilson


@pytest.mark.parametrize("num_correct", range(7))
@pytest.mark.parametrize("k", range(1, 7))
def test_pass_at_k_is_the_share_of_choices_that_hold_a_correct_one(num_correct: int, k: int) -> None:
    samples = [i < num_correct for i in range(6)]
    assert pass_at_k(6, num_correct, k) == pytest.approx(fmean(any(c) for c in combinations(samples, k)))


def test_wilsons_interval() -> None:
    low, high = wilson(0.8, 10)  # 0.4902 .. 0.9433: Brown, Cai, DasGupta 2001
    assert low == pytest.approx(0.4902, abs=1e-4)
    assert high == pytest.approx(0.9433, abs=1e-4)
    assert wilson(1, 10)[0] < 1.0
    assert wilson(0, 10)[1] > 0.0


def test_the_interval_of_a_mean() -> None:
    mean, low, high = mean_interval([0.0, 1.0] * 50)
    assert mean == 0.5
    assert high - mean == pytest.approx(1.96 * 0.5025 / 10, abs=1e-3)
    assert mean - low == pytest.approx(high - mean)


def test_the_interval_of_shares_is_wilsons_by_the_spread_of_the_items() -> None:
    # As many independent samples as items, where each item's share is 0 or 1 ...
    mean, low, high = share_interval([1.0] * 8 + [0.0] * 2, 8)
    assert mean == pytest.approx(0.8)
    assert (low, high) == pytest.approx(wilson(0.8, 10), abs=0.03)  # n - 1 in the variance
    # ... and more, where every item is solved in part.
    assert share_interval([0.7, 0.9] * 5, 10)[1] > low
    # The normal one for many.
    many = [0.2, 0.4, 0.9] * 400
    assert share_interval(many, 10) == pytest.approx(mean_interval(many), abs=1e-3)


@pytest.mark.parametrize(
    "values", [[1.0], [0.0], [0.5], [1.0] * 3, [0.0] * 3, [0.5] * 3, [0.7] * 3, [0.0, 1.0]]
)
def test_few_items_or_items_alike_make_no_certainty(values: list[float]) -> None:
    mean, low, high = share_interval(values, 1)
    assert 0.0 <= low <= mean <= high <= 1.0
    assert high - low > 0.3
