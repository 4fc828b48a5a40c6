"""Write the steps of a run as TensorBoard event files. Needs the extra `tensorboard`, no torch.

Only this module uses the tensorboard package. Scalars are at global_step: train/loss, ..., rl/reward, ...
"""

import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

from r1hpc.base.errors import R1hpcError
from r1hpc.telemetry.records.metrics import Step, is_number

SUFFIX = ".r1hpc"
_NOT_SCALARS = frozenset({"global_step", "attempt", "time", "extra"})


class TensorBoardWriter:
    """Writes one event file into `folder`, replacing those that an earlier call left there.

    The newest of them stays, hidden by the new one: a TensorBoard that is reading it would fail.
    """

    def __init__(self, folder: Path) -> None:
        """Start a new event file; raise R1hpcError if the tensorboard package is not installed."""
        try:
            # Deferred: half a second, and an extra.
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError:
            raise R1hpcError(
                "the tensorboard package is not installed; run: pip install 'r1hpc[tensorboard]'"
            ) from None
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        before = sorted(folder.glob(f"events.out.tfevents.*{SUFFIX}"))
        # By the Unix seconds in their names TensorBoard orders the files.
        is_kept = bool(before) and int(before[-1].name.split(".")[3]) < int(time.time())
        for old in before[:-1] if is_kept else before:
            old.unlink()
        self._writer = EventFileWriter(os.fspath(folder), filename_suffix=SUFFIX)
        # It hides the data of earlier files (plugin_event_accumulator.py).
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.add_event(self._event(step=0, session_log=start))

    def steps(self, steps: Sequence[Step]) -> int:
        """Write the scalars of each step, ascending; return the number of steps."""
        for step in steps:
            known = {tag: value for tag, value in scalars(step).items() if not math.isnan(value)}
            parts = [self._summary.Value(tag=tag, simple_value=value) for tag, value in known.items()]
            if parts:
                summary = self._summary(value=parts)
                event = self._event(wall_time=step.time or 0.0, step=step.global_step, summary=summary)
                self._writer.add_event(event)
        self._writer.flush()
        return len(steps)

    def close(self, failed: bool = False) -> None:
        self._writer.close()


def scalars(step: Step) -> dict[str, float]:
    """Return every number of a step under its tag; a stage's fields beyond those of Step are `rl/`."""
    known = {f"train/{key}": value for key, value in step._asdict().items() if key not in _NOT_SCALARS}
    extra = {f"rl/{key}": value for key, value in (step.extra or {}).items()}
    return {tag: float(value) for tag, value in {**known, **extra}.items() if is_number(value)}
