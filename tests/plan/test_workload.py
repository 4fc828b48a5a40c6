"""FLOPs from numbers and from shapes, and numbers that no run can have."""

import math
from typing import Any

import pytest

from r1hpc.base.errors import UsageError
from r1hpc.plan.hours.workload import Workload, parse_count
from r1hpc.plan.model.shape import flops_per_token, hardware_flops_per_token, model_shape
from r1hpc.plan.topology.gpus import find_gpu

_A100 = find_gpu("a100")


def _of(**change: Any) -> Workload:
    asked: dict[str, Any] = {"params": 7e9, "tokens": 1e12, "gpu": _A100}
    return Workload.of_counts(**(asked | change))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7B", 7e9),
        ("1.5e9", 1.5e9),
        ("350M", 3.5e8),
        ("2T", 2e12),
        ("1_000", 1000),
        ("6,700 m", 6.7e9),
        ("0.5b", 5e8),
    ],
)
def test_counts_as_people_write_them(text: str, value: float) -> None:
    assert parse_count(text, "--params") == value


@pytest.mark.parametrize("text", ["", "B", "seven", "7BB", "nan", "inf", "1e999"])
def test_what_is_no_count(text: str) -> None:
    with pytest.raises(UsageError, match="--params"):
        parse_count(text, "--params")


def test_known_shapes_are_guessed_within_a_tenth() -> None:
    """layers x hidden of published models: GPT-2, Llama 7B and 65B, GPT-3."""
    for params, layers, hidden in (
        (124e6, 12, 768),
        (6.7e9, 32, 4096),
        (65.2e9, 80, 8192),
        (175e9, 96, 12288),
    ):
        guessed, exact = _of(params=params), _of(params=params, layers=layers, hidden_size=hidden)
        assert exact.flops_per_token == 6 * params + 12 * layers * hidden * 2048
        assert guessed.flops_per_token == pytest.approx(exact.flops_per_token, rel=0.01)
        assert guessed.hidden_size == pytest.approx(hidden, rel=0.45)


def test_full_recomputation_repeats_the_layers_and_not_the_head() -> None:
    shape = model_shape({"model_type": "llama"})
    work = Workload.of_shape(shape, tokens=1e9, seq_len=1024, gpu=_A100, recompute="full")
    assert work.hardware_flops == 1e9 * hardware_flops_per_token(shape, 1024, True) < 4 / 3 * work.flops
    once = Workload.of_shape(shape, tokens=1e9, seq_len=1024, gpu=_A100)
    assert once.hardware_flops == once.flops
    assert _of(recompute="full").hardware_flops == pytest.approx(4 / 3 * _of().flops)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "mixtral", "qwen3_moe"])
def test_a_shape_gives_its_exact_flops(family: str) -> None:
    shape = model_shape({"model_type": family})
    work = Workload.of_shape(shape, tokens=1e9, seq_len=1024, gpu=_A100)
    assert work.flops == 1e9 * flops_per_token(shape, 1024)
    scores = 12 * shape.num_layers * shape.num_attention_heads * shape.head_dim * 1024
    assert work.flops - work.flops_causal == pytest.approx(1e9 * scores / 2)
    assert work.is_moe == (family in ("mixtral", "qwen3_moe"))


def test_hours_at_an_mfu() -> None:
    """Llama-1 65B: 380 tokens/s on each GPU give the 1,022,362 hours it prints (LLaMA paper, table 15)."""
    work = _of(params=65.2e9, tokens=1.4e12)
    mfu = 380 * work.flops_per_token / _A100.peak_flops
    assert work.gpu_hours_at(mfu) == pytest.approx(1_022_362, rel=0.002)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": -1.0}, "--tokens is -1"),
        ({"params": 0.0}, "--params is 0"),
        ({"params": math.nan}, "--params is nan"),
        ({"params": 1e15}, "check the unit"),
        ({"active_params": 8e9}, "more than --params"),
        ({"num_gpus": 0}, "--num-gpus is 0"),
        ({"seq_len": 0}, "--seq-len is 0"),
        ({"layers": -1}, "--layers is -1"),
        ({"precision": "bf15"}, "did you mean 'bf16'"),
        ({"precision": "fp8"}, "A100-SXM4-80GB has no FP8"),
        ({"precision": "bf16", "gpu": find_gpu("v100-32gb")}, "no bf16: take --precision fp16"),
        ({"recompute": "ful"}, "did you mean 'full'"),
        ({"zero_stage": 4}, "--zero-stage is 4"),
        ({"num_gpus": 12, "tensor_parallel": 8}, "12 is not a multiple"),
    ],
)
def test_numbers_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        _of(**change)
