"""Whether train.precision suits the stage, the other settings and the card, before anything is queued."""

from r1hpc.base.errors import UsageError
from r1hpc.config.schema import SAMPLED_STAGES, TRAINED_STAGES, Precision, RunConfig
from r1hpc.plan.cards import gpu_type_of
from r1hpc.plan.hardware import UnknownGpuError, find_gpu

_FP8_STAGES = ("pretrain", "sft")


def check_precision(config: RunConfig) -> None:
    """Refuse a precision that the run cannot have; of resources, gpus_per_node is decided.

    Raises:
        UsageError: what does not go together, and what to take instead.
    """
    precision, on_gpus = config.train.precision, bool(config.resources.gpus_per_node)
    if config.stage in TRAINED_STAGES and not on_gpus and precision is Precision.fp16:
        raise UsageError(
            "train.precision=fp16 trains on GPUs only, and resources.gpus_per_node is 0: take "
            "train.precision=bf16 or fp32"
        )
    if precision is Precision.fp8:
        _check_settings(config)
        if not config.train.fp8_emulate:
            _check_card(config)


def check_new_precision(config: RunConfig) -> None:
    """Refuse of a new run what would go on badly: fp16 without ZeRO, and bf16 on a card that has none, where
    torch emulates it and no fused attention takes it. A run of before cannot change either.

    Raises:
        UsageError: what to take instead.
    """
    precision, has_own_scale = config.train.precision, "fp16" in config.deepspeed.extra
    without_zero = config.stage in TRAINED_STAGES and config.deepspeed.zero_stage == 0
    if precision is Precision.fp16 and without_zero and not has_own_scale:
        # Its FP16_UnfusedOptimizer divides the gradients by a scale that the loss never had (0.19.8, run).
        raise UsageError(
            "train.precision=fp16 hardly learns under deepspeed.zero_stage=0, where DeepSpeed scales no "
            "loss: take deepspeed.zero_stage=1"
        )
    if precision is not Precision.bf16 or config.stage not in (*TRAINED_STAGES, *SAMPLED_STAGES):
        return
    gpu_type = gpu_type_of(config)
    try:
        card = find_gpu(gpu_type) if gpu_type else None
    except UnknownGpuError:
        return
    if card is not None and not card.has_bf16 and config.resources.gpus_per_node:
        raise UsageError(
            f"{card.name} has no bf16 arithmetic (that begins with Ampere), and would emulate it slowly: "
            "take train.precision=fp16 with deepspeed.zero_stage=1 or higher, or fp32"
        )


def _check_settings(config: RunConfig) -> None:
    if config.stage not in _FP8_STAGES:
        raise UsageError(
            f"train.precision=fp8 is for the stages {' and '.join(_FP8_STAGES)}: a model samples in bf16, "
            f"and {config.stage} would compare one with the other; take train.precision=bf16"
        )
    if config.model.lora_rank:
        raise UsageError(
            "train.precision=fp8 trains whole weights, and model.lora_rank asks for adapters: take "
            "train.precision=bf16 with them, or model.lora_rank=0"
        )
    if config.deepspeed.zero_stage == 3 and not config.model.activation_checkpointing:
        # Seen in torchao 0.18: each Float8Linear saves the gathered weight for its backward pass.
        raise UsageError(
            "train.precision=fp8 under deepspeed.zero_stage=3 would keep every layer's whole weights on each "
            "GPU until the backward pass: add model.activation_checkpointing=true, or take zero_stage=2"
        )


def _check_card(config: RunConfig) -> None:
    instead = (
        "take train.precision=bf16, or train.fp8_emulate=true to see what FP8's rounding does to the loss "
        "(slower than bf16)"
    )
    if not config.resources.gpus_per_node:
        raise UsageError(f"train.precision=fp8 computes on GPUs, and resources.gpus_per_node is 0: {instead}")
    gpu_type = gpu_type_of(config)
    if gpu_type is None:
        raise UsageError(
            "train.precision=fp8: not every card has it (it begins with Ada and Hopper, an A100 has none); "
            "say which there are, for example cluster.gpu_type=h100"
        )
    try:
        card = find_gpu(gpu_type)
    except UnknownGpuError:
        return  # the node looks
    if not card.has_fp8:
        raise UsageError(f"{card.name} has no FP8 arithmetic (that begins with Ada and Hopper): {instead}")
