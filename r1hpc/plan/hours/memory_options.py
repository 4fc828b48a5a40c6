"""List for `estimate` which (ZeRO stage, micro batch, recomputation, offload) fit the card, cheapest first.

memory/fit.py suggests to `submit` what to change in a given run. States, activations, DeepSpeed's buffers and
the optimizer's step come from plan/memory/step.py, RL's reference and sampler from plan/memory/run.py, plus a
CUDA context and fragmentation. Offload keeps the optimizer's fp32 weights and moments, and the gradients, in
host memory. LoRA is left out, and so are tensor and pipeline parallelism, with which r1hpc does not train.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from r1hpc.config.schema.run import Precision
from r1hpc.plan.hours.mfu import mfu_belief, num_gpus_of
from r1hpc.plan.hours.workload import Workload
from r1hpc.plan.memory.run import usable_gib
from r1hpc.plan.memory.step import MemoryPlan, Zero, largest_tensor, memory_per_gpu
from r1hpc.plan.model.shape import ModelShape, model_shape

MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_VOCABULARY = 32000
_HEAD_DIM = 128

Beside = Callable[[int, int], MemoryPlan]
"""(ZeRO stage, GPUs) -> an RL run's memory, of which reference and sampler count here."""


@dataclass(frozen=True)
class Option:
    """One configuration: its settings, its speed, and its memory on one GPU."""

    zero_stage: int
    micro_batch_size: int
    recompute: str
    offload: bool
    expected_mfu: float
    memory: MemoryPlan
    """`host_gib` is the offloaded part."""

    @property
    def total_gib(self) -> float:
        """Return the peak."""
        return self.memory.total_gib

    def to_json(self) -> dict[str, Any]:
        value = asdict(self)
        del value["memory"]
        return {**value, "states_gib": self.memory.states_gib, **self.memory.to_json()}

    def __str__(self) -> str:
        offload = ", optimizer offloaded" if self.offload else ""
        return (
            f"ZeRO {self.zero_stage}, micro batch {self.micro_batch_size}, recomputation {self.recompute}"
            f"{offload}: {self.total_gib:.1f} GiB"
        )


@dataclass(frozen=True)
class MemoryOptions:
    """Every configuration that fits, cheapest first; `smallest` is the leanest of all, fitting or not."""

    usable_gib: float
    num_gpus: int
    fits: tuple[Option, ...]
    smallest: Option
    least_gpus: int | None
    """If nothing fits, the fewest GPUs with a fit without offload; None: no number has one."""

    @property
    def best(self) -> Option | None:
        return self.fits[0] if self.fits else None

    def to_json(self) -> dict[str, Any]:
        return {
            "usable_gib": self.usable_gib,
            "num_gpus": self.num_gpus,
            "fits": bool(self.fits),
            "best": self.best.to_json() if self.best else None,
            "options": [option.to_json() for option in self.fits],
            "smallest": self.smallest.to_json(),
            "least_gpus": self.least_gpus,
        }


def memory_options(
    work: Workload, shape: ModelShape | None = None, beside: Beside | None = None
) -> MemoryOptions:
    """Return all options for `work`; without a shape, for a Llama of its size.

    Micro batches beyond the global batch are left out.
    """
    shape, num_gpus = shape or guessed_shape(work), num_gpus_of(work)
    stages = (0, 1, 2, 3) if num_gpus > 1 else (0, 3)
    tokens = math.inf if work.tokens_per_step is None else work.tokens_per_step
    micros = [micro for micro in MICRO_BATCHES if micro <= max(1.0, tokens / work.seq_len / num_gpus)]
    whole = replace(work, num_gpus=num_gpus, tensor_parallel=None, pipeline_parallel=None)

    def option(stage: int, micro: int, recompute: str, offload: bool, gpus: int = num_gpus) -> Option:
        one = replace(whole, num_gpus=gpus, zero_stage=stage, micro_batch_size=micro, recompute=recompute)
        return option_of(shape, replace(one, offload=offload), beside)

    every = [
        option(stage, micro, recompute, offload)
        for stage, micro, recompute, offload in product(stages, micros, ("none", "full"), (False, True))
        if stage >= 2 or not offload
    ]
    usable = usable_gib(work.gpu.memory_gib)
    fitting = [each for each in every if each.total_gib <= usable]
    fitting.sort(key=lambda each: (-round(each.expected_mfu, 4), each.zero_stage, each.total_gib))
    # Only the fastest micro batch for each stage, recomputation and offload.
    best: dict[tuple[int, str, bool], Option] = {}
    for each in fitting:
        best.setdefault((each.zero_stage, each.recompute, each.offload), each)
    smallest = min(every, key=lambda each: each.total_gib)
    least = None
    if not fitting:
        numbers = (1 << exponent for exponent in range(15))
        least = next((n for n in numbers if option(3, 1, "full", False, n).total_gib <= usable), None)
    return MemoryOptions(usable, num_gpus, tuple(best.values()), smallest, least)


def guessed_shape(work: Workload) -> ModelShape:
    """Return a Llama of the workload's size, to plan memory from numbers alone."""
    layers = max(1, round(work.layers))
    hidden = max(_HEAD_DIM, round(work.hidden_size / _HEAD_DIM) * _HEAD_DIM)
    llama = model_shape(
        {
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": max(1, round(8 / 3 * hidden)),
            "num_hidden_layers": layers,
            "num_attention_heads": hidden // _HEAD_DIM,
            "vocab_size": _VOCABULARY,
            "max_position_embeddings": work.seq_len,
        }
    )
    return replace(llama, num_parameters=round(work.params), num_active_parameters=round(work.active_params))


def option_of(
    shape: ModelShape, work: Workload, beside: Beside | None = None, logits_chunk_tokens: int | None = None
) -> Option:
    """Return the memory per GPU of `work` in its own ZeRO configuration, and its expected speed."""
    stage, micro = work.zero_stage or 0, int(work.micro_batch_size or 1)
    known = {"fp16": Precision.fp16, "fp32": Precision.fp32, "tf32": Precision.fp32}
    precision = known.get(work.precision, Precision.bf16)
    world = num_gpus_of(work)
    held = memory_per_gpu(
        shape,
        Zero(shape.num_parameters, stage, world, precision, largest=largest_tensor(shape)),
        micro_batch_size=micro,
        seq_len=work.seq_len,
        activation_checkpointing=work.recompute == "full",
        logits_chunk_tokens=logits_chunk_tokens,
        is_offloaded=work.offload,
    )
    if beside:
        rl = beside(stage, world)
        held = replace(
            held, reference_gib=rl.reference_gib, sampler_gib=rl.sampler_gib, sampler_stays=rl.sampler_stays
        )
    return Option(stage, micro, work.recompute or "none", work.offload, mfu_belief(work, 0.0).median, held)
