"""Fit the two efficiencies of rl_phase on DeepSpeed-Chat's step 3, and score one half by the other.

fit_rl()      # {"arithmetic": ..., "bandwidth": ..., "log_sd": ...} over all rows
halves()      # both ways round: rows, predicted hours, actual hours
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from r1hpc.plan.hours.rl import RlRates, RlWork, rl_phases
from r1hpc.plan.hours.workload import guessed_cache_bytes
from r1hpc.plan.topology.gpus import find_gpu
from research.estimator.published_rows import read_table

FAMILY = "dschat"
_LENGTH = 256
"""Prompt and completion, both; completions are not cut short (blogs/deepspeed-chat/README.md)."""
_SEQUENCES_PER_ROLLOUT = 1024
"""0.5 M tokens a step, the blog's largest batch; recalled, not in the CSV."""
_REWARD_PARAMS = 0.35e9
_PRIOR = ((math.log(0.35), 0.4), (math.log(0.5), 0.5))
"""ln of arithmetic and bandwidth: what training reaches on an A100, and half of what a copy reaches."""
_ROW_SD = 0.3
STACK_SD = math.log(2) / math.sqrt(2)
"""Standard deviation of ln(hours) between software stacks, chosen so that two of them differ by a factor 2
(one standard deviation of the difference). Eleven rows of one stack say nothing of it. OpenRLHF's README has
it twice as fast as DeepSpeed-Chat; HybridFlow (arXiv 2409.19256) has itself 1.53 to 20.57 times as fast as
three others."""
_GRID = 12
_REFINEMENTS = 4


@dataclass(frozen=True)
class RlRow:
    """A published RL run with its GPU-hours."""

    id: str
    work: RlWork
    gpu_hours: float


def rl_rows() -> list[RlRow]:
    """The rows of DeepSpeed-Chat, in the file's order."""
    return [_row(row) for row in read_table("published_runs.csv") if row["family"] == FAMILY]


def _row(row: dict[str, str]) -> RlRow:
    params, gpu = float(row["params"]), find_gpu(row["gpu"])
    sequences = float(row["tokens"]) / (2 * _LENGTH)
    work = RlWork(
        params=params,
        gpu=gpu,
        num_gpus=int(row["n_gpus"]),
        num_rollouts=round(sequences / _SEQUENCES_PER_ROLLOUT),
        sequences_per_rollout=_SEQUENCES_PER_ROLLOUT,
        prompt_length=_LENGTH,
        completion_length=_LENGTH,
        max_completion_length=_LENGTH,
        cache_bytes_per_token=guessed_cache_bytes(params),
        critic_params=_REWARD_PARAMS,
        reward_params=_REWARD_PARAMS,
    )
    return RlRow(row["id"], work, float(row["gpu_hours"]))


def log_errors(rows: Sequence[RlRow], rates: RlRates) -> list[float]:
    """ln(predicted / actual)."""
    return [math.log(math.fsum(rl_phases(row.work, rates).values()) / row.gpu_hours) for row in rows]


def fit_rates(rows: Sequence[RlRow]) -> RlRates:
    """The most probable rates, by a grid around the prior that is refined."""
    center, span = [mean for mean, _ in _PRIOR], 1.5
    for _ in range(_REFINEMENTS):
        points = [
            (center[0] + span * i / _GRID, center[1] + span * j / _GRID)
            for i in range(-_GRID, _GRID + 1)
            for j in range(-_GRID, _GRID + 1)
        ]
        best = min(points, key=lambda point: _loss(rows, point))
        center, span = list(best), span / 5
    return RlRates(math.exp(center[0]), math.exp(center[1]))


def _loss(rows: Sequence[RlRow], point: tuple[float, float]) -> float:
    rates = RlRates(math.exp(point[0]), math.exp(point[1]))
    prior = math.fsum(((x - mean) / sd) ** 2 for x, (mean, sd) in zip(point, _PRIOR, strict=True))
    return prior + math.fsum((error / _ROW_SD) ** 2 for error in log_errors(rows, rates))


@cache
def halves() -> tuple[tuple[RlRow, float], ...]:
    """Every row with ln(predicted / actual), predicted from the other half (every second row)."""
    rows = rl_rows()
    found: dict[str, tuple[RlRow, float]] = {}
    for start in (0, 1):
        rates = fit_rates(rows[1 - start :: 2])
        half = rows[start::2]
        found |= {row.id: (row, error) for row, error in zip(half, log_errors(half, rates), strict=True)}
    return tuple(found[row.id] for row in rows)


def fit_rl() -> dict[str, float]:
    """RL's part of coefficients.json; log_sd from the errors of the halves."""
    rates = fit_rates(rl_rows())
    errors = [error for _, error in halves()]
    log_sd = math.sqrt(math.fsum(error**2 for error in errors) / len(errors))
    return {
        "arithmetic": rates.arithmetic,
        "bandwidth": rates.bandwidth,
        "log_sd": log_sd,
        "stack_sd": STACK_SD,
    }
