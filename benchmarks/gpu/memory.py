"""Peaks of a GRPO step on a model as wide as a 7B, beside what the plan said."""

import json

from benchmarks.gpu.place import Place, median
from benchmarks.gpu.shapes import TINY, WIDE_7B, model_words
from benchmarks.gpu.speed import memory_of
from benchmarks.gpu.table import Table, seconds
from r1hpc.api import Run


def run(place: Place) -> list[Table]:
    rows = tuple(_row(place, num_rows) for num_rows in ((4,) if place.is_small else (16, 64)))
    header = ("rows sampled at once", "completion", "planned", "seen by NVML at most", "rollout", "update")
    notes = (
        "Four layers of a 7B's width, bf16, ZeRO 0, a reference for the KL, micro batches of 4. What NVML "
        "sees holds the allocator's reserve and CUDA's own (about half a GiB).",
    )
    return [Table("Memory of a GRPO step", header, rows, notes)]


def _row(place: Place, num_rows: int) -> tuple[str, ...]:
    length = 12 if place.is_small else 1024
    shape = TINY if place.is_small else WIDE_7B
    words = model_words(shape, 64 if place.is_small else 32_000)
    words += ["train.precision=bf16", "deepspeed.zero_stage=0", "rl.kl_coef=0.01", "train.num_steps=3"]
    words += [f"rollout.num_prompts={num_rows // 4}", "rollout.num_generations=4", "train.micro_batch_size=4"]
    words += [f"train.global_batch_size={num_rows}", f"rollout.max_completion_length={length}"]
    words += [f"rollout.prompts_per_batch={num_rows // 4}", "evaluate.every=0", "train.warmup_steps=1"]
    made = place.run(f"memory-{num_rows}", *words, job="rl_smoke")
    times = (seconds(median(made, "rollout_time_s")), seconds(median(made, "update_time_s")))
    return str(num_rows), f"{length} tokens", _planned(made), memory_of(made), *times


def _planned(made: Run) -> str:
    memory = json.loads(made.folder.plan.read_text())["memory"]
    return f"{memory['total_gib']:.1f} GiB" if memory else "-"
