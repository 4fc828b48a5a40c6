"""The estimate as an answer: its quantiles, its reasons, the article's formula beside it."""

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1hpc.base.errors import UsageError
from r1hpc.base.units import amount
from r1hpc.plan.hours.estimate import (
    Estimate,
    baselines,
    estimate,
    measured_estimate,
    seed_estimate,
    seed_formula,
)
from r1hpc.plan.hours.goodput import FailureRates
from r1hpc.plan.hours.spread import Spread
from r1hpc.plan.hours.text import estimate_text, summary_line
from r1hpc.plan.hours.workload import Workload
from r1hpc.plan.topology.gpus import find_gpu


def _work(**change: Any) -> Workload:
    asked: dict[str, Any] = {"params": 7e9, "tokens": 1e12, "gpu": find_gpu("a100")}
    return Workload.of_counts(**(asked | change))


def _hours(found: Estimate) -> Spread:
    assert found.gpu_hours is not None
    return found.gpu_hours


@settings(max_examples=25)
@given(
    params=st.floats(1e7, 1e12),
    tokens=st.floats(1e6, 1e14),
    gpus=st.one_of(st.none(), st.integers(1, 20_000)),
    seq_len=st.integers(1, 200_000),
)
def test_any_run_gets_an_ordered_answer(params: float, tokens: float, gpus: int | None, seq_len: int) -> None:
    found = estimate(_work(params=params, tokens=tokens, num_gpus=gpus, seq_len=seq_len))
    hours = _hours(found)
    assert 0 < hours.p10 < hours.p50 < hours.p90 < math.inf
    assert found.ideal_gpu_hours is not None
    assert found.ideal_gpu_hours.p50 <= hours.p50 * 1.0001
    assert sum(found.drivers.values()) == pytest.approx(1, abs=0.05)
    json.dumps(found.to_json(), allow_nan=False)
    assert estimate_text(found)


def test_more_tokens_cost_in_proportion() -> None:
    one, two = (_hours(estimate(_work(tokens=tokens))).p50 for tokens in (1e12, 2e12))
    assert two == pytest.approx(2 * one, rel=0.02)


def test_the_sites_own_rates_count() -> None:
    calm = _hours(estimate(_work(num_gpus=512))).p50
    rough = estimate(_work(num_gpus=512), rates=FailureRates(preemptions_per_day=10))
    assert _hours(rough).p50 > 1.1 * calm
    assert rough.goodput is not None
    assert rough.goodput.optimal_interval_s > 0


def test_a_cluster_that_fails_faster_than_it_saves() -> None:
    found = estimate(_work(num_gpus=512), rates=FailureRates(gpu_hours_per_failure=10))
    assert any("less than half" in note for note in found.notes)
    assert math.isfinite(_hours(found).p90)


def test_the_articles_formula_says_what_it_is() -> None:
    assert seed_formula(7e9, 100) == 86
    found = seed_estimate(7e9, 100)
    assert _hours(found) == Spread(86, 86, 86)
    assert "86" in found.notes[0]
    assert "560" in found.notes[0]
    assert found.baselines["seed_formula"] == 86
    assert found.baselines["6nd_at_40"] == pytest.approx(2337, rel=0.001)
    assert found.memory is not None
    assert "memory" not in estimate_text(found)


def test_baselines_by_hand() -> None:
    found = baselines(_work(tokens=25e9))
    assert found["seed_formula"] == pytest.approx(86)
    assert found["6nd_at_40"] == pytest.approx(2337, rel=0.001)
    assert found["8nd_at_150_tflops"] == pytest.approx(2592.6, rel=0.001)


def test_json_holds_what_scripts_read() -> None:
    value = json.loads(json.dumps(estimate(_work(num_gpus=256)).to_json()))
    assert set(value["gpu_hours"]) == {"p10", "p50", "p90"}
    assert value["assumptions"]["gpu"] == "A100-SXM4-80GB"
    assert value["baselines"]["seed_formula"] > 0
    assert value["memory"]["best"]["zero_stage"] in (0, 1, 2, 3)
    assert value["wall_hours"]["256"]["p50"] == pytest.approx(value["gpu_hours"]["p50"] / 256)
    assert value["flops"]["total_causal"] < value["flops"]["total"]
    assert "PaLM" in value["mfu"]["convention"]


def test_words_for_a_person() -> None:
    text = estimate_text(estimate(_work()))
    for words in ("GPU-hours", "MFU", "width", "Daly", "usual number", "seed_formula", "ZeRO"):
        assert words in text
    assert summary_line(Estimate("flops", None)) == "not known"
    assert amount(1234.5) == "1,230"


class TestMeasured:
    """Twenty of two hundred steps, each of ten seconds on eight GPUs."""

    def _estimate(self, seconds: list[float], **change: Any) -> Estimate:
        known: dict[str, Any] = {
            "num_steps": 200,
            "num_gpus": 8,
            "num_nodes": 1,
            "hours_spent": 10.0,
            "useful": 0.9,
            "updates_per_rollout": 1,
        }
        return measured_estimate(dict(enumerate(seconds, 1)), **(known | change))

    def test_the_rest_at_the_speed_so_far(self) -> None:
        hours = _hours(self._estimate([80.0] * 20))
        assert hours.p50 == pytest.approx(10 + 180 * 80 / 3600 / 0.9)
        assert 10 < hours.p10 < hours.p50 < hours.p90

    def test_a_slow_start_is_left_out(self) -> None:
        steady, slow = self._estimate([80.0] * 20), self._estimate([9e9, 9e9, *[80.0] * 18])
        assert _hours(slow).p50 == pytest.approx(_hours(steady).p50)

    def test_a_rollout_is_paid_by_all_its_updates(self) -> None:
        """Only the first of four updates carries the rollout."""
        found = self._estimate([240.0, 40.0, 20.0, 20.0] * 5, updates_per_rollout=4)
        assert _hours(found).p50 == pytest.approx(10 + 180 * 80 / 3600 / 0.9)

    def test_a_finished_run_is_certain(self) -> None:
        hours = _hours(self._estimate([80.0] * 200))
        assert hours == Spread(10, 10, 10)

    def test_a_run_without_gpus_is_told_in_node_hours(self) -> None:
        found = self._estimate([20.0] * 20, num_gpus=0, num_nodes=2)
        assert found.gpu_hours is None
        assert found.node_hours is not None
        assert found.node_hours.p50 == pytest.approx(10 + 180 * 20 / 3600 / 0.9)
        assert "node-hours" in estimate_text(found)

    def test_too_few_steps(self) -> None:
        with pytest.raises(UsageError, match="at least 5 steps, and the run has 2"):
            self._estimate([1.0, 1.0])
