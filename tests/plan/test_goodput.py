"""Young and Daly against their papers' numbers, and goodput against runs simulated failure by failure."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1hpc.base.errors import UsageError
from r1hpc.plan.hours.goodput import FailureRates, daly_interval_s, expected_goodput, overhead

_HOUR = 3600.0


def test_bloom_by_hand() -> None:
    """A failure a week on 384 GPUs, saves of 40 s: sqrt(2 x 40 x 604800) = 6956 s (they saved every 3 h)."""
    found = overhead(FailureRates(gpu_hours_per_failure=384 * 168, restart_s=0), 384, save_time_s=40)
    assert found.mtbf_s == pytest.approx(168 * _HOUR)
    assert found.optimal_interval_s == pytest.approx(6955.9 * (1 + 0.00575 / 3) - 40, rel=1e-3)
    assert 1 - found.goodput == pytest.approx(0.0115, abs=0.0003)


def test_opt_loses_an_eighth() -> None:
    """Two hosts a day on 992 GPUs and saves of five minutes: C/W + W/2M = 11.8 % by Young's first order."""
    mean = 12 * _HOUR
    interval = math.sqrt(2 * 300 * mean)
    assert 1 - expected_goodput(interval, 300, mean, 0) == pytest.approx(0.118, abs=0.012)


def _simulate(interval_s: float, save_s: float, mean_s: float, restart_s: float, rng: random.Random) -> float:
    """Goodput of 4,000 intervals of work with failures drawn one by one, also while saving and restarting."""
    wall = 0.0
    for _ in range(4000):
        needed = interval_s + save_s
        while (until := rng.expovariate(1 / mean_s)) < needed:
            wall += until
            needed = interval_s + save_s + restart_s
        wall += needed
    return 4000 * interval_s / wall


@pytest.mark.parametrize(
    ("interval_h", "save_s", "mean_h", "restart_s"), [(1, 60, 10, 900), (2, 300, 3, 600), (0.5, 10, 100, 0)]
)
def test_goodput_is_what_a_simulation_gives(
    interval_h: float, save_s: float, mean_h: float, restart_s: float
) -> None:
    rng = random.Random(1)
    simulated = _simulate(interval_h * _HOUR, save_s, mean_h * _HOUR, restart_s, rng)
    formula = expected_goodput(interval_h * _HOUR, save_s, mean_h * _HOUR, restart_s)
    # Daly's restarts may fail too, and each interval carries a part of one: a little more than is simulated.
    assert formula == pytest.approx(simulated, rel=0.03)


@given(save_s=st.floats(1, 600), mean_h=st.floats(2, 1000))
def test_no_interval_beats_the_optimal_one_by_much(save_s: float, mean_h: float) -> None:
    mean = mean_h * _HOUR
    best = daly_interval_s(save_s, mean)
    at_best = expected_goodput(best, save_s, mean, 0)
    others = [expected_goodput(best * factor, save_s, mean, 0) for factor in (0.5, 0.8, 1.25, 2)]
    assert at_best >= max(others) - 1e-3


@given(gpus=st.integers(1, 100_000), preemptions=st.floats(0, 50))
def test_goodput_is_a_part(gpus: int, preemptions: float) -> None:
    found = overhead(FailureRates(preemptions_per_day=preemptions), gpus)
    assert 0 <= found.goodput <= 1
    assert found.optimal_interval_s > 0
    assert found.goodput >= overhead(FailureRates(preemptions_per_day=preemptions + 1), 2 * gpus).goodput - 1


def test_a_warned_preemption_loses_the_restart_only() -> None:
    rates = FailureRates(gpu_hours_per_failure=1e12, preemptions_per_day=12, restart_s=600)
    assert overhead(rates, 8, save_time_s=120).goodput == pytest.approx(1 - 12 * 720 / 86400, abs=1e-3)


def test_a_save_longer_than_the_time_between_failures() -> None:
    assert daly_interval_s(1000, 400) == 400
    assert expected_goodput(1e6, 60, 1000, 0) == 0


@pytest.mark.parametrize(
    "rates",
    [
        {"gpu_hours_per_failure": 0},
        {"preemptions_per_day": -1},
        {"restart_s": -1},
        {"gpu_hours_per_failure": math.nan},
    ],
)
def test_rates_that_cannot_be(rates: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        FailureRates(**rates)
