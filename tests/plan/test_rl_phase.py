"""The phases of reinforcement learning: what each grows with, and the long tail of lengths."""

import math
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1hpc.base.errors import UsageError
from r1hpc.plan.hours.goodput import FailureRates
from r1hpc.plan.hours.rl import PHASES, RlRates, RlWork, decoding, estimate_rl, rl_phases, tail
from r1hpc.plan.topology.gpus import find_gpu

_RATES = RlRates(0.3, 0.5)


def _work(**change: Any) -> RlWork:
    asked: dict[str, Any] = {
        "params": 7e9,
        "gpu": find_gpu("a100"),
        "num_gpus": 8,
        "num_rollouts": 100,
        "sequences_per_rollout": 512,
        "prompt_length": 256,
        "completion_length": 1024,
        "max_completion_length": 4096,
        "cache_bytes_per_token": 2 * 2 * 32 * 8 * 128,
    }
    return RlWork(**(asked | change))


def test_arithmetic_by_hand() -> None:
    phases = rl_phases(_work(), _RATES)
    rate = 312e12 * 0.3 * 3600
    tokens = 100 * 512 * (256 + 1024)
    assert tuple(phases) == PHASES
    assert phases["prefill"] == pytest.approx(2 * 7e9 * 100 * 512 * 256 / rate)
    assert phases["update"] == pytest.approx(6 * 7e9 * tokens / rate)
    assert phases["logprobs"] == pytest.approx(4 * 7e9 * tokens / rate)
    assert phases["reward"] == phases["evaluation"] == 0


def test_decoding_is_bound_by_bandwidth_until_many_decode_together() -> None:
    few, many = _work(sequences_per_rollout=8), _work(sequences_per_rollout=64)
    spent = [rl_phases(work, _RATES)["decode"] for work in (few, many)]
    assert spent[1] < 2.2 * spent[0]
    better = replace(few, gpu=find_gpu("h100"))
    faster = spent[0] / rl_phases(better, _RATES)["decode"]
    assert faster == pytest.approx(3.35 / 2.039, rel=0.05)


def test_a_small_model_decodes_no_faster_than_its_kernels_are_launched() -> None:
    """The published speed of Qwen2-0.5B with transformers on an A100: 49.94 tokens/s, one sequence."""
    alone = {"sequences_per_rollout": 1, "num_rollouts": 1, "num_gpus": 1, "max_completion_length": 1024}
    small = _work(params=0.494e9, eager_layers=24, cache_bytes_per_token=2 * 2 * 24 * 2 * 64, **alone)
    tokens_s = 1024 / (rl_phases(small, _RATES)["decode"] * 3600)
    assert tokens_s == pytest.approx(49.94, rel=0.05)
    assert 1024 / (rl_phases(replace(small, eager_layers=0), _RATES)["decode"] * 3600) > 10 * tokens_s
    large = _work(params=7e10, eager_layers=80)
    assert rl_phases(large, _RATES) == rl_phases(replace(large, eager_layers=0), _RATES)


def test_a_mixture_computes_with_the_parameters_that_a_token_meets() -> None:
    dense, moe = _work(params=7e10), _work(params=7e10, active_params=7e9)
    whole, part = rl_phases(dense, _RATES), rl_phases(moe, _RATES)
    for phase in ("prefill", "logprobs", "update"):
        assert part[phase] == pytest.approx(whole[phase] / 10)
    assert part["hand_over"] == whole["hand_over"]
    few = [replace(work, sequences_per_rollout=8) for work in (dense, moe)]
    assert len({rl_phases(work, _RATES)["decode"] for work in few}) == 1, "all weights are read"
    assert estimate_rl(moe).baselines["6nd_at_40"] == pytest.approx(
        estimate_rl(dense).baselines["6nd_at_40"] / 10
    )


def test_fp32_computes_slowly_and_holds_twice_as_much() -> None:
    half, full = (rl_phases(_work(precision=each), _RATES) for each in ("bf16", "fp32"))
    assert full["update"] == pytest.approx(15 * half["update"])
    assert full["hand_over"] == pytest.approx(2 * half["hand_over"])
    few = [_work(precision=each, sequences_per_rollout=1) for each in ("bf16", "fp32")]
    slow, fast = (rl_phases(work, _RATES)["decode"] for work in reversed(few))
    assert slow == pytest.approx(2 * fast, rel=0.01)


def test_a_batch_waits_for_its_longest() -> None:
    work = _work()
    assert tail(work, 1) == 1
    assert 1 < tail(work, 8) < tail(work, 256) <= 4
    assert tail(replace(work, max_completion_length=1024), 256) == 1
    (batches,) = work.rollout
    plan = decoding(work, batches)
    assert plan.steps == pytest.approx(1024 * tail(work, plan.batch))


