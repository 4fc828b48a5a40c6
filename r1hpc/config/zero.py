"""Settings of DeepSpeed, and which of its own keys may stand beside them."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from r1hpc.base.errors import ConfigError
from r1hpc.config.checks import ranged

_ZERO_NUMBERS = (
    "reduce_bucket_size",
    "stage3_max_live_parameters",
    "sub_group_size",
    "zero_hpz_partition_size",
)
"""Of zero_optimization: memory is planned with them."""
_OWN_OF_DEEPSPEED = {
    "zero_optimization.stage": "deepspeed.zero_stage",
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "bf16.enabled": "train.precision",
    "fp16.enabled": "train.precision",
    "sequence_parallel_size": "train.sequence_parallel",
    "checkpoint.load_universal": "the number of ranks that a checkpoint is of",
}
"""Keys of DeepSpeed's config by which placement, plan, loss and checkpoints go: each has one place."""


def zero_converts(saved: object, asked: int) -> bool:
    """Whether a checkpoint of one ZeRO stage can be resumed under another: DeepSpeed converts 1 and 2."""
    return saved == asked or {saved, asked} == {1, 2}


@dataclass(frozen=True)
class DeepspeedConfig:
    """Settings of DeepSpeed. The batch sizes, precision and schedule come from `train`."""

    zero_stage: int = ranged(1, choices=(0, 1, 2, 3))
    """0: nothing is sharded over ranks; 1: optimizer states; 2: and gradients; 3: and weights."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Merged into DeepSpeed's own config, under DeepSpeed's names; wins over what r1hpc sets. Keys with a
    setting of their own here are refused."""

    def check_new(self) -> None:
        """Refuse keys of `extra` that have a setting here; a run of before that has some goes on.

        Raises:
            ConfigError: names the setting.
        """
        for path, ours in _OWN_OF_DEEPSPEED.items():
            value: Any = self.extra
            for name in path.split("."):
                value = value.get(name) if isinstance(value, dict) else None
            if value is not None:
                raise ConfigError(f"deepspeed.extra: {path} is set by {ours}: leave it out of extra")
        for key, value in _leaves(self.extra, "deepspeed.extra"):
            if value == "auto":
                raise ConfigError(f"{key} is auto, which Hugging Face's Trainer fills in: write its value")
        options = self.extra.get("zero_optimization", {})
        if not isinstance(options, dict):
            raise ConfigError("deepspeed.extra: zero_optimization is a section: give its keys and values")
        for name in _ZERO_NUMBERS:
            if isinstance(options.get(name, 0), bool) or not isinstance(options.get(name, 0), int | float):
                raise ConfigError(f"deepspeed.extra: zero_optimization.{name} must be a number")


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in nested mappings that is none itself."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _leaves(item, f"{key}.{name}")
    else:
        yield key, value
