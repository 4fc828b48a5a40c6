"""Make DeepSpeed's config from ours, and build the engine."""

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import deepspeed
import torch

from r1hpc.config.schema.run import Precision, RunConfig, TrainConfig
from r1hpc.train.parallel.errors import TrainError

Parameters = list[dict[str, Any]]
"""torch's parameter groups: {"params": [...], "lr_scale": x}, x times the scheduled rate."""


def learning_rate(train: TrainConfig, step: int) -> float:
    """Return the rate of step `step` (from 1): linear warm-up, then cosine to lr x min_lr_fraction."""
    if step <= train.warmup_steps:
        return train.lr * step / train.warmup_steps
    span = max(1, train.num_steps - train.warmup_steps)
    progress = min(1.0, (step - train.warmup_steps) / span)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return train.lr * (train.min_lr_fraction + (1 - train.min_lr_fraction) * cosine)


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


def set_learning_rate(engine: Any, rate: float) -> None:
    """Set the rate of the next optimizer step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


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


class Accumulated(NamedTuple):
    """One optimizer step on this rank."""

    loss: float
    grad_norm: float
    """Over all ranks, before clipping."""
    forward_s: float
    """Seconds in this rank's own forward passes, which wait for no other rank (except for weights under ZeRO
    3, and for ranks that share its sequences)."""


def accumulate(engine: Any, losses: Iterable[torch.Tensor]) -> Accumulated:
    """Run backward for each loss that the generator makes and, at the boundary, the optimizer step."""
    total, norm = torch.zeros((), device=engine.device), None
    watch = _Stopwatch(on_gpu=engine.device.type == "cuda")
    for loss in watch.timed(losses):
        with _in_one_order():
            engine.backward(loss)
        if not hasattr(engine.optimizer, "_global_grad_norm") and engine.is_gradient_accumulation_boundary():
            # fp32 under ZeRO 0: DeepSpeed clips torch's own optimizer and keeps no norm. Here the gradients
            # in the module are averaged over the ranks.
            gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(gradients))
        engine.step()
        total += loss.detach()
    # float() waits for the GPU, so the stopwatch's events are over when they are read.
    return Accumulated(float(total), grad_norm(engine) if norm is None else norm, watch.seconds())


@contextmanager
def _in_one_order() -> Iterator[None]:
    """Make a backward pass under train.deterministic fail if an operation has no deterministic kernel.

    Fused attention has one, but torch takes it only if anything else is an error, not a warning
    (aten/src/ATen/native/transformers/cuda/attention_backward.cu).
    """
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise TrainError(f"{str(error).splitlines()[0]} Take train.deterministic=false") from error
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)


class _Stopwatch:
    """Measures the time to make the items of an iterable; on a GPU by events, without waiting for it."""

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._marks: list[tuple[Any, Any]] = []

    def timed(self, items: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        iterator = iter(items)
        while True:
            start = self._now()
            item = next(iterator, None)
            if item is None:
                return
            self._marks.append((start, self._now()))
            yield item

    def seconds(self) -> float:
        if self._on_gpu:
            return float(sum(start.elapsed_time(end) for start, end in self._marks)) / 1000
        return float(sum(end - start for start, end in self._marks))

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def grad_norm(engine: Any) -> float:
    """Return the global gradient norm of the last step, before clipping; nan if fp16 overflowed."""
    norm = engine.get_global_grad_norm()
    if norm is None:
        return math.nan
    return float(norm.item() if isinstance(norm, torch.Tensor) else norm)


def loss_scale(engine: Any, precision: Precision) -> float | None:
    """Return fp16's current loss scale; None for other precisions."""
    return float(engine.optimizer.loss_scale) if precision is Precision.fp16 else None


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result
