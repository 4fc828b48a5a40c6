"""Identify the run a checkpoint belongs to: same data, order of samples, batch, model and precision.

Any other checkpoint is refused. Other versions of libraries are only reported.
"""

import hashlib
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from r1hpc.base.package import __version__
from r1hpc.config.schema.run import Precision, RunConfig, TrainConfig
from r1hpc.config.schema.sections import zero_converts
from r1hpc.plan.model.weights import weight_files
from r1hpc.train.parallel.distributed import Group, by_rank_0
from r1hpc.train.parallel.errors import ResumeError

# Facts that must be the same at resume: they decide which numbers the run computes.
_IDENTITY = ("dataset_id", "plan_hash", "global_batch_size", "model", "precision")

_LATER = ("base_weights",)
"""Facts that older checkpoints lack; they are compared only if present."""


@dataclass(frozen=True)
class Identity:
    """The facts of a run that must match at resume. Only `world_size` and `zero_stage` may change."""

    dataset_id: str
    plan_hash: str
    global_batch_size: int
    model: str
    precision: str
    zero_stage: int
    world_size: int
    facts: dict[str, Any] = field(default_factory=dict)

    def check(self, saved: dict[str, Any]) -> None:
        """Raise ResumeError if a checkpoint's meta belongs to another run."""
        ours = {name: getattr(self, name) for name in _IDENTITY} | self.facts
        for name, value in ours.items():
            if saved.get(name) != value and (name in saved or name not in _LATER):
                raise ResumeError(
                    f"the checkpoint was made with {name}={saved.get(name)}, this run has {name}={value}: "
                    "go back to the old setting, or start a run of another name"
                )
        if not zero_converts(saved.get("zero_stage"), self.zero_stage):
            raise ResumeError(
                f"the checkpoint is of ZeRO {saved.get('zero_stage')}, this run has deepspeed.zero_stage="
                f"{self.zero_stage}: DeepSpeed converts only between 1 and 2; go back to the old stage"
            )

    def to_meta(self) -> dict[str, Any]:
        own = {k: v for k, v in self.__dict__.items() if k != "facts"}
        return {**own, **self.facts}

    def same_layout(self, saved: dict[str, Any]) -> bool:
        """True if DeepSpeed's files fit without conversion."""
        if saved.get("zero_stage") == self.zero_stage == 0:
            return True  # every rank holds everything
        return (saved.get("world_size"), saved.get("zero_stage")) == (self.world_size, self.zero_stage)


def precision_of(train: TrainConfig, base: str = "none") -> str:
    """Return the precision for the identity. Another FP8 recipe, or adapters on another base
    (model.base_quantization), compute other numbers."""
    if base != "none":
        return f"{train.precision.value} on {base}"
    return f"fp8 {train.fp8_recipe}" if train.precision is Precision.fp8 else train.precision.value


def compression_of(train: TrainConfig) -> str | None:
    """Return the gradient compression for the identity; None without, as in older checkpoints."""
    if train.gradient_compression == "powersgd":
        return f"powersgd rank {train.compression_rank}"
    return None if train.gradient_compression == "none" else train.gradient_compression


@cache
def versions() -> dict[str, str]:
    """Return the versions a checkpoint is written with, for its manifest. Cached, since it reads files."""
    return {"torch": torch.__version__, "deepspeed": version("deepspeed"), "r1hpc": __version__}


def describe_versions(saved: dict[str, Any]) -> str:
    """Return which of `versions` differ from those in a checkpoint's meta; empty if none does. Never a reason
    to refuse. A version that was not stored is not compared."""
    pairs = [(name, saved.get(name), ours) for name, ours in versions().items()]
    changed = [f"{name} {theirs} (now {ours})" for name, theirs, ours in pairs if theirs not in (None, ours)]
    if not changed:
        return ""
    return f"was written with {', '.join(changed)}: results may differ in the last bits from here on"


def base_facts(config: RunConfig, group: Group) -> dict[str, str]:
    """Return the checkpoint's facts about the frozen weights under adapters, so that others are noticed.

    Those in four bits are in no checkpoint, and of the others only the adapters are restored on other ranks.
    """
    if config.model.lora_rank == 0:
        return {}
    return {"base_weights": weights_id(config, group)}


def weights_id(config: RunConfig, group: Group) -> str:
    """Return an id of the starting weights: their content, read by rank 0, or the seed if from scratch."""
    model = config.model
    if model.path is None or model.from_scratch:
        return f"from scratch, seed {config.train.seed}"
    folder = Path(model.path)
    return by_rank_0(group, lambda: _digest_of(folder))


def _digest_of(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(weight_files(folder)):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]
