"""Precisions that a run cannot have, refused before it waits in a queue."""

from contextlib import nullcontext

import pytest

from r1hpc.base.errors import UsageError
from r1hpc.config import load
from r1hpc.plan.topology.checks import check_new_precision, check_precision

_FP8 = ("stage=sft", "train.precision=fp8", "resources.gpus_per_node=8")
_HOPPER = "cluster.gpu_type=h100"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("cluster.gpu_type=a100",), r"A100-SXM4-80GB has no FP8 .*: take train.precision=bf16, or"),
        ((), r"say which there are, for example cluster.gpu_type=h100"),
        (("resources.gpus_per_node=0",), r"computes on GPUs, and resources.gpus_per_node is 0: take"),
        ((_HOPPER, "stage=rl"), r"for the stages pretrain and sft: .* rl would compare"),
        ((_HOPPER, "stage=evaluate"), r"for the stages pretrain and sft"),
        ((_HOPPER, "model.lora_rank=8"), r"model.lora_rank=0"),
        ((_HOPPER, "deepspeed.zero_stage=3"), r"add model.activation_checkpointing=true"),
        (("train.fp8_emulate=true", "stage=rl"), r"for the stages pretrain and sft"),
    ],
)
def test_fp8_is_refused_with_what_to_take_instead(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        check_precision(load.load(None, [*_FP8, *words]))


@pytest.mark.parametrize(
    "words",
    [
        (_HOPPER,),
        ("cluster.gpu_type=l40s",),
        ("cluster.gpu_type=h100", "deepspeed.zero_stage=3", "model.activation_checkpointing=true"),
        ("train.fp8_emulate=true", "resources.gpus_per_node=0"),
        ("train.fp8_emulate=true", "cluster.gpu_type=a100"),
    ],
)
def test_fp8_where_there_is_hardware_or_it_is_emulated(words: tuple[str, ...]) -> None:
    check_precision(load.load(None, [*_FP8, *words]))


def test_fp16_trains_on_gpus_only() -> None:
    with pytest.raises(UsageError, match="fp16 trains on GPUs only"):
        check_precision(load.load(None, ["train.precision=fp16", "resources.gpus_per_node=0"]))


def test_fp16_needs_zero() -> None:
    """DeepSpeed divides the gradients by a scale that only ZeRO's optimizers multiply the loss by."""
    words = ["train.precision=fp16", "resources.gpus_per_node=4"]
    with pytest.raises(UsageError, match=r"hardly learns under deepspeed\.zero_stage=0.*zero_stage=1"):
        check_new_precision(load.load(None, [*words, "deepspeed.zero_stage=0"]))
    own_scale = "deepspeed.extra={fp16: {loss_scale: 1}}"
    for fine in ("deepspeed.zero_stage=1", "stage=evaluate", own_scale):
        check_new_precision(load.load(None, [*words, "deepspeed.zero_stage=0", fine]))


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        (("cluster.gpu_type=v100",), True),
        (("cluster.gpu_type=t4", "stage=evaluate"), True),
        (("cluster.gpu_type=v100", "resources.gpus_per_node=0"), False),
        (("cluster.gpu_type=v100", "train.precision=fp32"), False),
        (("cluster.gpu_type=a100",), False),
        (("cluster.gpu_type=some_card",), False),
        ((), False),
    ],
)
def test_bf16_where_the_card_has_none(words: tuple[str, ...], refused: bool) -> None:
    config = load.load(None, ["train.precision=bf16", "resources.gpus_per_node=4", *words])
    with pytest.raises(UsageError, match="has no bf16 arithmetic") if refused else nullcontext():
        check_new_precision(config)
