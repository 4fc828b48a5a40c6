"""Write steps and GPU readings as TensorBoard event files. Needs the extra `tensorboard`, no torch.

    with TensorBoardWriter(folder) as writer:
        writer.steps(read_steps(run).effective.values())
        writer.gpus(all_series(read_gpus(run)))

    tensorboard --logdir FOLDER

Only this module uses the tensorboard package. Scalars of steps are at global_step: train/loss, train/lr, ...,
rl/reward, ...; those of a GPU at seconds since the first reading. If a live run repeats a step after a loss,
the step hides TensorBoard's old ones from there on.
"""

import math
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

from r1hpc.base.errors import R1hpcError
from r1hpc.telemetry.gpu.history import GpuSeries
from r1hpc.telemetry.records.metrics import Step, is_number

SUFFIX = ".r1hpc"
_NOT_SCALARS = frozenset({"global_step", "attempt", "time", "extra"})


class TensorBoardWriter:
    """Writes one event file into `folder`, replacing those that an earlier call left there.

    The newest of them stays, hidden by the new one: a TensorBoard that is reading it would fail.
    """

    def __init__(self, folder: Path) -> None:
        """Start a new event file.

        Raises:
            R1hpcError: the tensorboard package is not installed.
        """
        try:
            # Deferred: half a second, and an extra.
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError:
            raise R1hpcError(
                "the tensorboard package is not installed; run: pip install 'r1hpc[tensorboard]'"
            ) from None
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        before = sorted(folder.glob(f"events.out.tfevents.*{SUFFIX}"))
        is_kept = bool(before) and _began(before[-1]) < int(time.time())
        for old in before[:-1] if is_kept else before:
            old.unlink()
        self._writer = EventFileWriter(os.fspath(folder), filename_suffix=SUFFIX)
        self._last_step = 0
        # TensorBoard's plugin_event_accumulator.py starts at the first of these, and hides older data at each
        # later one: so every file has one.
        self._hide_from(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def steps(self, steps: Iterable[Step]) -> int:
        """Write the scalars of each step; return the number of steps."""
        count = 0
        for step in steps:
            if step.global_step <= self._last_step:
                self._hide_from(step.global_step)
            self._last_step = step.global_step
            self._add(step.global_step, step.time, scalars(step))
            count += 1
        return count

    def gpus(self, series: Sequence[GpuSeries]) -> None:
        """Write utilisation, power and memory of each GPU, by the seconds since the first reading."""
        start = min((each.first_time for each in series), default=0.0)
        for each in series:
            for point in (point for segment in each.segments for point in segment):
                values = {
                    f"gpu_utilization_percent/{each.name}": point.utilization_percent,
                    f"gpu_power_w/{each.name}": point.power_w,
                    f"gpu_memory_gib/{each.name}": point.memory_gib,
                }
                self._add(round(point.time - start), point.time, values)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _add(self, step: int, at: float | None, values: dict[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        parts = [Summary.Value(tag=tag, simple_value=v) for tag, v in values.items() if not math.isnan(v)]
        if parts:
            self._writer.add_event(Event(wall_time=at or 0.0, step=step, summary=Summary(value=parts)))

    def _hide_from(self, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        self._writer.add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))


def _began(file: Path) -> int:
    """Return the Unix seconds in its name, by which TensorBoard orders the files."""
    return int(file.name.split(".")[3])


def scalars(step: Step) -> dict[str, float]:
    """Return every number of a step under its tag; a stage's fields beyond those of Step are `rl/`."""
    known = {f"train/{key}": value for key, value in step._asdict().items() if key not in _NOT_SCALARS}
    extra = {f"rl/{key}": value for key, value in (step.extra or {}).items()}
    return {tag: float(value) for tag, value in {**known, **extra}.items() if is_number(value)}
