"""States as printed in the ZeRO paper; activations and logits as torch really keeps them."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from r1hpc.config.schema.run import Precision
from r1hpc.plan.memory.step import (
    MemoryPlan,
    Peak,
    Zero,
    checkpoint_bytes,
    largest_tensor,
    memory_per_gpu,
)
from r1hpc.plan.model.shape import ModelShape, model_shape

_LLAMA = model_shape({"model_type": "llama"})


def _plan(
    shape: ModelShape = _LLAMA,
    zero_stage: int = 1,
    world_size: int = 8,
    precision: Precision = Precision.bf16,
    **change: Any,
) -> MemoryPlan:
    """Without DeepSpeed's buffers."""
    zero = Zero(shape.num_parameters, zero_stage, world_size, precision, largest_tensor(shape))
    asked = {"micro_batch_size": 2, "seq_len": 2048, "activation_checkpointing": False, **change}
    return replace(memory_per_gpu(shape, zero, **asked), buffers_gib=0.0, released_gib=0.0)


@pytest.mark.parametrize(("zero_stage", "gigabytes"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_zero_paper_figure_1(zero_stage: int, gigabytes: float) -> None:
    """7.5 B parameters on 64 GPUs, K = 12 (arXiv 1910.02054, figure 1; their GB is 10^9)."""
    total = sum(Zero(7_500_000_000, zero_stage, 64, Precision.fp16, 0).states) / 1e9
    assert total == pytest.approx(gigabytes, abs=0.05)


@given(
    world_size=st.integers(1, 512),
    precision=st.sampled_from(Precision),
    micro=st.integers(1, 8),
    checkpointing=st.booleans(),
)
def test_more_zero_never_takes_more(
    world_size: int, precision: Precision, micro: int, checkpointing: bool
) -> None:
    totals = [
        _plan(
            zero_stage=stage,
            world_size=world_size,
            precision=precision,
            micro_batch_size=micro,
            activation_checkpointing=checkpointing,
        ).total_gib
        for stage in (1, 2, 3)
    ]
    assert totals == sorted(totals, reverse=True)


@pytest.mark.parametrize("precision", [Precision.bf16, Precision.fp16])
def test_no_zero_takes_most(precision: Precision) -> None:
    assert (
        _plan(zero_stage=0, precision=precision).total_gib
        > _plan(zero_stage=1, precision=precision).total_gib
    )


def test_an_8b_on_two_cards_of_80_gib_is_fullest_in_the_optimizers_step() -> None:
    """ZeRO 2: 9 bytes a parameter between the passes, 12 in the step (tests/plan/test_states.py)."""
    llama = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_key_value_heads": 8}
    llama |= {"vocab_size": 128256, "tie_word_embeddings": False, "max_position_embeddings": 8192}
    shape = model_shape(llama)
    plan = _plan(shape, zero_stage=2, world_size=2, micro_batch_size=1, activation_checkpointing=True)
    assert plan.peak is Peak.step
    assert plan.total_gib == pytest.approx(12 * shape.num_parameters / 2**30)
    assert plan.staying_gib == pytest.approx(9 * shape.num_parameters / 2**30)
    wide = _plan(shape, zero_stage=2, world_size=64, micro_batch_size=1, activation_checkpointing=False)
    assert wide.peak is Peak.passes


def test_the_turns_of_a_step_are_not_there_together() -> None:
    plan = MemoryPlan(2, 1, 3, activations_gib=4, logits_gib=1, buffers_gib=2, step_gib=6, released_gib=2)
    assert (plan.staying_gib, plan.total_gib, plan.peak) == (8, 13, Peak.passes)
    assert replace(plan, step_gib=8).total_gib == 8 + 6
    assert replace(plan, step_gib=8).peak is Peak.step
    sampling = replace(plan, sampler_gib=9)
    assert (sampling.total_gib, sampling.peak) == (17, Peak.sampling)
    awake = replace(sampling, sampler_stays=True)
    assert (awake.total_gib, awake.peak) == (8 + 5 + 9, Peak.passes)
    assert MemoryPlan(2, 0, 0, 0, 0).peak is None


@pytest.mark.parametrize(
    ("known", "bytes_per_parameter"),
    [
        ({"stage": 0}, 4),
        ({"stage": 0, "precision": Precision.fp32}, 0),
        ({"stage": 1}, 6 / 4 - 2 * 3 / 4),  # the gradients of the other parts are free by then
        ({"stage": 2}, 6 / 4),
        ({"stage": 2, "precision": Precision.fp16}, 6 / 4),
        ({"stage": 2, "precision": Precision.fp32}, 4 / 4),
        ({"stage": 2, "largest": 1e8}, 6 / 4),
        ({"stage": 2, "largest": 6e8}, 8 / 4),  # of a tensor that is larger than a rank's part
        ({"stage": 2, "together": 500_000_000}, 6 / 8),
        ({"stage": 3}, 6 / 4),
        ({"stage": 3, "options": {"sub_group_size": 1e8}}, 6 / 10),
        ({"stage": 3, "options": {"sub_group_size": 1e8}, "largest": 4e8}, 6 * (0.1 + 0.1)),
        ({"stage": 0, "fused": False, "largest": 1e8}, 4 + 8 / 10),
        ({"stage": 2, "fused": False}, 12 / 4),
    ],
)
def test_what_a_step_makes_on_four_ranks(known: dict[str, Any], bytes_per_parameter: float) -> None:
    asked = {"world_size": 4, "precision": Precision.bf16, "largest": 0, **known}
    assert Zero(1_000_000_000, **asked).step / 1e9 == pytest.approx(bytes_per_parameter)


def test_the_largest_tensor_is_an_embedding_or_a_layers_experts() -> None:
    assert largest_tensor(_LLAMA) == _LLAMA.vocab_size * _LLAMA.hidden_size
    mixture = model_shape({"model_type": "mixtral"})
    tensor = 8 * 2 * 14336 * 4096
    assert tensor < largest_tensor(mixture) < 1.1 * tensor


def test_activations_grow_with_tokens_and_shrink_with_checkpointing() -> None:
    plan = _plan()
    assert _plan(micro_batch_size=4).activations_gib == 2 * plan.activations_gib
    whole = _plan(logits_chunk_tokens=0)
    assert _plan(seq_len=4096, logits_chunk_tokens=0).logits_gib == 2 * whole.logits_gib
    assert _plan(seq_len=4096).logits_gib == plan.logits_gib < whole.logits_gib
    assert _plan(logits_chunk_tokens=64).logits_gib == whole.logits_gib / 64
    assert _plan(activation_checkpointing=True).activations_gib < plan.activations_gib / 8
    assert plan.total_gib == pytest.approx(
        plan.parameters_gib + plan.gradients_gib + plan.optimizer_gib + plan.activations_gib + plan.logits_gib
    )


_WIDE = {"hidden_size": 128, "num_attention_heads": 4, "vocab_size": 64, "max_position_embeddings": 128}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}


def _saved_bytes_per_token_and_layer(config: dict[str, Any], dtype: torch.dtype) -> float:
    """What autograd keeps between forward and backward, the weights left out, by difference of two depths."""
    totals = []
    for layers in (1, 3):
        hf_config = AutoConfig.for_model(**config, num_hidden_layers=layers)
        model = AutoModelForCausalLM.from_config(hf_config, attn_implementation="sdpa").to(dtype).base_model
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor, kept: dict[int, torch.Tensor] = kept) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model(input_ids=torch.arange(128).remainder(64).view(2, 64), use_cache=False)
        assert output.last_hidden_state.requires_grad
        totals.append(sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in weights))
    return (totals[1] - totals[0]) / 2 / 128


