"""What is proposed where a run does not fit: it fits with that, and no run refuses it."""

from dataclasses import replace
from typing import Any

import pytest

from r1hpc.config import load
from r1hpc.config.schema.rl import RlConfig
from r1hpc.config.schema.run import ModelConfig, RunConfig, TrainConfig
from r1hpc.config.schema.sections import DeepspeedConfig
from r1hpc.plan.memory.fit import way_out
from r1hpc.plan.memory.run import memory_of_run, misfits
from r1hpc.plan.memory.step import MemoryPlan
from r1hpc.plan.model.shape import model_shape
from r1hpc.plan.run import RunPlan, make_plan
from r1hpc.plan.topology.batch import Topology
from tests.plan.test_run_memory import NODES_OF_A100, QWEN_7B, QWEN_32B, grpo

WITH_WEIGHTS = ModelConfig(path="weights", activation_checkpointing=True)
QWEN_30B_A3B = {"model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48, "head_dim": 128}
QWEN_30B_A3B |= {"num_attention_heads": 32, "num_key_value_heads": 4, "num_experts": 128}
QWEN_30B_A3B |= {"num_experts_per_tok": 8, "moe_intermediate_size": 768, "vocab_size": 151936}
QWEN_30B_A3B |= {"max_position_embeddings": 40960, "tie_word_embeddings": False}


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


def test_4_bits_only_where_the_model_can_lie_in_them() -> None:
    """Not the experts of a mixture, nor rows that are no whole blocks of 64."""

    def ways(model: dict[str, Any]) -> str:
        adapters = replace(WITH_WEIGHTS, lora_rank=16)
        sft = replace(grpo(model=adapters), stage="sft", train=TrainConfig(global_batch_size=512))
        return " ".join(proposed(sft, model, 40 if model is QWEN_30B_A3B else 48, topology=Topology(1, 2, 2)))

    assert "nf4" not in ways(QWEN_30B_A3B)
    assert "nf4" in ways(QWEN_32B)
    assert "nf4" not in ways({**QWEN_32B, "intermediate_size": 27_648 + 32})


def test_what_is_put_into_the_hosts_memory_fits_what_the_job_asks_for() -> None:
    divided = grpo(rl=RlConfig(kl_coef=0.1, reference="divided"))
    on_host = replace(divided, rl=replace(divided.rl, reference="host"))
    where, shape = Topology(1, 2, 2), model_shape(QWEN_7B)
    held, moved = (memory_of_run(config, shape, where, 1536) for config in (divided, on_host))
    assert moved.host_gib > held.host_gib + 10
    card = (held.total_gib + 1) / 0.95 - 1  # a little less than it takes

    def ways(host_gib: float | None) -> list[str]:
        return proposed(divided, QWEN_7B, card, topology=where, host_gib=host_gib)

    assert "rl.reference=host" in ways(None)
    assert "rl.reference=host" in ways(moved.host_gib)
    too_little = ways(moved.host_gib - 1)
    assert too_little
    assert "host" not in " ".join(too_little)
    # Where a node has too little as it is, which is said apart, a proposal does not take more.
    assert ways(held.host_gib / 2) == too_little


def test_the_hosts_memory_that_the_job_asks_for_is_known_to_the_plan() -> None:
    model = {**QWEN_7B, "num_hidden_layers": 25}
    words = [f"model.config={model}".replace("'", ""), "cluster.gpu_type=v100-32gb", "rl.kl_coef=0.01"]
    words += ["train.precision=fp16", "deepspeed.zero_stage=3", "rl.reference=divided"]

    def ways(*more: str) -> str:
        memory = make_plan(load.load("rl_smoke", [*words, *more]), gpus_per_node=8).memory
        assert memory is not None
        return memory.way_out

    for key in ("resources.mem", "cluster.mem"):
        assert "rl.reference=host" not in ways(f"{key}=130G")
        assert "rl.reference=host" in ways(f"{key}=512G")
    assert ways() == ways("resources.mem=0") == ways("resources.mem=512G"), "0 is all that a node has"
    assert ways() == ways("resources.mem=much"), "which sbatch refuses"


def test_a_given_accumulation_follows_the_batch() -> None:
    """As a user would set it; each proposal gives the global batch of 512."""
    words = [f"model.config={QWEN_7B}".replace("'", ""), "cluster.gpu_type=a100-40gb", "data.seq_len=4096"]
    words += ["train.global_batch_size=512", "train.precision=bf16", "deepspeed.zero_stage=2"]

    def plan_of(*more: str) -> RunPlan:
        return make_plan(load.load("train", [*words, *more]), gpus_per_node=8)

    def ways(*more: str) -> list[str]:
        plan = plan_of(*more)
        assert plan.memory is not None
        found = plan.memory.way_out.removeprefix("it would fit with ").split(", or with ")
        for way in found:
            changed = plan_of(*more, *way.split(" and "))
            assert changed.memory is not None
            assert list(misfits(changed.memory, gpu_gib=40, host_gib=None)) == [], way
            assert changed.batch.global_batch_size == 512
        return found

    given = "train.gradient_accumulation_steps"
    assert ways("resources.nodes=2", "train.micro_batch_size=16", f"{given}=2") == [
        f"train.micro_batch_size=8 and {given}=4",
        "deepspeed.zero_stage=3",  # leaves the batch as it is
    ]
    wider = ways("resources.nodes=1", "train.micro_batch_size=8", f"{given}=8")
    assert f"resources.nodes=2 and {given}=4" in wider


def test_a_stage_that_only_samples_has_no_accumulation_to_follow() -> None:
    asked = replace(grpo(), stage="evaluate", train=TrainConfig(gradient_accumulation_steps=4))
    asked = replace(asked, evaluate=replace(asked.evaluate, num_samples=64))
    ways = proposed(replace(asked, rollout=replace(asked.rollout, prompts_per_batch=8)), QWEN_7B, 40)
    assert all("accumulation" not in way for way in ways)


def test_nothing_that_does() -> None:
    vast = {**QWEN_32B, "num_hidden_layers": 800}
    sentence = way_out(grpo(model=WITH_WEIGHTS), model_shape(vast), NODES_OF_A100, 1536, 80)
    assert sentence == "no other setting that was tried makes it fit: take cards with more memory"
    weights = replace(grpo(), stage="evaluate")
    assert "take cards" in way_out(weights, model_shape(QWEN_32B), Topology(1, 1, 1), 1536, 40)
