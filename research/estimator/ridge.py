"""Linear regression with a prior on each coefficient and effects shared by each family, exactly.

    posterior = fit(rows, prior)
    mean, sd = predict(posterior, x, shared=(0.2,), noise_sd=0.1)

y = x . b + shared . u(family) + e, with b ~ N(prior), every u ~ N(0, 1) and e ~ N(0, noise_sd^2). A
constant in `shared` is a random intercept: what "one vote per family" means here, since however many rows a
family has, what they share is one draw. Plain Python, so that the same data give the same digits on every
machine.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from r1hpc.plan.hours.mfu import Posterior

Matrix = list[list[float]]


@dataclass(frozen=True)
class Row:
    """One observation. `noise_sd` is of this row alone, already divided by the square root of its weight."""

    x: tuple[float, ...]
    y: float
    family: str
    shared: tuple[float, ...]
    noise_sd: float


def predict(
    posterior: Posterior, x: Sequence[float], shared: Sequence[float], noise_sd: float
) -> tuple[float, float]:
    """Mean and standard deviation of y for a row of a family that was never seen."""
    mean = math.fsum(a * b for a, b in zip(posterior.mean, x, strict=True))
    return mean, math.sqrt(posterior.variance(x) + noise_sd**2 + math.fsum(z * z for z in shared))


def fit(rows: Sequence[Row], prior: Sequence[tuple[float, float]]) -> Posterior:
    """The posterior, given (mean, sd) of each coefficient before any row."""
    size = len(prior)
    precision = [[0.0] * size for _ in range(size)]
    target = [0.0] * size
    for i, (mean, sd) in enumerate(prior):
        precision[i][i] = 1 / sd**2
        target[i] = mean / sd**2
    for family in _by_family(rows).values():
        _add_family(family, precision, target)
    covariance = _inverse(precision)
    means = tuple(math.fsum(a * b for a, b in zip(line, target, strict=True)) for line in covariance)
    return Posterior(means, tuple(tuple(line) for line in covariance))


def _by_family(rows: Sequence[Row]) -> Mapping[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.family, []).append(row)
    return found


def _add_family(rows: Sequence[Row], precision: Matrix, target: list[float]) -> None:
    """X' V^-1 X and X' V^-1 y of one family, where V = N + Z Z' (Woodbury's formula)."""
    size, width = len(target), len(rows[0].shared)
    cross = [[0.0] * (size + 1) for _ in range(width)]  # Z' N^-1 [X y]
    inner = [[float(i == j) for j in range(width)] for i in range(width)]  # I + Z' N^-1 Z
    for row in rows:
        weight = 1 / row.noise_sd**2
        values = (*row.x, row.y)
        used = [i for i in range(size + 1) if values[i]]
        _add_outer(precision, target, values, used, weight)
        for a, z in enumerate(row.shared):
            for i in used:
                cross[a][i] += weight * z * values[i]
            for b in range(width):
                inner[a][b] += weight * z * row.shared[b]
    solved = _inverse(inner)
    for a in range(width):
        for b in range(width):
            _subtract_outer(precision, target, cross[a], cross[b], solved[a][b])


def _add_outer(
    precision: Matrix, target: list[float], values: Sequence[float], used: Sequence[int], weight: float
) -> None:
    last = len(target)
    for i in used:
        if i == last:
            continue
        scaled = weight * values[i]
        target[i] += scaled * values[last]
        for j in used:
            if j != last:
                precision[i][j] += scaled * values[j]


def _subtract_outer(
    precision: Matrix, target: list[float], left: Sequence[float], right: Sequence[float], factor: float
) -> None:
    size = len(target)
    for i in range(size):
        scaled = factor * left[i]
        target[i] -= scaled * right[size]
        for j in range(size):
            precision[i][j] -= scaled * right[j]


def _inverse(matrix: Matrix) -> Matrix:
    """Gauss and Jordan with the largest pivot; the matrix is positive definite."""
    size = len(matrix)
    work = [list(line) + [float(i == j) for j in range(size)] for i, line in enumerate(matrix)]
    for column in range(size):
        pivot = max(range(column, size), key=lambda i: abs(work[i][column]))
        work[column], work[pivot] = work[pivot], work[column]
        head = work[column][column]
        work[column] = [value / head for value in work[column]]
        for i in range(size):
            factor = work[i][column]
            if i != column and factor:
                work[i] = [a - factor * b for a, b in zip(work[i], work[column], strict=True)]
    return [line[size:] for line in work]
