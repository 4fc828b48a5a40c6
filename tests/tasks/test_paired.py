"""Paired tests keep their error rates on planted pairs, and agree with figures worked out elsewhere."""

import numpy as np
import pytest

from r1hpc.tasks.statistics import (
    Discordance,
    sign_flip_p,
    smallest_difference,
    unseen_difference,
)

_QUESTIONS, _SAMPLES, _DRAWS = 200, 4, 200


def planted(rng: np.random.Generator, gain: float, num: int = _QUESTIONS) -> list[float]:
    """Differences by question of two models, four samples each; B better by `gain` on average."""
    difficulty = rng.beta(1.0, 1.0, num) * (1 - gain)
    a = rng.binomial(_SAMPLES, difficulty) / _SAMPLES
    b = rng.binomial(_SAMPLES, difficulty + gain) / _SAMPLES
    return list(b - a)


def test_mcnemar_and_the_interval_are_those_of_the_literature() -> None:
    # Newcombe 1998, table II, cell counts 36, 12, 2, 0: the difference 0.2 has limits 0.0569 and 0.3404.
    difference = Discordance(both=36, only_a=2, only_b=12, neither=0).difference()
    assert (difference.b - difference.a, difference.low, difference.high) == pytest.approx(
        (0.2, 0.0569, 0.3404), abs=5e-5
    )
    assert Discordance(both=0, only_a=2, only_b=12, neither=0).p_value == pytest.approx(2 * 106 / 2**14)
    assert Discordance(both=5, only_a=0, only_b=0, neither=5).p_value == 1.0


def test_equal_models_are_rarely_told_apart_and_ten_points_mostly() -> None:
    rng = np.random.default_rng(1)
    equal = [planted(rng, 0.0) for _ in range(_DRAWS)]
    better = [planted(rng, 0.1) for _ in range(_DRAWS)]
    assert sum(sign_flip_p(d) < 0.05 for d in equal) <= 0.08 * _DRAWS  # 0.05, and three standard errors
    assert sum(sign_flip_p(d) < 0.05 for d in better) >= 0.8 * _DRAWS
    assert smallest_difference(better[0]) == pytest.approx(0.07, abs=0.02)


def test_models_that_answer_alike_are_not_known_to_be_equal() -> None:
    assert smallest_difference([0.0] * 5) is None
    assert unseen_difference(5) == pytest.approx(0.522, abs=1e-3)
    assert unseen_difference(500) == pytest.approx(0.00735, abs=1e-5)
