"""Node-hours of CPU runs follow from their plan."""

from dataclasses import replace

import pytest

from r1hpc.config.schema.cluster import ResourcesConfig
from r1hpc.config.schema.run import DataConfig, ModelConfig, RunConfig, TrainConfig
from r1hpc.plan.hours.estimate_run import (
    CPU_STARTUP_S,
    FLOPS_PER_RANK,
    MOST_FLOPS_PER_RANK,
    cpu_node_hours,
    flops_per_rank,
)
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
    assert found.p10 < found.p50 < found.p90
    return found.p50


def test_start_up_is_paid_on_every_node_and_work_once() -> None:
    one, two = p50(1000, 1), p50(1000, 2)
    assert two - one == pytest.approx(CPU_STARTUP_S / 3600)
    per_token = plan_of(1000, 1).flops_per_token
    assert per_token is not None
    assert (p50(2000, 1) - one) * 3600 == pytest.approx(1000 * 8 * 128 * per_token / FLOPS_PER_RANK)


def test_large_matrices_are_multiplied_faster() -> None:
    rates = [flops_per_rank(size) for size in (1e3, 4e5, 26e6, 1.35e8, 7e9)]
    assert rates[:2] == pytest.approx([FLOPS_PER_RANK] * 2)
    assert rates[1] < rates[2] < rates[3]
    assert rates[3:] == pytest.approx([MOST_FLOPS_PER_RANK] * 2)


MEASURED = {
    "smoke": (12.3, 60, 24 * 128, 2_562_048, 1),
    "smoke, 400 steps": (118.0, 400, 24 * 128, 2_562_048, 1),
    "smoke, 26 M parameters": (77.3, 8, 24 * 128, 162_004_992, 1),
    "sft of r1": (51.4, 500, 128 * 32, 2_116_800, 2),
    "grpo of r1": (13.6, 60, 256 * 24, 2_089_152, 2),
    "distil of r1": (34.0, 500, 128 * 32, 649_344, 2),
    "evaluate of r1": (14.0, 2, 256 * 24, 2_089_152, 2),
}
"""Wall seconds, steps, tokens a step, FLOPs a token, ranks: two shared x86 cores, 2026-11-26."""


@pytest.mark.parametrize("name", MEASURED)
def test_measured_runs_lie_well_inside(name: str) -> None:
    seconds, steps, tokens, flops, ranks = MEASURED[name]
    plan = plan_of(steps, 1)
    planned = replace(
        plan,
        topology=replace(plan.topology, ranks_per_node=ranks),
        total_tokens=steps * tokens,
        flops_per_token=float(flops),
        num_parameters=flops // 6,
    )
    found = cpu_node_hours(planned)
    assert found is not None
    assert 0.5 < seconds / 3600 / found.p50 < 1.5
    assert found.p10 < seconds / 3600 < found.p90


def test_an_unknown_model_has_no_estimate() -> None:
    assert cpu_node_hours(replace(plan_of(10, 1), flops_per_token=None)) is None
