"""Counts equal those of the transformers models themselves, built without memory on the meta device."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from r1hpc.base.errors import ConfigError
from r1hpc.config.schema.run import ModelConfig, RunConfig
from r1hpc.plan.model.families import FAMILIES, UnknownModelError
from r1hpc.plan.model.shape import (
    cache_values,
    flops_per_token,
    hardware_flops_per_token,
    load_model_config,
    model_shape,
)

_SMALL = {
    "hidden_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "vocab_size": 300,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_FREE_HEAD_DIM = ("mistral", "qwen3", "gemma", "gemma2", "mixtral", "qwen3_moe")
_GQA = [family for family in FAMILIES if family not in ("gpt2", "gpt_neox")]
_MOE = ("mixtral", "qwen2_moe", "qwen3_moe")
_BIASED = ("llama", "qwen3", "gemma", "gemma2", "gpt_neox", "qwen3_moe", "olmo2")

_CASES: list[dict[str, Any]] = [
    *({"model_type": family} for family in FAMILIES),
    *({"model_type": family, **_SMALL, "intermediate_size": 200} for family in FAMILIES if family != "gpt2"),
    *(
        {"model_type": family, **_SMALL, "tie_word_embeddings": tied}
        for family in FAMILIES
        for tied in (True, False)
    ),
    *({"model_type": family, **_SMALL, "num_key_value_heads": 2} for family in _GQA),
    *({"model_type": family, **_SMALL, "head_dim": 24} for family in _FREE_HEAD_DIM),
    *(
        {"model_type": family, **_SMALL, "attention_bias": bias}
        for family in _BIASED
        for bias in (False, True)
    ),
    {"model_type": "llama", **_SMALL, "mlp_bias": True, "attention_bias": True, "num_key_value_heads": 3},
    {"model_type": "llama", **_SMALL, "head_dim": 10},
    {"model_type": "llama", **_SMALL, "head_dim": None, "num_key_value_heads": None},
    {"model_type": "gpt2", "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 100},
    {"model_type": "gpt2", **_SMALL},
    {"model_type": "mixtral", **_SMALL, "num_local_experts": 3, "num_experts_per_tok": 1},
    {"model_type": "qwen2_moe", **_SMALL, "num_experts": 6, "num_experts_per_tok": 2, "qkv_bias": False},
    {"model_type": "qwen2_moe", **_SMALL, "num_experts": 6, "shared_expert_intermediate_size": 40},
    *(
        {"model_type": family, **_SMALL, "num_experts": 4, "decoder_sparse_step": 2, "mlp_only_layers": [1]}
        for family in ("qwen2_moe", "qwen3_moe")
    ),
]


def _transformers_model(config: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))


@pytest.mark.parametrize("config", _CASES, ids=lambda config: f"{config['model_type']}-{len(config)}")
def test_the_count_is_exact(config: dict[str, Any]) -> None:
    model = _transformers_model(config)
    shape = model_shape(config)
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())
    assert shape.vocab_size * shape.hidden_size == model.get_input_embeddings().weight.numel()
    assert shape.num_attention_heads % shape.num_key_value_heads == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_multiplied_weights_are_the_matrices_one_token_meets(family: str) -> None:
    config = {"model_type": family, **_SMALL, "tie_word_embeddings": False}
    shape = model_shape(config)
    expected = 0
    for name, weight in _transformers_model(config).named_parameters():
        if name.endswith(("embed_tokens.weight", "wte.weight", "wpe.weight", "embed_in.weight")):
            continue
        if weight.dim() == 3:  # all experts of a layer
            chosen = {"mixtral": 2, "qwen2_moe": 4, "qwen3_moe": 8}[family]
            expected += weight.numel() // weight.shape[0] * chosen
        elif weight.dim() == 2:
            expected += weight.numel()
    assert shape.num_matmul_parameters == expected


def test_active_parameters_of_a_known_mixture() -> None:
    # Mixtral of Experts, arXiv 2401.04088: 47 B parameters, 13 B active.
    shape = model_shape({"model_type": "mixtral"})
    assert round(shape.num_parameters / 1e9) == 47
    assert round(shape.num_active_parameters / 1e9) == 13


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(_MOE)))
def test_all_parameters_of_a_dense_model_are_active(family: str) -> None:
    shape = model_shape({"model_type": family})
    assert shape.num_active_parameters == shape.num_parameters


def test_an_unknown_family_names_the_known() -> None:
    with pytest.raises(UnknownModelError, match=r"'qwen9'.*did you mean 'qwen[23]'.*gpt2, gpt_neox, llama"):
        model_shape({"model_type": "qwen9"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers is 'many'"),
        ({"num_hidden_layers": 99999999999}, "from 1 to 10,000"),
        ({"hidden_size": 10**400}, "from 1 to 1,000,000,000"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"hidden_size": 100}, "hidden_size 100 is not a multiple"),
        ({"num_key_value_heads": 4}, "num_attention_heads 6 is not a multiple"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"intermediate_size": -1}, "intermediate_size is -1"),
        ({"max_position_embeddings": "x"}, "max_position_embeddings is 'x'"),
        ({"hidden_size": [1]}, r"hidden_size is \[1\]"),
        ({"model_type": "qwen2_moe", "mlp_only_layers": 5}, "mlp_only_layers is 5"),
        ({"model_type": "qwen2_moe", "decoder_sparse_step": "x"}, "decoder_sparse_step is 'x'"),
    ],
)
def test_shapes_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model_shape({"model_type": "llama", **_SMALL, **change})


def test_flops_follow_palm_appendix_b() -> None:
    shape = model_shape({"model_type": "llama"})
    full = flops_per_token(shape, 2048)
    assert full == 6 * shape.num_matmul_parameters + 12 * 32 * 4096 * 2048
    assert flops_per_token(shape, 4096) > full
    assert full == pytest.approx(6 * shape.num_parameters, rel=0.08)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gpt_neox", "gemma2", "phi3"])
def test_forward_flops_equal_those_torch_counts(family: str) -> None:
    """A third of the training FLOPs, against torch's own counter on the real model."""
    from torch.utils.flop_counter import FlopCounterMode

    config = {"model_type": family, **_SMALL}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(2, 32, dtype=torch.long), use_cache=False)
    expected = flops_per_token(model_shape(config), 32) / 3 * 64
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


