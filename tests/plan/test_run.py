"""The plan of a run, what it refuses, and that it survives plan.json."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1hpc.base.errors import ConfigError, StateError
from r1hpc.config.load import load
from r1hpc.plan.run import RunPlan, describe_save, make_plan
from r1hpc.plan.save_time import SaveSpeed

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


@settings(max_examples=40)
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


def test_what_a_save_costs_is_planned_from_a_measured_speed() -> None:
    plan = make_plan(
        load("train"),
        gpus_per_node=8,
        vocab_size=151936,
        time_limit_s=86400,
        save_speed=SaveSpeed(4.0, "measured"),
    )
    assert plan.checkpoint_bytes is not None
    assert plan.copy_rank_bytes == -(-plan.checkpoint_bytes // 32)
    assert plan.copy_node_bytes == 8 * plan.copy_rank_bytes
    assert plan.save_time_s == pytest.approx(5 + plan.checkpoint_bytes / 2**30 / 4)
    assert plan.save_wait_s == pytest.approx(plan.copy_rank_bytes / 2**30 / 10)
    text = "\n".join(describe_save(plan))
    assert "at 4 GiB/s (measured)" in text
    assert "on a node" in text


def test_a_synchronous_save_waits_for_all_of_it_and_takes_no_memory() -> None:
    plan = _smoke("checkpoint.asynchronous=false", "checkpoint.assumed_bandwidth_gib_s=2")
    assert plan.save_speed is not None
    assert plan.save_speed.gib_s == 2
    assert plan.save_wait_s == plan.save_time_s
    assert plan.copy_node_bytes == 0
    assert len(describe_save(plan)) == 1


def test_a_plan_of_before_is_read() -> None:
    known = json.loads(json.dumps(_smoke().to_json()))
    later = ("save_speed", "save_wait_s", "copy_rank_bytes", "copy_node_bytes", "warning_window_s")
    plan = RunPlan.from_json({key: value for key, value in known.items() if key not in later})
    assert plan.save_speed is None
    assert describe_save(plan) == []


def test_a_model_type_nobody_has_is_named_and_an_uncounted_one_is_left_to_train() -> None:
    with pytest.raises(ConfigError, match=r"model_type is 'qwne2', .* \(did you mean 'qwen2'\?\)"):
        _smoke("model.config.model_type=qwne2")
    assert _smoke("model.config.model_type=mamba").num_parameters is None
