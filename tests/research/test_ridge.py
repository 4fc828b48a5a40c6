"""The regression against the same normal equations solved densely by numpy."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.estimator.ridge import Row, fit, predict


def _rows(rng: random.Random, families: int, size: int) -> list[Row]:
    found = []
    for family in range(families):
        offset = rng.gauss(0, 0.3)
        for _ in range(rng.randint(1, 6)):
            x = (1.0, *(rng.gauss(0, 1) for _ in range(size - 1)))
            y = sum((i + 1) * v for i, v in enumerate(x)) + offset + rng.gauss(0, 0.1)
            found.append(Row(x, y, str(family), (0.3, 0.2 * x[-1]), rng.uniform(0.05, 0.5)))
    return found


def _dense(rows: list[Row], prior: list[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.array([row.x for row in rows]), np.array([row.y for row in rows])
    shared = np.array([row.shared for row in rows])
    same = np.array([[a.family == b.family for b in rows] for a in rows])
    v = np.diag([row.noise_sd**2 for row in rows]) + same * (shared @ shared.T)
    mean, sd = (np.array(column) for column in zip(*prior, strict=True))
    covariance = np.linalg.inv(x.T @ np.linalg.solve(v, x) + np.diag(1 / sd**2))
    return covariance @ (x.T @ np.linalg.solve(v, y) + mean / sd**2), covariance


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), families=st.integers(1, 8), size=st.integers(1, 5))
def test_it_is_the_dense_solution(seed: int, families: int, size: int) -> None:
    rows = _rows(random.Random(seed), families, size)
    prior = [(0.5 * i, 1.0 + i) for i in range(size)]
    found = fit(rows, prior)
    mean, covariance = _dense(rows, prior)
    assert np.allclose(found.mean, mean, rtol=1e-6, atol=1e-9)
    assert np.allclose(found.covariance, covariance, rtol=1e-6, atol=1e-12)


def test_without_rows_it_is_the_prior() -> None:
    found = fit([], [(2.0, 0.5), (-1.0, 3.0)])
    assert found.mean == pytest.approx((2.0, -1.0))
    mean, sd = predict(found, (1.0, 2.0), shared=(0.2,), noise_sd=0.1)
    assert mean == pytest.approx(0.0)
    assert sd**2 == pytest.approx(0.25 + 4 * 9 + 0.04 + 0.01)


def test_a_family_has_one_vote() -> None:
    """A thousand equal rows of one family against one row of another: the mean lies near the middle."""
    many = [Row((1.0,), 0.0, "many", (1.0,), 0.01) for _ in range(1000)]
    found = fit([*many, Row((1.0,), 1.0, "one", (1.0,), 0.01)], [(0.0, 100.0)])
    assert found.mean[0] == pytest.approx(0.5, abs=0.001)
