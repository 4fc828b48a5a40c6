"""Measure how far a run is, from its newest metrics or finished parts, for `status` and `watch`.

`Watched` collects all that `watch` shows: each call of `now` reads the newest lines of the records. The
ledger, which asks Slurm and adds up all steps, is opened again when an attempt begins or ends, and otherwise
every ten seconds.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from r1hpc.accounting.ledger import RunLedger
from r1hpc.accounting.open_ledger import settled_ledger
from r1hpc.attempt.state.state import State
from r1hpc.base.errors import R1hpcError, StateError
from r1hpc.base.run_dir import RunDir
from r1hpc.config import load
from r1hpc.config.schema.run import RunConfig
from r1hpc.config.stages import counts_of, find_workload
from r1hpc.plan.topology.parts import num_parts
from r1hpc.telemetry.records.evaluations import read_evaluations
from r1hpc.telemetry.records.lines import read_tail
from r1hpc.telemetry.records.metrics import Step, is_number, last_steps
from r1hpc.telemetry.records.ranks import finish_times

_RECENT_STEPS = 20
"""The speed is averaged over these."""
QUANTITIES = ("reward", "accuracy", "loss", "grad_norm", "lr", "tokens_per_second", "mfu")
"""Quantities of a step that are shown if a run has them."""
_LEDGER_EVERY_S = 10.0
_NUM_RECENT = 400
"""Steps in a curve, as many as the last 64 KiB of the metrics hold."""
_TAIL_BYTES = 2**17
_STALE_S = 60.0
"""An older GPU reading does not describe the present."""


@dataclass(frozen=True)
class Progress:
    """Step and speed of a run; for a stage in parts, the number of parts."""

    recent: tuple[Step, ...]
    """The newest recorded steps, oldest first."""
    global_step: int | None
    num_steps: int | None
    tokens_per_second: float | None
    """Over the recent steps of the newest attempt."""
    eta_s: float | None
    """Seconds to the last step; None if the run is not running, or too young to tell."""
    in_parts: bool = False
    """Its stage takes no steps: `global_step` and `num_steps` count parts."""

    @property
    def unit(self) -> str:
        return "part" if self.in_parts else "step"


def read_progress(ledger: RunLedger, num_recent: int = _RECENT_STEPS) -> Progress:
    """Return the progress of a run by its newest `num_recent` steps; the speed is that of 20 at most."""
    if counts_of(ledger.stage) == "parts":
        return _of_parts(ledger)
    recent, last = last_steps(ledger.run, num_recent), ledger.situation.history.last
    step, num_steps = recent[-1].global_step if recent else None, _num_steps(ledger)
    if last is not None and (not recent or recent[-1].attempt < last.attempt):
        step = last.resumed_from  # a resumed attempt stands before its predecessor's last steps
    speed = recent[-_RECENT_STEPS:]
    running = ledger.situation.state is State.running
    return Progress(
        recent=tuple(recent),
        global_step=step,
        num_steps=num_steps,
        tokens_per_second=_tokens_per_second(speed),
        eta_s=eta_s(speed, step, num_steps) if running else None,
    )


def _of_parts(ledger: RunLedger) -> Progress:
    """Estimate from the running attempt's parts since its begin: ranks finish their parts at about the same
    moments, and in between nothing shows how long a part takes. No estimate before its first part.
    """
    made, of, last = ledger.run.all_parts, _num_steps(ledger), ledger.situation.history.last
    progress = Progress((), len(made), of, None, None, in_parts=True)
    left = 0 if of is None else max(0, of - len(made))
    if not left or last is None or ledger.situation.state is not State.running:
        return progress  # after the last part the ranks sum up, for as long as that takes
    times = finish_times(made, last.start)
    if not times:
        return progress
    ranks = max(1, last.ranks)  # they begin each part together, so that when one is done the others are near
    rounds = -(-len(times) // ranks)
    return replace(progress, eta_s=left * (times[-1] - last.start) / min(rounds * ranks, left + len(times)))


def _num_steps(ledger: RunLedger) -> int | None:
    if ledger.num_steps:
        return ledger.num_steps
    try:
        config = load.read(ledger.run.config)
    except R1hpcError:  # a run of another version is still worth showing
        return None
    return planned_steps(config)


def planned_steps(config: RunConfig) -> int | None:
    """Return the steps of a run, or its parts; None if they are not known before it begins."""
    if counts_of(config.stage) != "parts":
        steps: int | None = find_workload(config.stage).steps(config)
        return steps
    return None if config.generate.items_per_part is None else num_parts(config)


def _tokens_per_second(recent: Sequence[Step]) -> float | None:
    timed = [
        (step.tokens_per_second, step.step_time_s)
        for step in recent
        if step.attempt == recent[-1].attempt and step.tokens_per_second and step.step_time_s
    ]
    seconds = sum(s for _, s in timed if s is not None)
    return sum(rate * s for rate, s in timed if rate and s) / seconds if seconds else None


def eta_s(recent: Sequence[Step], step: int | None, num_steps: int | None) -> float | None:
    """Estimate by wall time over the recent steps, with saves and waits; None before the second step."""
    times = [s.time for s in recent if s.attempt == recent[-1].attempt and s.time is not None]
    if num_steps is None or step is None or len(times) < 2:
        return None
    return max(0, num_steps - step) * max(0.0, times[-1] - times[0]) / (len(times) - 1)


@dataclass(frozen=True)
class Shown:
    """A run at one time. Times are Unix seconds."""

    ledger: RunLedger
    progress: Progress
    curves: dict[str, list[float]]
    """Quantity -> its values over the recent steps, oldest first, without those that lack it."""
    gpus: tuple[dict[str, Any], ...]
    """The newest reading of each GPU, with its static fields, `node` and `source`."""
    saved: tuple[int, float] | None
    held_out: tuple[int, float] | None
    job_ends_at: float | None
    time: float
    chain: str = ""
    """A note on its chain, for a stage of one."""
    more_follows: bool = False
    """Another stage of the chain follows."""

    @property
    def is_over(self) -> bool:
        return self.ledger.situation.state.is_over and not self.more_follows


class Watched:
    """One run, read repeatedly."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._ledger: RunLedger | None = None
        self._opened_at = 0.0
        self._mark: tuple[int, bool] | None = None

    def now(self) -> Shown:
        """Return what can be shown now; raise StateError if the run folder cannot be read."""
        mark = (_size(self._run), self._run.finished.exists())
        is_old = time.monotonic() - self._opened_at >= _LEDGER_EVERY_S
        if self._ledger is None or is_old or mark != self._mark:
            self._ledger = settled_ledger(self._run, time.time())
            self._opened_at, self._mark = time.monotonic(), mark
        try:
            return self._shown(self._ledger)
        except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError) as error:
            raise StateError(f"{self._run.path} is damaged: {type(error).__name__}: {error}") from None

    def _shown(self, ledger: RunLedger) -> Shown:
        progress = read_progress(ledger, _NUM_RECENT)
        events = read_tail(self._run.events, _TAIL_BYTES).records
        save = next((event for event in reversed(events) if event.get("event") == "save"), None)
        evaluations = read_evaluations(self._run)
        newest = max(evaluations, default=None)
        is_running, ends_at = ledger.situation.state is State.running, None
        submitted = (ledger.situation.history.submissions or ({},))[-1]
        limit_s = _number(submitted.get("time_limit_s"))
        if is_running and ledger.attempts and limit_s is not None and submitted.get("executor") == "slurm":
            ends_at = ledger.attempts[-1].start + limit_s  # Slurm counts from the start of the allocation
        return Shown(
            ledger=ledger,
            progress=progress,
            curves={key: _column(progress.recent, key) for key in QUANTITIES},
            gpus=tuple(self._gpus()) if is_running else (),
            saved=None if save is None else (int(save["global_step"]), float(save["time"])),
            held_out=None if newest is None else (newest, float(evaluations[newest]["greedy"]["value"])),
            job_ends_at=ends_at,
            time=time.time(),
        )

    def _gpus(self) -> Iterator[dict[str, Any]]:
        for path in self._run.all_gpu_metrics:
            tail = read_tail(path, _TAIL_BYTES)
            devices = [r for r in (*([tail.first] if tail.first else []), *tail.records) if "event" in r]
            ticks = [r for r in tail.records if "event" not in r and isinstance(r.get("gpus"), list)]
            if not ticks or time.time() - float(ticks[-1]["time"]) >= _STALE_S:
                continue
            static = {gpu.get("uuid"): gpu for event in devices for gpu in event.get("gpus", [])}
            place = {"node": str(ticks[-1].get("node")), "source": ticks[-1].get("source")}
            for gpu in ticks[-1]["gpus"]:
                yield {**static.get(gpu.get("uuid"), {}), **gpu, **place}


def _column(steps: Sequence[Step], key: str) -> list[float]:
    values = (_number(step.value(key)) for step in steps)
    return [value for value in values if value is not None]


def _number(value: Any) -> float | None:
    return float(value) if is_number(value) else None


def _size(run: RunDir) -> int:
    try:
        return run.attempts.stat().st_size
    except FileNotFoundError:
        return 0
