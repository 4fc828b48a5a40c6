"""What a site's own runs say of the next estimate: the arithmetic."""

import math
import random
import statistics
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1hpc.accounting.correction import MOST_RUNS, RUN_SPREAD, FinishedRun, Planned, correction, effect, score
from r1hpc.plan.hours.spread import Spread

PRIOR = Spread(70.0, 100.0, 150.0)
PLANNED = Planned("a100", "pretrain", PRIOR, num_gpus=8, params=1e9)


def finished(ratio: float, at: float = 0.0, planned: Planned = PLANNED, useful: float = 0.9) -> FinishedRun:
    return FinishedRun(
        run_id=f"r{at:g}",
        resource=planned.resource,
        stage=planned.stage,
        finished_at=at,
        estimate=planned.estimate,
        hours=ratio * planned.estimate.p50,
        source="run",
        useful_share=useful,
        num_gpus=planned.num_gpus,
        params=planned.params,
    )


def runs(*ratios: float, **change: Any) -> list[FinishedRun]:
    return [finished(ratio, at=i, **change) for i, ratio in enumerate(ratios)]


def sized(factor: float) -> Planned:
    """PLANNED with so many times its hours."""
    return replace(PLANNED, estimate=PRIOR * factor)


def band(spread: Spread) -> float:
    return spread.p90 / spread.p10


def test_without_a_run_the_estimate_stays() -> None:
    nothing = correction(PLANNED, [])
    assert nothing.corrected == PRIOR
    assert "no finished pretrain run of this size on a100 yet" in nothing.basis


def test_runs_like_it_are_blended_as_in_the_conjugate_normal_model() -> None:
    """Of long runs that all say 2: a weight of tau^2 / (tau^2 + s^2 / n) on ln 2."""
    long = sized(1e4)
    found = correction(long, runs(2.0, 2.0, 2.0, planned=long))
    tau2 = (math.log(150 / 70) / 2 / 1.2816) ** 2 - RUN_SPREAD**2
    s2 = RUN_SPREAD**2 / (1 + 2)
    weight = tau2 / (tau2 + s2 / 3)
    assert found.weight == pytest.approx(weight, abs=1e-3)
    assert math.log(found.factor) == pytest.approx(weight * math.log(2), rel=1e-3)
    assert band(found.corrected) < band(long.estimate)


def test_more_runs_weigh_more_and_narrow_the_band() -> None:
    found = [correction(PLANNED, runs(*[2.0] * n)) for n in range(1, 9)]
    factors = [each.factor for each in found]
    assert factors == sorted(factors)
    assert 1.2 < factors[0] < factors[-1] < 2
    widths = [each.width for each in found]
    assert widths == sorted(widths, reverse=True)


def test_a_sure_prior_gives_way_more_slowly_than_an_unsure_one() -> None:
    sure, unsure = (replace(PLANNED, estimate=Spread(100 / f, 100, 100 * f)) for f in (1.1, 3.0))
    weights = [correction(each, runs(2.0, planned=each)).weight for each in (sure, unsure)]
    assert weights[0] < 0.1 < 0.9 < weights[1]


def test_runs_that_disagree_weigh_less_and_widen_the_band() -> None:
    calm, wild = (correction(PLANNED, runs(*each)) for each in ([2.0] * 4, [0.5, 1.0, 4.0, 8.0]))
    assert wild.weight < 0.6 * calm.weight
    assert wild.width > 1 > calm.width


def test_one_odd_run_hardly_moves_the_factor_but_widens_the_band() -> None:
    calm, odd = (correction(PLANNED, runs(2.0, 2.0, 2.0, 2.0, last)) for last in (2.0, 20.0))
    assert odd.factor == pytest.approx(calm.factor, rel=0.1)
    assert band(odd.corrected) > 2 * band(calm.corrected)


def test_a_long_run_counts_for_more_than_a_short_one() -> None:
    """Of an hour each on 8 GPUs, and of six minutes of useful time."""
    long, short = (correction(sized(0.08), runs(2.0, planned=sized(0.08), useful=u)) for u in (1.0, 0.51))
    assert long.factor > short.factor > 1


def test_the_further_a_run_is_the_less_it_says() -> None:
    own = runs(*[2.0] * 8)
    by_hours = [correction(sized(10**k), own).factor for k in range(5)]
    by_size = [correction(replace(PLANNED, params=10.0 ** (9 + k)), own).factor for k in range(5)]
    for factors in (by_hours, by_size):
        assert factors == sorted(factors, reverse=True)
        assert factors[0] > 1.5
        assert factors[-1] == pytest.approx(1, abs=0.01)


