"""MFU of pretraining by model size and sequence length, and what DeepSpeed's timer costs."""

from benchmarks.gpu.place import PieceError, Place, median
from benchmarks.gpu.shapes import QWEN_05B, QWEN_15B, TINY, model_words
from benchmarks.gpu.table import Table, number, seconds, share
from r1hpc.api import Run
from r1hpc.base.units import GIB
from r1hpc.telemetry.gpu.history import read_gpus

_TOKENS_AT_ONCE = 16_384
_TIMER = 'deepspeed.extra={"timers": {"throughput": {"enabled": true}}}'


def run(place: Place) -> list[Table]:
    sizes = {"tiny": TINY} if place.is_small else {"0.5B": QWEN_05B, "1.5B": QWEN_15B}
    lengths = (64,) if place.is_small else (2048, 8192)
    rows = [_row(place, size, length, ()) for size in sizes for length in lengths]
    rows.append(_row(place, next(iter(sizes)), lengths[0], (_TIMER,)))
    header = ("model", "seq_len", "timer", "a step", "tokens/s", "MFU", "memory at most")
    notes = (
        f"bf16, ZeRO 1, {_TOKENS_AT_ONCE:,} tokens in a forward pass, four of them in a step, activations "
        "computed again; random weights. MFU by the dense bf16 peak, without recomputation. The last row has "
        "DeepSpeed's throughput timer on, which waits for the GPU twice in each pass.",
    )
    return [Table("Pretraining", header, tuple(rows), notes)]


def _row(place: Place, size: str, length: int, more: tuple[str, ...]) -> tuple[str, ...]:
    named = (size, str(length), "on" if more else "off")
    try:
        made = _run(place, size, length, more)
    except PieceError as error:  # out of memory is a figure too
        return *named, "-", "-", "-", str(error).splitlines()[0][:120]
    speed = number(median(made, "tokens_per_second"))
    return *named, seconds(median(made, "step_time_s")), speed, share(median(made, "mfu")), memory_of(made)


def _run(place: Place, size: str, length: int, more: tuple[str, ...]) -> Run:
    shape = {"tiny": TINY, "0.5B": QWEN_05B, "1.5B": QWEN_15B}[size]
    rows = 2 if place.is_small else _TOKENS_AT_ONCE // length
    words = model_words(shape, 512 if place.is_small else 151_936)
    words += [
        f"data.seq_len={length}",
        f"train.micro_batch_size={rows}",
        f"train.global_batch_size={4 * rows}",
    ]
    words += [f"train.num_steps={4 if place.is_small else 15}", "train.warmup_steps=2", "train.lr=1e-5"]
    words += ["model.activation_checkpointing=true"] if not place.is_small else []
    return place.run(f"speed-{size}-{length}{'-timer' if more else ''}", *words, *more)


def memory_of(made: Run) -> str:
    """The most that NVML saw used on any GPU of a run."""
    gpus = [gpu for node in read_gpus(made.folder) for gpu in node.result()["gpus"].values()]
    used = [gpu["max_memory_used_bytes"] for gpu in gpus if gpu["max_memory_used_bytes"] is not None]
    return f"{max(used) / GIB:.1f} GiB" if used else "-"
