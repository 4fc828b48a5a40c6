"""The smallest pretraining run in each precision under each stage of ZeRO: does it train, and how fast."""

import math

import torch

from benchmarks.gpu.place import Place, median
from benchmarks.gpu.table import Table, number, seconds
from r1hpc.base.errors import R1hpcError


def run(place: Place) -> list[Table]:
    combinations = [(kind, stage) for kind in ("fp32", "bf16", "fp16", "fp8") for stage in (0, 1, 2, 3)]
    if place.is_small:
        combinations = [("bf16", 1)]
    rows = tuple(_row(place, kind, stage) for kind, stage in combinations)
    header = ("precision", "ZeRO", "first loss", "last loss", "a step", "")
    notes = ("Model of 0.4 M parameters, 20 steps: a step is overhead here, not arithmetic.",)
    return [Table("Precision and ZeRO", header, rows, notes)]


def _row(place: Place, kind: str, stage: int) -> tuple[str, ...]:
    steps = 4 if place.is_small else 20
    size = (f"train.precision={kind}", f"deepspeed.zero_stage={stage}", f"train.num_steps={steps}")
    words = (*size, *(_for_fp8(stage) if kind == "fp8" else ()))
    try:
        made = place.run(f"{kind}-zero{stage}", *words)
    except R1hpcError as error:  # one that is refused, or does not train, is what this table is for
        return kind, str(stage), "-", "-", "-", str(error).splitlines()[-1][:160]
    losses = [step.loss for step in made.metrics() if step.loss is not None]
    is_learning = bool(losses) and all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    said = "learns" if is_learning else "does not learn"
    return kind, str(stage), number(losses[0]), number(losses[-1]), seconds(median(made, "step_time_s")), said


def _for_fp8(stage: int) -> tuple[str, ...]:
    """Which card it is, as submit wants to be told, and what ZeRO 3 needs beside FP8."""
    card = torch.cuda.get_device_name(0).replace("NVIDIA ", "").replace(" ", "-")
    return (f"cluster.gpu_type={card}", f"model.activation_checkpointing={'true' if stage == 3 else 'false'}")
