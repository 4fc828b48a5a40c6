"""pass@k and intervals against what they mean."""

from itertools import combinations
from statistics import fmean

import pytest

from r1hpc.tasks.statistics import mean_interval, pass_at_k, wilson


@pytest.mark.parametrize("num_correct", range(7))
@pytest.mark.parametrize("k", range(1, 7))
def test_pass_at_k_is_the_share_of_choices_that_hold_a_correct_one(num_correct: int, k: int) -> None:
    samples = [i < num_correct for i in range(6)]
    assert pass_at_k(6, num_correct, k) == pytest.approx(fmean(any(c) for c in combinations(samples, k)))


def test_wilsons_interval() -> None:
    low, high = wilson(8, 10)  # 0.4902 .. 0.9433: Brown, Cai, DasGupta 2001
    assert low == pytest.approx(0.4902, abs=1e-4)
    assert high == pytest.approx(0.9433, abs=1e-4)
    assert wilson(10, 10)[0] < 1.0
    assert wilson(0, 10)[1] > 0.0


def test_the_interval_of_a_mean() -> None:
    mean, low, high = mean_interval([0.0, 1.0] * 50)
    assert mean == 0.5
    assert high - mean == pytest.approx(1.96 * 0.5025 / 10, abs=1e-3)
    assert mean - low == pytest.approx(high - mean)
