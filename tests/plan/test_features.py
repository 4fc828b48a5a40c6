"""What physics says of any configuration, whatever the fit found."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1hpc.plan.hours.mfu import NAMES, features, mfu_belief, num_gpus_of, run_weight
from r1hpc.plan.hours.workload import Workload
from r1hpc.plan.topology.gpus import find_gpu


def _work(**change: Any) -> Workload:
    asked: dict[str, Any] = {"params": 7e9, "tokens": 1e12, "gpu": find_gpu("a100")}
    asked |= {"num_gpus": 64, "recompute": "none"}
    return Workload.of_counts(**(asked | change))


def _mfu(**change: Any) -> float:
    return mfu_belief(_work(**change), 0.0).median


def test_the_names_are_those_of_the_coefficients() -> None:
    assert tuple(features(_work())) == NAMES


def test_the_usual_number_of_gpus_holds_whole_copies_of_the_layout() -> None:
    assert num_gpus_of(_work(num_gpus=None)) == 206
    assert num_gpus_of(_work(num_gpus=None, tensor_parallel=8)) == 208
    assert num_gpus_of(_work(num_gpus=None, tensor_parallel=8, pipeline_parallel=35)) == 280
    assert num_gpus_of(_work(num_gpus=24, tensor_parallel=8)) == 24


@settings(max_examples=60)
@given(
    params=st.floats(1e8, 3e11),
    gpus=st.sampled_from([1, 8, 64, 512]),
    seq_len=st.sampled_from([512, 2048, 32768]),
    batch=st.floats(1e5, 1e8),
    micro=st.sampled_from([1, 4, 32]),
)
def test_what_cannot_help_does_not(params: float, gpus: int, seq_len: int, batch: float, micro: int) -> None:
    known = {
        "params": params,
        "num_gpus": gpus,
        "seq_len": seq_len,
        "tokens_per_step": batch,
        "micro_batch_size": micro,
    }
    base = _mfu(**known)
    assert 0 < base <= 0.87
    assert _mfu(**known, recompute="full") < base
    assert _mfu(**known, recompute="full") < _mfu(**known, recompute="selective")
    assert _mfu(**known, zero_stage=3, offload=True) < _mfu(**known, zero_stage=3)
    assert _mfu(**(known | {"micro_batch_size": 4 * micro})) >= base


def test_zero_3_is_no_faster_than_zero_2_where_accumulation_repeats_its_gathering() -> None:
    known = {"params": 13e9, "tokens_per_step": 64 * 16 * 2048, "micro_batch_size": 1}
    assert _mfu(**known, zero_stage=3) < _mfu(**known, zero_stage=2)


def test_more_stages_and_ways_cost() -> None:
    known = {"params": 40e9, "num_gpus": 512, "tokens_per_step": 3e6, "micro_batch_size": 2}
    ways = [_mfu(**known, tensor_parallel=t) for t in (2, 4, 8, 16)]
    stages = [_mfu(**known, tensor_parallel=8, pipeline_parallel=p) for p in (1, 4, 16)]
    assert ways == sorted(ways, reverse=True)
    assert stages == sorted(stages, reverse=True)


def test_an_h100_has_the_lower_mfu_and_the_fewer_hours() -> None:
    slow, fast = _work(), _work(gpu=find_gpu("h100"))
    a, b = (mfu_belief(work, 0.0).median for work in (slow, fast))
    assert b < a
    assert fast.gpu_hours_at(b) < slow.gpu_hours_at(a)


def test_fp8_is_faster_and_fp32_is_slower() -> None:
    h100 = find_gpu("h100")
    speeds = [_mfu(gpu=h100, precision=precision) for precision in ("fp32", "tf32", "bf16", "fp8")]
    assert speeds == sorted(speeds)


def test_unknown_things_widen_or_lower_but_never_fail() -> None:
    known = _work(tokens_per_step=4e6, micro_batch_size=4, zero_stage=1)
    unknown = replace(known, recompute=None, num_gpus=None, tokens_per_step=None, micro_batch_size=None)
    assert 0.2 < mfu_belief(unknown, 1.0).median < 0.7


def test_effects_add_up() -> None:
    belief = mfu_belief(_work(), 1.0)
    assert sum(belief.effects.values()) == pytest.approx(belief.log_mean)
    assert sum(belief.variances.values()) == pytest.approx(belief.log_sd**2)
    assert belief.log_sd > 0


def test_a_long_run_loses_more_and_knows_less() -> None:
    short, long = mfu_belief(_work(), run_weight(0.1)), mfu_belief(_work(), run_weight(1000))
    assert long.median < short.median
    assert long.log_sd > short.log_sd
