"""What a table of arms says: paired differences, their intervals, and arms that are not finished."""

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from research.ablation.comparison import (
    as_object,
    as_text,
    compare,
    difference_of,
    difference_to,
    mean_of,
    t95,
)
from research.ablation.results import ArmResult, Outcome, Results

OUTCOME = Outcome(
    seed=0,
    num_steps=40,
    num_items=256,
    greedy_before=0.1,
    greedy=1.0,
    pass_at_1_before=0.37,
    pass_at_1=0.9,
    pass_at_n=1.0,
    num_samples=8,
    response_length=12.0,
    thinking_share_before=0.3,
    thinking_share=1.0,
    accuracy_given_thinking_before=0.95,
    num_completions=10240,
    step_time_s=0.5,
    wall_s=60.0,
    cold_start_s=None,
)
PROVENANCE = {
    "command": "python -m research.ablation reward --seeds 3",
    "date": "2026-01-01",
    "machine": "2 CPU cores (x86_64), 1 rank(s), no GPU",
    "versions": {"python": "3.11.0"},
    "task": "chain_sum",
    "overrides": [],
}


def arm(name: str, **by_seed: float) -> ArmResult:
    """An arm with its accuracy at temperature 1 by seed, `s0=0.9`."""
    outcomes = (
        dataclasses.replace(OUTCOME, seed=int(seed[1:]), pass_at_1=value) for seed, value in by_seed.items()
    )
    return ArmResult(name, f"words of {name}", tuple(outcomes))


def results(*arms: ArmResult, seeds: tuple[int, ...] = (0, 1, 2), name: str = "reward") -> Results:
    return Results(name, "does it help?", seeds, arms, {"fp8": "there is no such unit"}, PROVENANCE)


BASELINE = arm("rule", s0=0.90, s1=0.80, s2=0.85)


def test_the_difference_is_paired_by_seed() -> None:
    # +0.01, +0.02, +0.03: a spread of the arms themselves of 0.1 does not enter.
    found = difference_of(
        results(BASELINE, arm("x", s0=0.91, s1=0.82, s2=0.88)),
        arm("x", s0=0.91, s1=0.82, s2=0.88),
        "pass_at_1",
    )
    assert found is not None
    assert found.n == 3
    assert found.mean == pytest.approx(0.02)
    assert found.high == pytest.approx(0.02 + 4.303 * 0.01 / math.sqrt(3))
    assert found.low == pytest.approx(0.02 - 4.303 * 0.01 / math.sqrt(3))


def test_only_seeds_that_both_have_are_compared() -> None:
    late = arm("x", s1=0.9, s3=0.1)
    found = difference_of(results(BASELINE, late, seeds=(0, 1, 2, 3)), late, "pass_at_1")
    assert found is not None
    assert (found.n, found.low, found.high) == (1, None, None)
    assert found.mean == pytest.approx(0.1)


def test_without_a_pair_there_is_no_difference() -> None:
    none = arm("x")
    assert difference_of(results(BASELINE, none), none, "pass_at_1") is None
    assert mean_of(none, "pass_at_1") is None


@pytest.mark.parametrize(
    ("df", "expected"), [(1, 12.706), (10, 2.228), (11, 2.201), (30, 2.042), (120, 1.980)]
)
def test_quantiles_of_t_are_those_of_the_tables(df: int, expected: float) -> None:
    assert t95(df) == pytest.approx(expected, abs=6e-4)


_SHARES = st.floats(0, 1)


@given(st.lists(st.tuples(_SHARES, _SHARES), min_size=2, max_size=8), st.floats(-1, 1))
def test_an_interval_holds_its_mean_and_moves_with_the_arm(
    pairs: list[tuple[float, float]], by: float
) -> None:
    found, moved = compare(pairs), compare([(ours + by, theirs) for ours, theirs in pairs])
    assert found is not None
    assert moved is not None
    assert found.low is not None
    assert found.high is not None
    assert found.low <= found.mean <= found.high
    assert moved.mean == pytest.approx(found.mean + by, abs=1e-9)
    assert moved.high == pytest.approx(found.high + by, abs=1e-6)


def test_a_measure_that_an_arm_lacks_is_left_out_of_its_mean() -> None:
    silent = dataclasses.replace(OUTCOME, seed=1, accuracy_given_thinking_before=None)
    both = ArmResult("x", "", (OUTCOME, silent))
    assert mean_of(both, "accuracy_given_thinking_before") == 0.95


def test_the_text_tells_every_seed_what_is_missing_and_what_was_refused() -> None:
    text = as_text(results(BASELINE, arm("x", s0=0.95, s1=0.91)))
    assert "5 of 6 arms are finished" in text
    assert "0.900" in text
    assert "0.910" in text
    # +0.05 and +0.11: mean 0.08, half width 12.706 * 0.0424 / sqrt 2
    assert "+0.080 [-0.301, +0.461]" in text
    assert "not run: fp8: there is no such unit" in text
    assert max(map(len, text.splitlines())) <= 110


def test_the_object_says_whether_it_is_complete() -> None:
    found = as_object(results(BASELINE, arm("x", s0=0.95)))
    assert found["complete"] is False
    assert found["baseline"] == "rule"
    assert found["arms"][1]["difference"]["pass_at_1"]["mean"] == pytest.approx(0.05)
    assert found["arms"][1]["mean"]["response_length"] == 12.0


def test_results_survive_json() -> None:
    made = results(BASELINE, arm("x", s0=0.95))
    assert Results.from_json(json.loads(json.dumps(made.to_json()))) == made


def on_the_way(name: str, *curves: tuple[tuple[int, float], ...]) -> ArmResult:
    outcomes = (dataclasses.replace(OUTCOME, seed=n, curve=curve) for n, curve in enumerate(curves))
    return ArmResult(name, name, tuple(outcomes))


def test_steps_to_a_mark_lie_between_two_evaluations_and_are_paired_by_seed() -> None:
    slow = on_the_way("slow", ((0, 0.4), (10, 0.6), (20, 0.8)), ((0, 0.4), (10, 0.5), (20, 0.9)))
    quick = on_the_way("quick", ((0, 0.4), (10, 0.8), (20, 0.7)), ((0, 0.8), (10, 0.9), (20, 0.9)))
    never = on_the_way("never", ((0, 0.4), (20, 0.6)), ())
    assert slow.steps_to(0.7) == pytest.approx({0: 15.0, 1: 15.0})
    assert quick.steps_to(0.7) == pytest.approx({0: 7.5, 1: 0.0})
    assert never.steps_to(0.7) == {}
    found = results(slow, quick, never, seeds=(0, 1))
    difference = difference_to(found, quick, 0.7)
    assert difference is not None
    assert difference.n == 2
    assert difference.mean == pytest.approx(-11.25)
    assert difference_to(found, never, 0.7) is None
    seldom = on_the_way("seldom", ((0, 0.4), (10, 0.9), (20, 0.9)), ((0, 0.4), (20, 0.5)))
    assert difference_to(results(slow, seldom, seeds=(0, 1)), seldom, 0.7) is None, "not the faster one"
    text = as_text(found, 0.7)
    assert "steps to T=1 of 0.7" in text
    assert "0 of 2" in text
    assert "steps to" not in as_text(found)
    assert as_object(found, 0.7)["steps_to_mark"]["slow"]["by_seed"] == pytest.approx({0: 15.0, 1: 15.0})
    assert Results.from_json(json.loads(json.dumps(found.to_json()))) == found
