"""A base in 4 bits: what it does not go together with is refused before it waits in a queue."""

from typing import Any

import pytest

from r1hpc.base.errors import ConfigError, UsageError
from r1hpc.config import load
from r1hpc.plan.memory.run import frozen_bytes
from r1hpc.plan.model.shape import model_shape
from r1hpc.plan.topology.checks import check_base_shape, check_layout

_NF4 = ("stage=sft", "model.path=x", "model.lora_rank=8", "model.base_quantization=nf4")
_LLAMA: dict[str, Any] = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
_LLAMA |= {"intermediate_size": 128, "num_attention_heads": 2, "max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("model.lora_rank=0",), r"model.lora_rank is 0: give the rank"),
        (("model.path=null", "model.config={model_type: llama}"), r"give model.path"),
        (("model.from_scratch=true",), r"without model.from_scratch"),
        (("stage=evaluate",), r"has no use in stage evaluate: remove it"),
        (("stage=pretrain",), r"has no use in stage pretrain"),
        (("model.base_quantization=fp4",), r"none"),
    ],
)
def test_settings_that_do_not_go_together(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load.load(None, [*_NF4, *words])


def test_zero_3_needs_activation_checkpointing() -> None:
    zero3 = (*_NF4, "deepspeed.zero_stage=3")
    with pytest.raises(UsageError, match=r"add model.activation_checkpointing=true, or take zero_stage=2"):
        check_layout(load.load(None, zero3))
    check_layout(load.load(None, [*zero3, "model.activation_checkpointing=true"]))
    check_layout(load.load(None, ["deepspeed.zero_stage=3"]))


def test_a_mixture_of_experts_stays_in_16_bits() -> None:
    config = load.load(None, _NF4)
    experts = {**_LLAMA, "model_type": "mixtral", "num_key_value_heads": 2}
    with pytest.raises(ConfigError, match=r"the experts of a mixtral are none"):
        check_base_shape(config, experts)
    check_base_shape(config, _LLAMA)
    check_base_shape(config, {"model_type": "not known here"})


def test_rows_of_whole_blocks_only() -> None:
    with pytest.raises(ConfigError, match=r"in blocks of 64, and the model has linear layers of 96 inputs"):
        check_base_shape(load.load(None, _NF4), {**_LLAMA, "intermediate_size": 96})


def test_ranks_share_frozen_weights() -> None:
    shape = model_shape(_LLAMA)
    assert frozen_bytes(load.load(None, _NF4[:3]), shape, 2) == shape.num_parameters