def test_recomputation_adds_a_forward_pass_of_the_layers() -> None:
    shape = model_shape({"model_type": "llama"})
    model = flops_per_token(shape, 2048)
    head = 6 * shape.vocab_size * shape.hidden_size
    assert hardware_flops_per_token(shape, 2048, False) == model
    assert hardware_flops_per_token(shape, 2048, True) == pytest.approx((model - head) * 4 / 3 + head)


class TestLoadModelConfig:
    def test_the_dataset_completes_the_vocabulary(self) -> None:
        config = RunConfig(model=ModelConfig(config={"model_type": "llama"}))
        assert load_model_config(config, 77) == {"model_type": "llama", "vocab_size": 77}
        assert load_model_config(config, None) == {"model_type": "llama"}

    def test_the_folder_then_changes_over_it(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 90, "x": 1}))
        config = RunConfig(model=ModelConfig(path=str(tmp_path), config={"x": 2}))
        assert load_model_config(config, 80) == {"model_type": "llama", "vocab_size": 90, "x": 2}

    def test_a_vocabulary_smaller_than_the_dataset(self) -> None:
        config = RunConfig(model=ModelConfig(config={"model_type": "llama", "vocab_size": 50}))
        with pytest.raises(ConfigError, match=r"vocab_size is 50, but the tokenizer has 77"):
            load_model_config(config, 77)

    def test_no_model(self) -> None:
        with pytest.raises(ConfigError, match=r"give model\.path=DIR"):
            load_model_config(RunConfig(), 77)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, r"config\.json is missing"),
            ("{", "is not valid JSON"),
            ("[1]", "must hold one JSON object"),
        ],
    )
    def test_a_folder_without_a_usable_config(
        self, tmp_path: Path, content: str | None, message: str
    ) -> None:
        if content is not None:
            (tmp_path / "config.json").write_text(content)
        with pytest.raises(ConfigError, match=message):
            load_model_config(RunConfig(model=ModelConfig(path=str(tmp_path))), None)

    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="is not a folder"):
            load_model_config(RunConfig(model=ModelConfig(path=str(tmp_path / "none"))), None)


_LLAMA_405B = {
    "model_type": "llama",
    "hidden_size": 16384,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
}
_QWEN_72B = {**_LLAMA_405B, "model_type": "qwen2", "hidden_size": 8192, "num_hidden_layers": 80}
_QWEN_72B["num_attention_heads"] = 64
_DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
}


@pytest.mark.parametrize(
    ("config", "num_bytes"), [(_DEEPSEEK_V3, 70_272), (_QWEN_72B, 327_680), (_LLAMA_405B, 516_096)]
)
def test_the_cache_of_a_token_is_the_published_one(config: dict[str, Any], num_bytes: int) -> None:
    """Insights into DeepSeek-V3, arXiv 2505.09343, table 1: KV cache per token in BF16."""
    assert 2 * cache_values(config) == num_bytes


def test_layers_without_attention_cache_nothing_and_unknown_ones_are_refused() -> None:
    hybrid = {**_QWEN_72B, "model_type": "other", "num_hidden_layers": 4}
    kinds = ["linear_attention", "sliding_attention", "mamba", "full_attention"]
    assert cache_values({**hybrid, "layer_types": kinds}) * 2 == cache_values(hybrid)
    with pytest.raises(ConfigError, match="mixes layers by hybrid_override_pattern"):
        cache_values({**hybrid, "hybrid_override_pattern": "M-M*"})
    with pytest.raises(ConfigError, match="num_key_value_heads is None"):
        cache_values({**hybrid, "num_key_value_heads": None})
