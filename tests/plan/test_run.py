"""The plan of a run, what it refuses, and that it survives plan.json."""

import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1hpc.base.errors import ConfigError, StateError
from r1hpc.config.load import load
from r1hpc.plan.run import RunPlan, make_plan

_SMOKE = load("smoke", ["train.global_batch_size=24"])


def _smoke(*overrides: str, **asked: Any) -> RunPlan:
    asked = {"gpus_per_node": 0, "vocab_size": 512, "time_limit_s": 1800} | asked
    return make_plan(load("smoke", overrides), **asked)


def test_a_cpu_run() -> None:
    plan = _smoke("train.num_steps=60", "train.global_batch_size=24", "data.seq_len=128", num_nodes=4)
    assert plan.topology.world_size == 4
    assert plan.batch.gradient_accumulation_steps == 3
    assert plan.tokens_per_step == 24 * 128
    assert plan.total_tokens == 60 * 24 * 128
    assert plan.gpu_hours_ceiling == 0
    assert plan.node_hours_ceiling == 2


def test_a_gpu_run() -> None:
    plan = make_plan(load("train"), gpus_per_node=8, vocab_size=151936, time_limit_s=86400)
    assert plan.topology.num_gpus == 32
    assert plan.gpu_hours_ceiling == 768
    assert plan.num_parameters == 494_032_768  # Qwen2.5-0.5B as its model card counts: 0.49 B
    assert plan.memory is not None
    assert 0 < plan.memory.total_gib < 80
    assert plan.checkpoint_bytes == 14 * plan.num_parameters


def test_no_time_limit_no_ceiling() -> None:
    plan = _smoke(time_limit_s=None)
    assert plan.gpu_hours_ceiling is None
    assert plan.node_hours_ceiling is None


@pytest.mark.parametrize("overrides", [(), ("model.config.model_type=mamba",)])
def test_what_is_not_known_is_none(overrides: tuple[str, ...]) -> None:
    """Neither the dataset's vocabulary, nor a family that cannot be counted, stops a plan."""
    plan = _smoke(*overrides, vocab_size=512 if overrides else None)
    assert plan.num_parameters is None
    assert plan.flops_per_token is None
    assert plan.memory is None
    assert plan.checkpoint_bytes is None
    assert plan.save_time_s is None
    assert plan.total_tokens > 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.global_batch_size=25"], "train.global_batch_size is 25"),
        (["train.gradient_accumulation_steps=5"], "gradient_accumulation_steps 5"),
        (["data.seq_len=2048"], "data.seq_len is 2048, but the model has 1024 positions"),
        (["model.config.hidden_size=97"], "hidden_size 97 is not a multiple of num_attention_heads 4"),
        (["model.config.num_key_value_heads=3"], "4 is not a multiple of num_key_value_heads 3"),
        (["model.config.model_type=mamba", "model.config.hidden_size=97"], "hidden_size 97"),
        (["model.config.model_type=mamba", "data.seq_len=2048"], "has 1024 positions"),
    ],
)
def test_what_cannot_be_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _smoke(*overrides)


def test_positions_a_family_has_by_default_count_too() -> None:
    with pytest.raises(ConfigError, match="has 1024 positions"):
        make_plan(load(None, ["model.config={model_type: gpt2}", "data.seq_len=1025"]), gpus_per_node=0)


@settings(deadline=None, max_examples=40)
@given(
    nodes=st.sampled_from([1, 2, 3, 4, 6, 12]),
    vocab_size=st.one_of(st.none(), st.integers(1, 10**6)),
    time_limit_s=st.one_of(st.none(), st.integers(1, 10**7)),
)
def test_plan_json_gives_the_plan_back(nodes: int, vocab_size: int | None, time_limit_s: int | None) -> None:
    plan = make_plan(
        _SMOKE, gpus_per_node=0, num_nodes=nodes, vocab_size=vocab_size, time_limit_s=time_limit_s
    )
    value = json.loads(json.dumps(plan.to_json()))
    assert RunPlan.from_json(value) == plan
    assert RunPlan.from_json(value | {"added_later": 1}) == plan
    if plan.memory is not None:
        assert value["memory"]["total_gib"] == plan.memory.total_gib


@pytest.mark.parametrize("change", [{"topology": {}}, {"topology": None}, {"memory": {"x": 1}}])
def test_a_foreign_plan_json(change: dict[str, Any]) -> None:
    with pytest.raises(StateError, match=r"plan\.json"):
        RunPlan.from_json(_smoke().to_json() | change)
    with pytest.raises(StateError, match="num_steps"):
        RunPlan.from_json({key: v for key, v in _smoke().to_json().items() if key != "num_steps"})


def test_planning_imports_nothing_heavy() -> None:
    code = "import r1hpc.plan.run, sys; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "numpy", "omegaconf", "yaml", "deepspeed", "zarr", "submitit"}
    assert not heavy & set(done.stdout.split())