def test_stages_and_resources_are_kept_apart() -> None:
    own = [*runs(*[3.0] * 5), *runs(*[0.5] * 5, planned=replace(PLANNED, stage="rl"))]
    assert correction(PLANNED, own).factor > 2
    assert correction(replace(PLANNED, stage="rl"), own).factor < 0.7
    assert correction(replace(PLANNED, stage="sft"), own).corrected == PRIOR
    assert correction(replace(PLANNED, resource="h100"), own).corrected == PRIOR
    assert correction(PLANNED, own).num_others == 5


@given(
    st.lists(st.tuples(st.floats(0.2, 5), st.floats(-5, -3.2)), min_size=1, max_size=40),
    st.floats(1.1, 4.0),
)
def test_runs_that_are_far_away_never_narrow_the_band(
    others: list[tuple[float, float]], width: float
) -> None:
    """A thousandth of the hours and less, however many and however alike."""
    hours = Spread(1e5 / width, 1e5, 1e5 * width)
    planned = replace(PLANNED, estimate=hours, num_gpus=1)
    far = [
        finished(
            ratio,
            at=i,
            planned=replace(planned, estimate=hours * 10**k),
        )
        for i, (ratio, k) in enumerate(others)
    ]
    assert band(correction(planned, far).corrected) >= band(hours) * (1 - 1e-4)


def test_only_the_newest_runs_count() -> None:
    moved = correction(PLANNED, runs(*[9.0] * MOST_RUNS, *[1.5] * MOST_RUNS))
    assert moved.num_runs == MOST_RUNS
    assert moved.factor == correction(PLANNED, runs(*[1.5] * MOST_RUNS)).factor


@pytest.mark.parametrize(
    ("num", "spread", "least", "most"),
    [
        (1, 0.16, 0.76, 0.9),
        (3, 0.16, 0.74, 0.9),
        (12, 0.16, 0.74, 0.86),
        (5, 0.3, 0.66, 0.84),
        (12, 0.3, 0.74, 0.86),
    ],
)
def test_the_interval_holds_the_next_run_four_times_out_of_five(
    num: int, spread: float, least: float, most: float
) -> None:
    """On sites whose bias is drawn as the prior has it. A spread of 0.3 is twice what is assumed at first."""
    dice = random.Random(1)
    planned = replace(PLANNED, estimate=Spread(100 / 1.9, 100, 190))
    inside = 0
    for _ in range(600):
        bias = dice.gauss(0, math.sqrt((math.log(1.9) / 1.2816) ** 2 - RUN_SPREAD**2))
        ratios = [math.exp(bias + dice.gauss(0, spread)) for _ in range(num + 1)]
        next_run = correction(planned, runs(*ratios[:-1], planned=planned)).corrected
        inside += next_run.p10 <= 100 * ratios[-1] <= next_run.p90
    assert least <= inside / 600 <= most


def test_six_runs_halve_the_error_over_ten_seeds_of_noise() -> None:
    """Of a site that takes half as long again, its runs spread as those of one published family."""
    ratios = []
    for seed in range(10):
        dice = random.Random(seed)
        found = effect(score(runs(*(1.5 * math.exp(dice.gauss(0, RUN_SPREAD)) for _ in range(6)))))
        assert found is not None
        ratios.append(found.after.median_error / found.before.median_error)
    assert statistics.median(ratios) <= 0.5
    assert sum(ratio < 1 for ratio in ratios) >= 9


def test_each_run_is_judged_by_the_runs_before_it_alone() -> None:
    scored = score(runs(2.0, 2.0, 2.0, 2.0, 2.0, 2.0))
    assert scored[0].error_after == scored[0].error_before == 0.5
    afters = [each.error_after for each in scored]
    assert afters == sorted(afters, reverse=True)
    assert afters[-1] < 0.15
    assert effect(scored[:1]) is None
    shown = effect(scored)
    assert shown is not None
    assert (shown.num_runs, shown.before.num_inside) == (5, 0)
    assert shown.after.num_inside >= 4
    assert shown.before.median_error == 0.5 > 0.2 > shown.after.median_error
    assert shown.before.median_width > shown.after.median_width
