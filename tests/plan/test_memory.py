"""States as printed in the ZeRO paper; activations and logits as torch really keeps them."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from r1hpc.config.schema import Precision
from r1hpc.plan.memory import MemoryPlan, checkpoint_bytes, memory_per_gpu, state_bytes
from r1hpc.plan.shape import ModelShape, model_shape

_LLAMA = model_shape({"model_type": "llama"})


def _plan(shape: ModelShape = _LLAMA, **change: Any) -> MemoryPlan:
    asked: dict[str, Any] = {
        "zero_stage": 1,
        "world_size": 8,
        "precision": Precision.bf16,
        "micro_batch_size": 2,
        "seq_len": 2048,
        "activation_checkpointing": False,
    }
    return memory_per_gpu(shape, **(asked | change))


@pytest.mark.parametrize(("zero_stage", "gigabytes"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_zero_paper_figure_1(zero_stage: int, gigabytes: float) -> None:
    """7.5 B parameters on 64 GPUs, K = 12 (arXiv 1910.02054, figure 1; their GB is 10^9)."""
    total = sum(state_bytes(7_500_000_000, zero_stage, 64, Precision.fp16)) / 1e9
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
