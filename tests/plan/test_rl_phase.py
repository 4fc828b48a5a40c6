"""The phases of reinforcement learning: what each grows with, and the long tail of lengths."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1hpc.base.errors import UsageError
from r1hpc.plan.estimate_run import estimate_rl
from r1hpc.plan.hardware import find_gpu
from r1hpc.plan.rl_phase import PHASES, RlRates, RlWork, decoding, rl_phases, tail

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
    assert phases["reward"] == 0


def test_decoding_is_bound_by_bandwidth_until_many_decode_together() -> None:
    few, many = _work(sequences_per_rollout=8), _work(sequences_per_rollout=64)
    spent = [rl_phases(work, _RATES)["decode"] for work in (few, many)]
    assert spent[1] < 2.2 * spent[0]
    better = replace(few, gpu=find_gpu("h100"))
    faster = spent[0] / rl_phases(better, _RATES)["decode"]
    assert faster == pytest.approx(3.35 / 2.039, rel=0.05)


def test_a_batch_waits_for_its_longest() -> None:
    work = _work()
    assert tail(work, 1) == 1
    assert 1 < tail(work, 8) < tail(work, 256) <= 4
    assert tail(replace(work, max_completion_length=1024), 256) == 1
    assert decoding(work).steps == pytest.approx(1024 * tail(work, decoding(work).batch))


@settings(deadline=None, max_examples=40)
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
        replace(work, reward_s_per_rollout=5),
    ):
        assert sum(rl_phases(more, _RATES).values()) > total


def test_an_estimate_has_its_phases_and_an_interval() -> None:
    found = estimate_rl(_work())
    assert found.gpu_hours is not None
    assert found.gpu_hours.p10 < found.gpu_hours.p50 < found.gpu_hours.p90
    assert sum(found.phases.values()) == pytest.approx(
        found.ideal_gpu_hours.p50 if found.ideal_gpu_hours else 0
    )
    sampling = estimate_rl(_work(), "evaluate")
    assert set(sampling.phases) == {"prefill", "decode"}


@pytest.mark.parametrize("change", [{"num_gpus": 0}, {"completion_length": 0}, {"max_completion_length": 10}])
def test_what_cannot_be(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        _work(**change)
