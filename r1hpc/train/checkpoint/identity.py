"""What a checkpoint belongs to: a run of the same data, batch and model; and what it was written with.

identity.check(checkpoint.manifest.meta)     # ResumeError where it is another run's
describe_versions(checkpoint.manifest.meta)  # what differs, for the log; never a reason to refuse

The random streams of a rank, which a checkpoint holds because DeepSpeed saves none.
"""

import hashlib
import json
import random
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from r1hpc.base.version import __version__
from r1hpc.config.schema.run import Precision, RunConfig, TrainConfig
from r1hpc.config.schema.sections import zero_converts
from r1hpc.plan.model.weights import weight_files
from r1hpc.train.parallel.distributed import Group
from r1hpc.train.parallel.errors import ResumeError

# Facts that must be the same at resume: they decide which numbers the run computes.
_IDENTITY = ("dataset_id", "plan_hash", "global_batch_size", "model", "precision")

_LATER = ("base_weights",)
"""Not in every checkpoint of before; where it is not, it cannot be compared."""


@dataclass(frozen=True)
class Identity:
    """What a checkpoint belongs to. `world_size` and `zero_stage` may change, the rest may not."""

    dataset_id: str
    plan_hash: str
    global_batch_size: int
    model: str
    precision: str
    zero_stage: int
    world_size: int
    facts: dict[str, Any] = field(default_factory=dict)
    """More that may not change, under names of the stage's own."""

    def check(self, saved: dict[str, Any]) -> None:
        """Raise ResumeError when a checkpoint's meta tells of another run."""
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
        """As a checkpoint's manifest holds it."""
        own = {k: v for k, v in self.__dict__.items() if k != "facts"}
        return {**own, **self.facts}

    def same_layout(self, saved: dict[str, Any]) -> bool:
        """Whether DeepSpeed's files fit as they are, without conversion."""
        if saved.get("zero_stage") == self.zero_stage == 0:
            return True  # every rank holds everything
        return (saved.get("world_size"), saved.get("zero_stage")) == (self.world_size, self.zero_stage)


def precision_of(train: TrainConfig, base: str = "none") -> str:
    """As the identity names it: with another recipe, FP8 computes other numbers, and so do adapters on
    another base (model.base_quantization)."""
    if base != "none":
        return f"{train.precision.value} on {base}"
    return f"fp8 {train.fp8_recipe}" if train.precision is Precision.fp8 else train.precision.value


def compression_of(train: TrainConfig) -> str | None:
    """As the identity names it; None, as in checkpoints of before, where gradients are averaged whole."""
    if train.gradient_compression == "powersgd":
        return f"powersgd rank {train.compression_rank}"
    return None if train.gradient_compression == "none" else train.gradient_compression


@cache
def versions() -> dict[str, str]:
    """What a checkpoint was written with, as its manifest holds it. Looked up once: that reads files."""
    return {"torch": torch.__version__, "deepspeed": version("deepspeed"), "r1hpc": __version__}


def describe_versions(saved: dict[str, Any]) -> str:
    """What of `versions` differs from those of a checkpoint's meta; empty where nothing does.

    Never a reason to refuse. A version that was not stored is not compared.
    """
    pairs = [(name, saved.get(name), ours) for name, ours in versions().items()]
    changed = [f"{name} {theirs} (now {ours})" for name, theirs, ours in pairs if theirs not in (None, ours)]
    if not changed:
        return ""
    return f"was written with {', '.join(changed)}: results may differ in the last bits from here on"


def seed_streams(seed: int, step: int, rank: int) -> None:
    """Fresh random streams, different for every (seed, step, rank)."""
    mixed = np.random.SeedSequence([seed, step, rank]).generate_state(2, np.uint32)
    torch.manual_seed(int(mixed[0]) << 16 ^ int(mixed[1]))
    np.random.seed(int(mixed[1]))
    random.seed(int(mixed[0]))


def streams() -> dict[str, Any]:
    """Every random stream of this rank, as torch.save takes it.

    CUDA's only where this process uses a GPU: a CPU run must not take memory of one that is there.
    """
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if _uses_gpu() else None,
        "numpy": json.dumps([str(name), [int(k) for k in keys], int(position), int(has_gauss), float(gauss)]),
        "python": json.dumps([version, list(internal), gauss_next]),
    }


def restore_streams(path: Path) -> None:
    """Take back what `streams` gave, from the file it was saved to."""
    saved = torch.load(path, weights_only=True)
    torch.set_rng_state(saved["torch"])
    if saved["cuda"] is not None and _uses_gpu():
        torch.cuda.set_rng_state(saved["cuda"])
    name, keys, position, has_gauss, gauss = json.loads(saved["numpy"])
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = json.loads(saved["python"])
    random.setstate((version, tuple(internal), gauss_next))


def _uses_gpu() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def base_facts(config: RunConfig, group: Group) -> dict[str, str]:
    """What a checkpoint says of the frozen weights under adapters: others would be taken for them unseen.

    Those in four bits are in no checkpoint, and of the others only the adapters are restored on other ranks.
    """
    if config.model.lora_rank == 0:
        return {}
    return {"base_weights": weights_id(config, group)}


def weights_id(config: RunConfig, group: Group) -> str:
    """Names the starting weights by their content, which rank 0 reads; a model from scratch by its seed."""
    model = config.model
    if model.path is None or model.from_scratch:
        return f"from scratch, seed {config.train.seed}"
    return str(group.broadcast(_digest_of(Path(model.path)) if group.rank == 0 else ""))


def _digest_of(model: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(weight_files(model)):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]