@pytest.mark.parametrize("precision", [Precision.bf16, Precision.fp32])
@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama", "intermediate_size": 344, "num_key_value_heads": 2},
        {"model_type": "qwen2", "intermediate_size": 696, "num_key_value_heads": 1},
        {"model_type": "qwen3", "intermediate_size": 344, "num_key_value_heads": 2, "head_dim": 64},
        {"model_type": "gpt2", **_NO_DROPOUT},
        {"model_type": "gpt_neox", "intermediate_size": 512},
        {"model_type": "phi3", "intermediate_size": 344, "num_key_value_heads": 2},
        {"model_type": "mixtral", "intermediate_size": 344, "num_key_value_heads": 2},
        {"model_type": "qwen2_moe", "num_experts": 4, "moe_intermediate_size": 176, "num_key_value_heads": 2},
    ],
    ids=lambda config: str(config["model_type"]),
)
def test_activations_are_what_autograd_keeps(config: dict[str, Any], precision: Precision) -> None:
    config = {**_WIDE, **_IDS, **config}
    dtype = torch.bfloat16 if precision is Precision.bf16 else torch.float32
    measured = _saved_bytes_per_token_and_layer(config, dtype)
    plan = _plan(
        model_shape({**config, "num_hidden_layers": 1}), precision=precision, micro_batch_size=1, seq_len=64
    )
    assert plan.activations_gib * 2**30 / 64 == pytest.approx(measured, rel=0.06)


@pytest.mark.parametrize(
    ("precision", "zero_stage", "bytes_per_parameter"),
    [
        (Precision.bf16, 0, 14),
        (Precision.bf16, 1, 14),
        (Precision.bf16, 2, 14),
        (Precision.bf16, 3, 12),
        (Precision.fp16, 2, 14),
        (Precision.fp32, 0, 12),
        (Precision.fp32, 1, 16),
        (Precision.fp32, 2, 16),
        (Precision.fp32, 3, 12),
    ],
)
def test_checkpoint_bytes_as_deepspeed_wrote_them(
    precision: Precision, zero_stage: int, bytes_per_parameter: int
) -> None:
    """The numbers were measured once on files of DeepSpeed 0.19.8 (see checkpoint_bytes)."""
    assert (
        checkpoint_bytes(_LLAMA.num_parameters, precision, zero_stage)
        == bytes_per_parameter * _LLAMA.num_parameters
    )
