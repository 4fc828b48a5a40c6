"""What is proposed where a run does not fit: it fits with that, and no run refuses it."""

from dataclasses import replace
from typing import Any

import pytest

from r1hpc.config import load
from r1hpc.config.reasoning import RlConfig
from r1hpc.config.schema import DeepspeedConfig, ModelConfig, RunConfig
from r1hpc.plan.batch import Topology
from r1hpc.plan.memory import MemoryPlan
from r1hpc.plan.run import make_plan
from r1hpc.plan.run_memory import misfits
from r1hpc.plan.shape import model_shape
from r1hpc.plan.ways_out import way_out
from tests.plan.test_run_memory import NODES_OF_A100, QWEN_7B, QWEN_32B, grpo

WITH_WEIGHTS = ModelConfig(path="weights", activation_checkpointing=True)


def proposed(config: RunConfig, model: dict[str, Any], card_gib: float = 80, **known: Any) -> list[str]:
    topology = known.pop("topology", NODES_OF_A100)
    sentence = way_out(config, model_shape(model), topology, 1536, card_gib, **known)
    start, _, rest = sentence.partition("it would fit with ")
    assert start == "", sentence
    return rest.split(", or with ")


def test_the_32b_on_32_cards_of_80_gib() -> None:
    """61 GiB of replica and a cache of 12: four times the cards, or adapters beside smaller batches."""
    assert proposed(grpo(model=WITH_WEIGHTS), QWEN_32B) == [
        "resources.nodes=16",
        "rollout.prompts_per_batch=2 and model.lora_rank=16",
        "model.lora_rank=16 and model.base_quantization=nf4",
    ]
    assert proposed(grpo(), QWEN_32B) == ["resources.nodes=16"], "random weights get no adapters"
    assert "nodes" not in " ".join(proposed(grpo(model=WITH_WEIGHTS), QWEN_32B, max_nodes=8))


@pytest.mark.parametrize(
    "overrides",
    [
        ["deepspeed.zero_stage=1"],
        ["deepspeed.zero_stage=1", "rollout.engine=vllm"],
        ["deepspeed.zero_stage=3", "rollout.engine=vllm", "rl.reference=whole"],
        ["deepspeed.zero_stage=3", "rollout.max_completion_length=8192"],
    ],
)
def test_a_run_fits_with_each_proposal(overrides: list[str]) -> None:
    """As a user would set it, through the whole plan."""
    known = [f"model.config={QWEN_7B}".replace("'", ""), "cluster.gpu_type=a100-40gb", "rl.kl_coef=0.01"]
    known += ["rollout.num_prompts=64", "rollout.num_generations=16", "train.global_batch_size=1024"]
    known += ["train.micro_batch_size=4", "train.precision=bf16", "rollout.prompts_per_batch=0"]
    known += ["rollout.max_prompt_length=512", "rollout.max_completion_length=1024", "resources.nodes=2"]
    known += overrides

    def plan_of(*more: str) -> MemoryPlan:
        memory = make_plan(load.load("rl_smoke", [*known, *more]), gpus_per_node=8).memory
        assert memory is not None
        return memory

    plan = plan_of()
    (sentence,) = misfits(plan, gpu_gib=40, host_gib=None)
    assert sentence.endswith(plan.way_out)
    ways = plan.way_out.removeprefix("it would fit with ").split(", or with ")
    assert 1 <= len(ways) <= 3
    for way in ways:
        changed = plan_of(*way.split(" and "))
        assert list(misfits(changed, gpu_gib=40, host_gib=None)) == [], way
        assert changed.way_out == ""


def test_what_a_run_would_refuse_is_not_proposed() -> None:
    """PPO trains a whole critic, int8 gradients are of ZeRO 0, a global batch must divide."""
    ppo = grpo(model=WITH_WEIGHTS, rl=RlConfig(algorithm="ppo"), deepspeed=DeepspeedConfig(zero_stage=1))
    assert all("lora" not in way for way in proposed(ppo, QWEN_7B))
    sft = replace(grpo(model=WITH_WEIGHTS), stage="sft", deepspeed=DeepspeedConfig(zero_stage=0))
    assert any("zero_stage" in way for way in proposed(sft, QWEN_7B))
    packed = replace(sft, train=replace(sft.train, gradient_compression="int8"))
    assert "take cards" in way_out(packed, model_shape(QWEN_7B), NODES_OF_A100, 1536, 80)
    narrow = replace(sft, train=replace(sft.train, global_batch_size=32, micro_batch_size=1))
    assert all("nodes" not in way for way in proposed(narrow, QWEN_32B))


def test_nothing_that_does() -> None:
    vast = {**QWEN_32B, "num_hidden_layers": 800}
    sentence = way_out(grpo(model=WITH_WEIGHTS), model_shape(vast), NODES_OF_A100, 1536, 80)
    assert sentence == "no other setting that was tried makes it fit: take cards with more memory"
    weights = replace(grpo(), stage="evaluate")
    assert "take cards" in way_out(weights, model_shape(QWEN_32B), Topology(1, 1, 1), 1536, 40)
