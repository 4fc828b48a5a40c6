"""Spreads and their sums: what must hold whatever the numbers are."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1hpc.plan.hours import spread as spread_module
from r1hpc.plan.hours.spread import (
    NOTHING,
    TYPICAL_FACTOR,
    Spread,
    around,
    by_progress,
    remaining,
    total,
    until_limit,
)

spreads = st.builds(
    lambda p50, low, high: Spread(p50 / low, p50, p50 * high),
    st.floats(0.01, 1e5),
    st.floats(1.01, 4),
    st.floats(1.01, 4),
)


@given(spreads, st.floats(-3, 3))
def test_a_spread_and_its_probabilities_agree(spread: Spread, z: float) -> None:
    value = spread.at(z)
    assert spread.at(z + 0.1) > value
    assert spread.chance_below(value) == pytest.approx(
        Spread(0.5, 1, 2).chance_below(Spread(0.5, 1, 2).at(z))
    )


@given(spreads)
def test_its_own_quantiles_come_back(spread: Spread) -> None:
    assert spread.chance_below(spread.p10) == pytest.approx(0.1)
    assert spread.chance_below(spread.p90) == pytest.approx(0.9)
    assert total([spread, NOTHING]) == spread
    assert remaining(spread, 0.0).p50 == pytest.approx(spread.p50)
    assert remaining(spread, 0.0).p90 == pytest.approx(spread.p90)


@settings(max_examples=40)
@given(st.lists(spreads, min_size=2, max_size=5))
def test_a_sum_lies_between_independence_and_lockstep(answer: list[Spread]) -> None:
    lockstep = total(answer, correlation=1.0)
    for level in ("p10", "p50", "p90"):
        assert getattr(lockstep, level) == pytest.approx(sum(getattr(s, level) for s in answer), rel=0.02)
    half, none = total(answer), total(answer, correlation=0.0)
    assert half.p90 - half.p10 <= (lockstep.p90 - lockstep.p10) * 1.05
    assert none.p90 - none.p10 <= (half.p90 - half.p10) * 1.10
    assert total(answer) == half, "the same jobs give the same forecast"


def test_ten_equal_stages_are_known_better_than_one() -> None:
    one, ten = around(100), total([around(100)] * 10, correlation=0.0)
    assert ten.p50 == pytest.approx(1045, rel=0.02)  # the mean of a log-normal lies above its median
    assert ten.p90 / ten.p10 < 1.5 < one.p90 / one.p10


@given(spreads, st.floats(0, 3))
def test_what_remains_shrinks_and_is_never_negative(spread: Spread, share: float) -> None:
    rest = remaining(spread, share * spread.p50)
    assert 0 <= rest.p10 <= rest.p50 <= rest.p90
    assert rest.p90 + share * spread.p50 >= spread.p90 * 0.999, "what is used tells that it is not small"


@given(spreads, st.floats(1.5, 100))
def test_a_run_far_beyond_its_estimate_still_needs_something(spread: Spread, times: float) -> None:
    """The further, the more; and the step to the tail is small."""
    used = times * spread.at(2.4)
    rest, later = remaining(spread, used), remaining(spread, 2 * used)
    assert 0 < rest.p10 < rest.p50 < rest.p90
    assert 0.02 * used < rest.p50 < used
    assert later.p50 == pytest.approx(2 * rest.p50)


def test_of_an_estimate_that_was_sure_and_wrong_the_rest_is_not() -> None:
    for sure in (Spread(100, 100, 100), Spread(0, 0, 1)):
        assert remaining(sure, 1000).p50 == pytest.approx(remaining(around(100), 1000).p50)
    before, after = (remaining(around(100), around(100).at(z)) for z in (2.32, 2.33))
    assert after.p50 == pytest.approx(before.p50, rel=0.2)


def test_progress_narrows_the_forecast() -> None:
    early, late = by_progress(100, 0.1), by_progress(900, 0.9)
    assert early.p50 == pytest.approx(900)
    assert early.p90 / early.p50 == pytest.approx(TYPICAL_FACTOR**0.9)
    assert late.p90 / late.p50 == pytest.approx(TYPICAL_FACTOR**0.1)
    assert by_progress(100, 1.0).p90 == 0


def test_a_job_with_nothing_but_a_limit() -> None:
    assert until_limit(10) == Spread(1, 5, 9)


@pytest.mark.parametrize(
    "parts",
    [
        [until_limit(8)] * 40,
        [around(hours + 1) for hours in range(60)],
        [*[until_limit(hours % 7 + 1) for hours in range(90)], around(300), Spread(10, 90, 100)],
        [Spread(0, 0, 4)] * 30,
    ],
)
def test_many_alike_add_up_as_one_by_one(parts: list[Spread], monkeypatch: pytest.MonkeyPatch) -> None:
    together = total(parts)
    monkeypatch.setattr(spread_module, "_MANY", 10**9)
    alone = total(parts)
    for ours, true in zip(vars(together).values(), vars(alone).values(), strict=True):
        assert ours == pytest.approx(true, rel=0.03, abs=0.02 * alone.p90)


def test_ten_thousand_queued_tasks_are_drawn_together(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def draws(number: int) -> tuple[float, ...]:
        drawn.append(number)
        return (0.1,) * 2000

    monkeypatch.setattr(spread_module, "_draws", draws)
    total([until_limit(8)] * 10_000)
    assert len(drawn) == 2, "the shared draw and the group's own"
