"""Feed one tracker from a run's records in a separate process: `launch track … --tracker NAME`.

A tracker's library may hang or crash without harm to the job. The feeder has two pipes to keeper.py: a byte
on stdout is a sign of life, and the end of stdin means that the attempt is over. It then sends the remaining
steps and closes the tracker.

A tracker gets every step once, in ascending order. An attempt that resumes from a checkpoint repeats the
steps after it. Which earlier steps lasted is known after its first step, so nothing is sent before.
"""

import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

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
        """Return the steps that were not returned yet; none until the attempt has taken a step."""
        steps: list[Step] = []
        while some := self._read():
            # A newer attempt has its own trackers.
            steps += [step for step in some if step.attempt <= self._attempt]
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

    def _ascending(self, steps: Sequence[Step]) -> list[Step]:
        found = []
        for step in steps:
            if step.global_step > self._last:
                found.append(step)
                self._last = step.global_step
        return found


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


def _feed(curve: Curve, tracker: Any, keeper: int) -> None:
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


class _AtFirstStep:
    """A writer that is opened at the first step: until then the previous attempt's files are the best."""

    def __init__(self, run: RunDir, open_writer: Callable[[], Any]) -> None:
        self._run, self._open = run, open_writer
        self._writer: Any = None

    def take(self, steps: Sequence[Step]) -> None:
        if steps:
            self._writer = self._writer or self._open()
            self._writer.steps(steps)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close(failed=not self._run.finished.exists())


def _tensorboard(run: RunDir, config: RunConfig) -> _AtFirstStep:
    from r1hpc.telemetry.trackers.writers import TensorBoardWriter

    samples_of = run if config.monitor.samples else None
    return _AtFirstStep(run, lambda: TensorBoardWriter(run.trackers / "tensorboard", samples_of))


def _wandb(run: RunDir, config: RunConfig) -> _AtFirstStep:
    from r1hpc.telemetry.trackers.writers import WandbWriter

    asked = config.monitor.wandb
    about = {name: value for name, value in asdict(config).items() if name != "cluster"}
    named = (asked.project, asked.entity, asked.mode, about, config.monitor.samples)
    return _AtFirstStep(run, lambda: WandbWriter(run, run.trackers, *named))


class _Prometheus:
    """The newest values of all the run's records. In a collector's folder they go with the attempt."""

    def __init__(self, run: RunDir, config: RunConfig) -> None:
        self._run, self._folder = run, config.monitor.prometheus_dir
        self._next_at = 0.0

    def take(self, steps: Sequence[Step]) -> None:
        from r1hpc.telemetry.trackers.prometheus import write_textfile

        if time.monotonic() >= self._next_at:
            write_textfile(self._run, self._folder)
            self._next_at = time.monotonic() + _PROMETHEUS_PERIOD_S

    def close(self) -> None:
        from r1hpc.telemetry.trackers.prometheus import textfile, write_textfile

        if self._folder is None:
            write_textfile(self._run)
        else:  # a run that is over is not scraped for ever
            textfile(self._run, self._folder).unlink(missing_ok=True)


_TRACKERS: dict[str, Any] = {"tensorboard": _tensorboard, "wandb": _wandb, "prometheus": _Prometheus}