def test_what_decodes_together_goes_by_the_room_that_there_is() -> None:
    """Of a 7B on cards of 80 GB, and more sequences than any cache holds."""
    many = _work(sequences_per_rollout=1 << 20)
    (batches,) = many.rollout
    card, token, length = 0.9 * 80 * 2**30, many.cache_bytes, 256 + 1024
    expected = {
        "beside training states": (many, (card - 2 * 7e9 - 16 * 7e9 / 8) / token),
        "where nothing is trained": (replace(many, is_trained=False), (card - 2 * 7e9) / token),
        "in what vLLM is given": (replace(many, cache_tokens=50_000.0), 50_000),
    }
    for what, (work, tokens) in expected.items():
        assert decoding(work, batches).batch == pytest.approx(tokens / length), what


def test_a_large_model_is_spread_where_nobody_says_that_it_is_whole() -> None:
    large = _work(params=3.2e10)
    (batches,) = large.rollout
    assert decoding(large, batches).gpus_per_replica == 4
    whole = replace(large, is_whole=True)
    assert decoding(whole, batches).gpus_per_replica == 1
    handed = [rl_phases(work, _RATES)["hand_over"] for work in (large, whole)]
    assert handed[1] == pytest.approx(4 * handed[0])
    assert _stage_prefill(whole, is_trained=False) < _stage_prefill(whole, is_trained=True)


def _stage_prefill(work: RlWork, *, is_trained: bool) -> float:
    """On two nodes, where weights that are sharded for training are gathered."""
    return rl_phases(replace(work, num_gpus=16, is_trained=is_trained), _RATES)["prefill"]


@settings(max_examples=40)
@given(
    params=st.floats(5e8, 2e11),
    gpus=st.sampled_from([1, 8, 64]),
    sequences=st.integers(1, 4096),
    rollouts=st.integers(1, 500),
)
def test_more_work_never_takes_less(params: float, gpus: int, sequences: int, rollouts: int) -> None:
    work = _work(params=params, num_gpus=gpus, sequences_per_rollout=sequences, num_rollouts=rollouts)
    total = sum(rl_phases(work, _RATES).values())
    assert total > 0
    for more in (
        replace(work, num_rollouts=2 * rollouts),
        replace(work, num_iterations=2),
        replace(work, critic_params=params),
        replace(work, recompute=True),
        replace(work, reward_params=params),
    ):
        assert sum(rl_phases(more, _RATES).values()) > total


def test_an_estimate_has_its_phases_and_an_interval() -> None:
    found = estimate_rl(_work())
    assert found.gpu_hours is not None
    assert found.gpu_hours.p10 < found.gpu_hours.p50 < found.gpu_hours.p90
    assert sum(found.phases.values()) == pytest.approx(
        found.ideal_gpu_hours.p50 if found.ideal_gpu_hours else 0
    )
    assert found.baselines.keys() >= {"seed_formula", "6nd_at_40"}
    assert found.memory is not None
    sampling = estimate_rl(replace(_work(), is_trained=False))
    assert sampling.baselines == found.baselines
    assert sampling.memory is None, "nothing is trained"
    assert set(sampling.phases) == {"prefill", "decode"}


def test_interruptions_that_leave_no_time_give_no_division_by_zero() -> None:
    found = estimate_rl(_work(), rates=FailureRates(preemptions_per_day=200))
    assert found.goodput is not None
    assert found.goodput.goodput == 0
    assert found.gpu_hours is not None
    assert found.gpu_hours.p50 < math.inf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"params": 0.0}, "--params is 0: give a number from 1"),
        ({"active_params": 8e9}, "more than --params"),
        ({"num_gpus": 0}, "--num-gpus is 0"),
        ({"num_rollouts": 0}, "--rl-sequences"),
        ({"sequences_per_rollout": -4}, "--sequences-per-rollout is -4"),
        ({"prompt_length": math.nan}, "--prompt-length is nan"),
        ({"prompt_length": -10_000}, "--prompt-length is -10000"),
        ({"completion_length": 0}, "--completion-length is 0"),
        ({"max_completion_length": math.inf}, "--max-completion-length is inf"),
        ({"max_completion_length": 10}, "give a longer --max-completion-length"),
        ({"logprob_passes": -5}, "--logprob-passes is -5"),
        ({"critic_params": -1.0}, "--critic-params is -1"),
        ({"precision": "fp8", "gpu": find_gpu("h100")}, "give --precision bf16"),
        ({"gpu": find_gpu("v100-32gb")}, "take --precision fp16"),
    ],
)
def test_what_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        _work(**change)
