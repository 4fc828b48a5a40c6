"""Feed one tracker from a run's records in a separate process: `launch track … --tracker NAME`.

    feed(run, config, attempt=2, name="wandb")
    curve = Curve(run, attempt=2)
    curve.newer()        # [] until attempt 2 has taken a step; then all lasting steps; later, the new ones

The feeder has two pipes to its keeper: a byte on stdout is a sign of life, and the end of stdin means that
the attempt is over. It then sends the remaining steps and closes the tracker.

A tracker gets every step once, in ascending order. An attempt that resumes from a checkpoint repeats the
steps after it. Which earlier steps lasted is known after its first step, so nothing is sent before.
"""

import os
import select
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from r1hpc.base.choose_run import full_name
from r1hpc.base.run_dir import RunDir
from r1hpc.config.schema.run import RunConfig
from r1hpc.telemetry.records.metrics import Step, fold_steps, follow_steps

_PERIOD_S = 2.0
_CHUNK_STEPS = 100
"""Steps sent to a tracker between two signs of life."""
_PROMETHEUS_PERIOD_S = 15.0
"""Prometheus scrapes every 15 s to a minute."""


class Curve:
    """The lasting steps up to an attempt, then the attempt's own."""

    def __init__(self, run: RunDir, attempt: int) -> None:
        self._run = run
        self._read = follow_steps(run)
        self._attempt = attempt
        self._waiting: list[Step] | None = []
        """Steps of earlier attempts; None once they were returned."""
        self._last = 0

    def newer(self) -> list[Step]:
        """Return the steps that were not returned yet."""
        # A newer attempt has its own trackers.
        steps = [step for step in self._whole_file() if step.attempt <= self._attempt]
        if self._waiting is None:
            return self._ascending([step for step in steps if step.attempt == self._attempt])
        self._waiting += steps
        if not any(step.attempt == self._attempt for step in steps):
            return []
        return self._what_lasted()

    def rest(self) -> list[Step]:
        """Return the rest when the attempt ended: all, if it finished the run without a step."""
        left = self.newer()
        if self._waiting is not None and self._run.finished.exists():
            left = self._what_lasted()
        return left

    def _what_lasted(self) -> list[Step]:
        lasted, self._waiting = fold_steps(self._waiting or []).effective, None
        return self._ascending(list(lasted.values()))

    def _whole_file(self) -> Iterator[Step]:
        while steps := self._read():
            yield from steps

    def _ascending(self, steps: Sequence[Step]) -> list[Step]:
        found = []
        for step in steps:
            if step.global_step > self._last:
                found.append(step)
                self._last = step.global_step
        return found


class Tracker(Protocol):
    """A tool that shows the curve of a run."""

    def take(self, steps: Sequence[Step]) -> None:
        """Send more steps, ascending, perhaps none, and show all steps so far."""

    def close(self) -> None:
        """Close: the attempt is over, and perhaps the run."""


def feed(run: RunDir, config: RunConfig, attempt: int, name: str) -> None:
    """Feed the tracker `name` until stdin ends."""
    keeper = os.dup(1)
    os.dup2(2, 1)  # a library's output goes into the log
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # for the ranks: this process ends with the attempt
    try:
        _feed(Curve(run, attempt), _TRACKERS[name](run, config), keeper)
    except Exception as error:
        print(f"error: {name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # a library's exit handler can wait for a dead process


def _feed(curve: Curve, tracker: Tracker, keeper: int) -> None:
    is_over = False
    while True:
        for chunk in _chunks(curve.newer()):
            tracker.take(chunk)
            is_over = not _say_alive(keeper) or is_over
        if is_over:
            break
        is_over = bool(select.select([0], [], [], _PERIOD_S)[0])
    for chunk in _chunks(curve.rest()):
        tracker.take(chunk)
        _say_alive(keeper)
    tracker.close()


def _chunks(steps: Sequence[Step]) -> Iterator[Sequence[Step]]:
    """Split into chunks, of which the last may be empty."""
    for first in range(0, len(steps) + 1, _CHUNK_STEPS):
        yield steps[first : first + _CHUNK_STEPS]


def _say_alive(keeper: int) -> bool:
    try:
        os.write(keeper, b".")
    except BrokenPipeError:  # the keeper is gone, and its job with it
        return False
    return True


class _TensorBoard:
    def __init__(self, run: RunDir, config: RunConfig) -> None:
        self._folder = run.trackers / "tensorboard"
        self._writer: Any = None

    def take(self, steps: Sequence[Step]) -> None:
        if steps and self._writer is None:  # until now the previous attempt's files are the best
            from r1hpc.telemetry.trackers.tensorboard import TensorBoardWriter

            self._writer = TensorBoardWriter(self._folder)
        if self._writer is not None:
            self._writer.steps(steps)
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class _Wandb:
    def __init__(self, run: RunDir, config: RunConfig) -> None:
        self._run, self._config = run, config
        self._writer: Any = None

    def take(self, steps: Sequence[Step]) -> None:
        if steps and self._writer is None:
            from r1hpc.telemetry.trackers.wandb import WandbWriter

            asked = self._config.monitor.wandb
            about = {name: value for name, value in asdict(self._config).items() if name != "cluster"}
            self._writer = WandbWriter(
                self._run,
                self._run.trackers,
                project=asked.project,
                entity=asked.entity,
                mode=asked.mode,
                about=about,
            )
        if self._writer is not None:
            self._writer.steps(steps)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close(failed=not self._run.finished.exists())


class _Prometheus:
    """The newest values of all the run's records. In a collector's folder they go with the attempt."""

    def __init__(self, run: RunDir, config: RunConfig) -> None:
        from r1hpc.telemetry.trackers import prometheus

        self._run, self._file = run, prometheus
        folder = config.monitor.prometheus_dir
        self._is_shared = folder is not None
        self._path = prometheus.textfile_of(run, folder)
        self._next_at = 0.0

    def take(self, steps: Sequence[Step]) -> None:
        if time.monotonic() >= self._next_at:
            self._write()
            self._next_at = time.monotonic() + _PROMETHEUS_PERIOD_S

    def close(self) -> None:
        if self._is_shared:
            self._path.unlink(missing_ok=True)
        else:
            self._write()

    def _write(self) -> None:
        mode = 0o644 if self._is_shared else 0o600
        self._file.write_textfile(self._run, self._path, mode, full_name(self._run))


_TRACKERS: dict[str, Any] = {"tensorboard": _TensorBoard, "wandb": _Wandb, "prometheus": _Prometheus}
