"""Time a save: its cost to training, its writing, and the return of a run after a stop."""

import statistics

from benchmarks.gpu.place import Place, finished, wait_step, wait_until
from benchmarks.gpu.shapes import QWEN_05B, QWEN_15B, TINY, model_words
from benchmarks.gpu.table import Table, number, seconds
from r1hpc.api import Run
from r1hpc.base.units import GIB
from r1hpc.telemetry.records.metrics import read_events


def run(place: Place) -> list[Table]:
    sizes = {"tiny": TINY} if place.is_small else {"0.5B": QWEN_05B, "1.5B": QWEN_15B}
    rows = tuple(_row(place, size, shape) for size, shape in sizes.items())
    header = ("model", "checkpoint", "training waits", "written in", "GiB/s", "back after a stop")
    notes = (
        "bf16, ZeRO 1, asynchronous saves; back: from the begin of the second attempt to the end of its "
        "first step, libraries, checkpoint and all.",
    )
    return [Table("Saves and a restart", header, rows, notes)]


def _row(place: Place, size: str, shape: dict[str, object]) -> tuple[str, ...]:
    steps, every = (6, 2) if place.is_small else (24, 6)
    words = model_words(shape, 512 if place.is_small else 151_936)
    words += [
        f"train.num_steps={steps}",
        f"checkpoint.save_every={every}",
        "data.seq_len=64",
        "train.lr=1e-5",
    ]
    made = place.start(f"saves-{size}", *words)
    wait_step(made, every + 1)
    made.cancel(save_first=True)
    wait_until(f"the end of {made.run_id}", lambda: made.state().is_over)
    if made.state().value != "finished":
        made.resume(executor="local")
    finished(made)
    saves = [event for event in read_events(made.folder) if event["event"] == "save" and event.get("write_s")]
    num_bytes = max((event["bytes"] for event in saves), default=0)
    waits, writes = (_median([event[key] for event in saves]) for key in ("seconds", "write_s"))
    speed = num_bytes / GIB / writes if writes else None
    size_text = f"{num_bytes / GIB:.2f} GiB"
    return size, size_text, seconds(waits), seconds(writes), number(speed), seconds(_back_after(made))


def _back_after(made: Run) -> float | None:
    if len(made.attempts) < 2:
        return None
    second = made.attempts[-1]
    first = next((s for s in made.metrics() if s.attempt == second.attempt and s.time is not None), None)
    return None if first is None or first.time is None else first.time - second.start


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None
