"""What a run holds beside its training states: reference, sampler, adapters, the host; does it fit?"""

from dataclasses import replace
from typing import Any

import pytest

from r1hpc.config import load
from r1hpc.config.schema.cluster import ResourcesConfig
from r1hpc.config.schema.rl import RlConfig, RolloutConfig
from r1hpc.config.schema.run import DataConfig, ModelConfig, RunConfig, TrainConfig
from r1hpc.config.schema.sections import DeepspeedConfig
from r1hpc.plan.memory.run import memory_of_run, misfits, saved_bytes
from r1hpc.plan.memory.step import reference_place
from r1hpc.plan.model.shape import model_shape
from r1hpc.plan.run import make_plan
from r1hpc.plan.topology.batch import Topology

# Qwen2.5-32B and -7B by their config.json.
QWEN_32B = {"model_type": "qwen2", "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64}
QWEN_32B |= {"num_attention_heads": 40, "num_key_value_heads": 8, "vocab_size": 152064}
QWEN_32B |= {"tie_word_embeddings": False, "max_position_embeddings": 131072}
QWEN_7B = {**QWEN_32B, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
QWEN_7B |= {"num_attention_heads": 28, "num_key_value_heads": 4}
NODES_OF_A100 = Topology(4, 8, 8)
WEIGHTS_32B = 61.0
"""GiB in bf16, as the review has it."""


def grpo(**sections: Any) -> RunConfig:
    """Like that of jobs/r1_a100.yaml, on four nodes and in small micro batches."""
    made = RunConfig(
        stage="rl",
        model=ModelConfig(activation_checkpointing=True),
        train=TrainConfig(global_batch_size=512, micro_batch_size=4),
        rl=RlConfig(kl_coef=0.001),
        rollout=RolloutConfig(
            num_prompts=32,
            num_generations=16,
            max_prompt_length=512,
            max_completion_length=1024,
            prompts_per_batch=4,
        ),
        deepspeed=DeepspeedConfig(zero_stage=3),
        resources=ResourcesConfig(nodes=4),
    )
    return replace(made, **sections)


def plan(config: RunConfig, model: dict[str, Any] = QWEN_32B) -> Any:
    return memory_of_run(config, model_shape(model), NODES_OF_A100, 1536)


def test_a_32b_grpo_on_32_cards_of_80_gib_does_not_fit() -> None:
    """The replica that samples is a whole policy, whatever ZeRO does."""
    found = plan(grpo())
    assert found.sampler_gib > WEIGHTS_32B
    assert found.reference_gib == pytest.approx(WEIGHTS_32B / 32, rel=0.02)
    (said,) = misfits(found, gpu_gib=80, host_gib=None)
    assert said.startswith("does not fit: each GPU would hold 9")
    assert "sampler 7" in said  # the weights, and the cache of its evaluations
    # With a whole reference it was never near; and fine-tuning of the same model fits.
    assert plan(grpo(rl=RlConfig(kl_coef=0.1, reference="whole"))).total_gib > found.total_gib + 58
    sft = replace(grpo(), stage="sft")
    assert list(misfits(plan(sft), gpu_gib=80, host_gib=None)) == []


def test_a_7b_grpo_on_the_same_cards_fits() -> None:
    found = plan(grpo(), QWEN_7B)
    assert list(misfits(found, gpu_gib=80, host_gib=None)) == []
    assert found.total_gib > 14.2 + 3.5 + 1.3  # a whole replica, the states, the cache


def test_vllm_must_hold_the_whole_weights_in_its_share() -> None:
    """Beside them what it works in and the cache of a sequence: tests/plan/test_vllm_memory.py."""
    asked = replace(grpo().rollout, engine="vllm")
    beside = 8192 * model_shape(QWEN_32B).saved_values * 2 / 2**30 + 0.5 + 1536 * 64 * 2 * 8 * 128 * 2 / 2**30
    assert plan(grpo(rollout=asked)).sampler_gib == pytest.approx(WEIGHTS_32B + beside, rel=0.005)
    assert plan(grpo(rollout=asked), QWEN_7B).sampler_gib == pytest.approx(0.3 * 80)


@pytest.mark.parametrize(
    ("words", "zero_stage", "place"),
    [
        ({"kl_coef": 0.0}, 3, "none"),
        ({"kl_coef": 0.1}, 3, "divided"),
        ({"kl_coef": 0.1}, 2, "whole"),
        ({"kl_coef": 0.1, "reference": "host"}, 1, "host"),
        ({"kl_coef": 0.1, "reference": "whole"}, 3, "whole"),
    ],
)
def test_where_the_reference_lies(words: dict[str, Any], zero_stage: int, place: str) -> None:
    config = grpo(rl=RlConfig(**words), deepspeed=DeepspeedConfig(zero_stage=zero_stage))
    assert reference_place(config) == place
    held = plan(config).reference_gib
    assert held == pytest.approx(WEIGHTS_32B * {"whole": 1, "divided": 1 / 32}.get(place, 0), rel=0.02)
    with_adapters = replace(config, model=replace(config.model, lora_rank=8))
    assert plan(with_adapters).reference_gib == 0


def test_adapters_have_the_states_that_the_weights_have_not() -> None:
    config = replace(grpo(), stage="sft", deepspeed=DeepspeedConfig(zero_stage=1))
    whole, adapters = plan(config), plan(replace(config, model=replace(config.model, lora_rank=16)))
    assert adapters.parameters_gib == pytest.approx(whole.parameters_gib, rel=0.02)
    assert adapters.gradients_gib < whole.gradients_gib / 50
    assert adapters.optimizer_gib < whole.optimizer_gib / 50


def test_a_base_in_4_bits_takes_9_sixteenths_of_a_byte_and_no_room_in_checkpoints() -> None:
    """Its embeddings and head are in bf16: 1.09 of the 7.6 billion parameters."""
    config = replace(grpo(), stage="sft", deepspeed=DeepspeedConfig(zero_stage=2))
    adapters = replace(config, model=replace(config.model, lora_rank=16))
    four_bits = replace(config, model=replace(adapters.model, path="x", base_quantization="nf4"))
    shape = model_shape(QWEN_7B)
    layers = shape.num_parameters - 2 * shape.vocab_size * shape.hidden_size
    saved = (plan(adapters, QWEN_7B).parameters_gib - plan(four_bits, QWEN_7B).parameters_gib) * 2**30
    assert saved == pytest.approx(layers * (2 - 0.5 - 4 / 64), rel=1e-3)
    assert saved_bytes(adapters, shape, 1) - saved_bytes(four_bits, shape, 1) == 2 * shape.num_parameters
    divided = replace(four_bits, deepspeed=DeepspeedConfig(zero_stage=3))
    held = plan(divided, QWEN_7B).parameters_gib * 2**30
    assert layers * 4 / 64 < held < layers * (4 / 64 + 2 / 32), "each rank has all scales"


def test_the_host_holds_what_is_put_there() -> None:
    plain = plan(grpo())
    host = plan(grpo(rl=RlConfig(kl_coef=0.1, reference="host")))
    assert host.host_gib - plain.host_gib == pytest.approx(WEIGHTS_32B / 4, rel=0.02)
    offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    offloaded = plan(grpo(deepspeed=DeepspeedConfig(zero_stage=3, extra=offload)))
    assert offloaded.optimizer_gib == 0
    assert offloaded.gradients_gib == offloaded.step_gib == 0
    # Moments, master weights and fp32 gradients, and the gradients as they come (tests/plan/test_states.py).
    assert offloaded.host_gib - plain.host_gib == pytest.approx(plain.optimizer_gib * 8 * 18 / 12, rel=0.01)
    without = plan(grpo(deepspeed=DeepspeedConfig(zero_stage=0, extra=offload)))
    assert without.optimizer_gib > 0, "without ZeRO DeepSpeed offloads nothing"
    away = {
        "zero_optimization": {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "none"}}
    }
    weights_away = plan(grpo(deepspeed=DeepspeedConfig(zero_stage=3, extra=away)))
    assert weights_away.parameters_gib == 0
    assert weights_away.optimizer_gib == plain.optimizer_gib
    assert weights_away.host_gib - plain.host_gib == pytest.approx(plain.parameters_gib * 8, rel=0.01)
    (said,) = misfits(offloaded, gpu_gib=None, host_gib=100)
    assert "resources.mem" in said


def test_a_save_copies_what_is_trained_and_what_it_stands_on() -> None:
    """Adapters: the frozen weights and the adapters' states. PPO: a critic's body beside the policy."""
    config = grpo(deepspeed=DeepspeedConfig(zero_stage=2), rl=RlConfig())
    adapters = replace(config, model=replace(config.model, lora_rank=16))
    shape = model_shape(QWEN_7B)
    assert saved_bytes(config, shape, 8) == 14 * shape.num_parameters
    trained = saved_bytes(adapters, shape, 8) - 2 * shape.num_parameters
    assert 0 < trained < 0.01 * saved_bytes(config, shape, 8)
    assert (plan(config, QWEN_7B).host_gib - plan(adapters, QWEN_7B).host_gib) * 4 == pytest.approx(
        (saved_bytes(config, shape, 8) - saved_bytes(adapters, shape, 8)) / 2**30
    )
    ppo = replace(config, rl=RlConfig(algorithm="ppo"))
    critic = shape.num_parameters - shape.vocab_size * shape.hidden_size  # its head is the value's alone
    assert saved_bytes(ppo, shape, 8) == 14 * (shape.num_parameters + critic + shape.hidden_size + 1)
    assert plan(ppo, QWEN_7B).activations_gib == 2 * plan(config, QWEN_7B).activations_gib


def test_a_teacher_takes_the_place_of_a_reference() -> None:
    student, teacher = QWEN_7B, model_shape(QWEN_32B).num_parameters
    for reference, held in (("whole", WEIGHTS_32B), ("auto", WEIGHTS_32B / 32), ("host", 0.0)):
        config = grpo(rl=RlConfig(algorithm="distill", teacher="x", reference=reference))
        found = memory_of_run(config, model_shape(student), NODES_OF_A100, 1536, teacher_parameters=teacher)
        assert found.reference_gib == pytest.approx(held, rel=0.02)
        told = 4 * 1024 * model_shape(student).vocab_size * 2 / 2**30
        assert found.logits_gib > told  # its logits of a micro batch, in bf16


def test_vllm_takes_its_share_of_the_card_that_there_is() -> None:
    held = []
    for card in ("a100-40gb", "a100-80gb"):
        config = load.load("rl_smoke", ["rollout.engine=vllm", f"cluster.gpu_type={card}"])
        memory = make_plan(config, gpus_per_node=2, vocab_size=32).memory
        assert memory is not None
        held.append(memory.total_gib)
    assert held[1] - held[0] == pytest.approx(0.3 * 40)


def test_what_samples_is_counted_by_the_rows_that_one_rank_decodes() -> None:
    """A part of the stages generate and evaluate is one rank's. Stage rl evaluates with no more rows at once
    than it rolls out, unless the user says how many prompts."""
    asked = replace(grpo(), stage="generate")

    def cache(num_items: int, num_samples: int, per_batch: int = 0) -> float:
        generate = replace(asked.generate, items_per_part=num_items, num_samples=num_samples)
        rollout = replace(asked.rollout, prompts_per_batch=per_batch)
        found: float = plan(replace(asked, generate=generate, rollout=rollout), QWEN_7B).sampler_gib
        return found

    assert cache(64, 4) == pytest.approx(256 * cache(1, 1))
    assert cache(64, 4, per_batch=8) == pytest.approx(32 * cache(1, 1))

    def of_rl(num_samples: int, per_batch: int = 0) -> float:
        evaluate = replace(grpo().evaluate, num_items=4096, num_samples=num_samples)
        rollout = replace(grpo().rollout, prompts_per_batch=per_batch)
        found: float = plan(grpo(evaluate=evaluate, rollout=rollout), QWEN_7B).sampler_gib
        return found

    assert of_rl(1) == of_rl(8)
    assert of_rl(64, 2) - of_rl(1, 2) > 100 * cache(1, 1)


def test_documents_side_by_side_in_a_row_keep_a_mask_in_each_layer() -> None:
    """A 7B with rows of 16,384 tokens: 16,384 x 16,384 in bf16 are half a GiB, in each of 28 layers."""
    data = DataConfig(packing=True, seq_len=16384)
    config = replace(
        grpo(), stage="sft", data=data, train=TrainConfig(global_batch_size=32, micro_batch_size=1)
    )

    def activations(config: RunConfig) -> float:
        return memory_of_run(config, model_shape(QWEN_7B), NODES_OF_A100, 16384).activations_gib

    apart = replace(data, packing=False)
    checkpointed = activations(config) - activations(replace(config, data=apart))
    assert checkpointed == pytest.approx(0.5 + 16384 * 2 * 24 * 128 * 2 / 2**30)
    config = replace(config, model=ModelConfig())
    assert activations(config) - activations(replace(config, data=apart)) == pytest.approx(28 * checkpointed)
    flash = replace(config, model=ModelConfig(attn_implementation="flash_attention_2"))
    assert activations(flash) == activations(replace(flash, data=apart))
