"""Make DeepSpeed's config from ours, build its engine, and refuse a precision that the device lacks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch

from r1hpc.config.schema.run import Precision, RunConfig, TrainConfig
from r1hpc.train.parallel.errors import TrainError

Parameters = list[dict[str, Any]]
"""torch's parameter groups: {"params": [...], "lr_scale": x}, x times the scheduled rate."""


def deepspeed_config(
    config: RunConfig, *, world_size: int, on_gpu: bool, load_universal: bool
) -> dict[str, Any]:
    """Return the dictionary for deepspeed.initialize; `deepspeed.extra` is merged over it.

    DeepSpeed gets one micro batch per step, and a flag on the last one: their number depends on a rollout's
    remaining rows, or on how documents were packed.
    """
    train = config.train
    optimizer: dict[str, Any] = {
        "lr": train.lr,
        "betas": [train.beta1, train.beta2],
        "eps": train.eps,
        "weight_decay": train.weight_decay,
        # torch's AdamW: DeepSpeed's needs a compiler at first use, on CPU and on GPU.
        "torch_adam": True,
    }
    if on_gpu:
        optimizer["fused"] = True
    made: dict[str, Any] = {
        "train_batch_size": train.micro_batch_size * world_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.max_grad_norm,
        "steps_per_print": 10**12,
        "optimizer": {"type": "AdamW", "params": optimizer},
        "zero_optimization": {"stage": config.deepspeed.zero_stage},
        "bf16": {"enabled": train.precision in (Precision.bf16, Precision.fp8)},
        "fp16": {"enabled": train.precision is Precision.fp16, "initial_scale_power": 16},
        "zero_allow_untested_optimizer": True,
        # It waits for the GPU twice per micro batch, to print what r1hpc measures without waiting.
        "timers": {"throughput": {"enabled": False}},
    }
    # The tag never changes: comparing it over the ranks would cost each save two collectives.
    made["checkpoint"] = {"tag_validation": "Ignore", "load_universal": load_universal}
    return _merged(made, config.deepspeed.extra)


def inference_config(config: RunConfig, *, world_size: int, on_host: bool) -> dict[str, Any]:
    """Return the config of an untrained model: weights divided over the ranks, on GPUs or the host."""
    train = config.train
    zero: dict[str, Any] = {"stage": 3}
    if on_host:
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return {
        "train_batch_size": train.micro_batch_size * world_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 10**12,
        "zero_optimization": zero,
        "bf16": {"enabled": train.precision is Precision.bf16},
        "fp16": {"enabled": train.precision is Precision.fp16},
    }


def check_precision(train: TrainConfig) -> None:
    """Refuse a precision the device lacks, before anything is built."""
    precision, device = train.precision, deepspeed.accelerator.get_accelerator()
    supported = {
        Precision.fp32: True,
        Precision.bf16: _has_bf16(device),
        Precision.fp16: device.is_fp16_supported(),
        Precision.fp8: train.fp8_emulate or has_fp8(),
    }
    if not supported[precision]:
        raise TrainError(
            f"train.precision={precision.value} is not supported by {device.device_name()} on this node; "
            f"supported: {', '.join(p.value for p, yes in supported.items() if yes)}"
        )


def _has_bf16(device: Any) -> bool:
    """True if the device has bf16. torch counts a V100's emulation unless excluded."""
    if device.device_name() == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(device.is_bf16_supported())


def has_fp8() -> bool:
    """True if this rank's GPU multiplies FP8: Ada (8.9), Hopper (9.0) and later."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)


def build_engine(
    network: torch.nn.Module, ds_config: dict[str, Any], parameters: Parameters | None = None
) -> Any:
    """Return the DeepSpeedEngine around a model that is trained."""
    trainable = [p for p in network.parameters() if p.requires_grad]
    engine, _, _, _ = deepspeed.initialize(
        model=network, model_parameters=parameters or trainable, config=ds_config, dist_init_required=False
    )
    return engine


@contextmanager
def own_settings_kept(engine: Any) -> Iterator[None]:
    """Keep each group's settings while a universal checkpoint is loaded; DeepSpeed 0.19 loses them.

    Under ZeRO 3 all groups get the first one's settings, and Adam's step counts become one tensor that each
    of them raises. Under every stage they stay on the host, where a GPU's fused Adam does not take them.
    """
    scales = [group.get("lr_scale") for group in engine.optimizer.param_groups]
    yield
    for group, scale in zip(engine.optimizer.param_groups, scales, strict=True):
        if scale is not None:
            group["lr_scale"] = scale
    adam = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for parameter, state in adam.state.items():
        count = state.get("step")
        if isinstance(count, torch.Tensor):
            device = parameter.device if adam.defaults.get("fused") else count.device
            state["step"] = count.to(device, torch.float32, copy=True)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result
