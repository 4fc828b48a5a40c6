"""Node-hours of CPU runs follow from their plan."""

from dataclasses import replace

import pytest

from r1hpc.config.schema import DataConfig, ModelConfig, ResourcesConfig, RunConfig, TrainConfig
from r1hpc.estimator.cpu import FLOPS_PER_RANK, STARTUP_S, cpu_node_hours
from r1hpc.plan.run import RunPlan, make_plan


def plan_of(num_steps: int, nodes: int) -> RunPlan:
    shape = {
        "model_type": "qwen2",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "vocab_size": 512,
    }
    config = RunConfig(
        model=ModelConfig(config=shape),
        data=DataConfig(recipe="smoke", seq_len=128),
        train=TrainConfig(num_steps=num_steps, global_batch_size=8, micro_batch_size=2),
        resources=ResourcesConfig(nodes=nodes, gpus_per_node=0),
    )
    return make_plan(config, gpus_per_node=0)


def p50(num_steps: int, nodes: int) -> float:
    found = cpu_node_hours(plan_of(num_steps, nodes))
    assert found is not None
    assert found["p10"] < found["p50"] < found["p90"]
    return found["p50"]


def test_start_up_is_paid_on_every_node_and_work_once() -> None:
    one, two = p50(1000, 1), p50(1000, 2)
    assert two - one == pytest.approx(STARTUP_S / 3600)
    per_token = plan_of(1000, 1).flops_per_token
    assert per_token is not None
    assert (p50(2000, 1) - one) * 3600 == pytest.approx(1000 * 8 * 128 * per_token / FLOPS_PER_RANK)


def test_an_unknown_model_has_no_estimate() -> None:
    assert cpu_node_hours(replace(plan_of(10, 1), flops_per_token=None)) is None
