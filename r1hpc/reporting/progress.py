"""How far a run is, from the newest lines of its metrics: what `status` says and `watch` shows.

now = read_progress(ledger)
now.global_step, now.num_steps, now.tokens_per_second, now.eta_s
"""

from collections.abc import Sequence
from dataclasses import dataclass

from r1hpc.accounting.ledger import RunLedger
from r1hpc.attempt.state import State
from r1hpc.base.errors import R1hpcError
from r1hpc.config import load
from r1hpc.telemetry.attempts import Attempt
from r1hpc.telemetry.metrics import Step, last_steps

_RECENT_STEPS = 20
"""The speed is averaged over these."""


@dataclass(frozen=True)
class Progress:
    """Where the weights of a run are, and how fast they get on."""

    recent: tuple[Step, ...]
    """The newest steps on record, oldest first."""
    global_step: int | None
    num_steps: int | None
    tokens_per_second: float | None
    """Over the recent steps of the newest attempt."""
    eta_s: float | None
    """Seconds to the last step; None where the run is not running, or too young to say."""


def read_progress(ledger: RunLedger, num_recent: int = _RECENT_STEPS) -> Progress:
    """The progress of a run.

    Args:
        num_recent: steps to read; the speed is that of the last 20 at most.
    """
    recent = last_steps(ledger.run, num_recent)
    speed = recent[-_RECENT_STEPS:]
    step, num_steps = _global_step(ledger.situation.history.last, recent), _num_steps(ledger)
    running = ledger.situation.state is State.running
    return Progress(
        recent=tuple(recent),
        global_step=step,
        num_steps=num_steps,
        tokens_per_second=_tokens_per_second(speed),
        eta_s=_eta_s(speed, step, num_steps) if running else None,
    )


def _global_step(last: Attempt | None, recent: Sequence[Step]) -> int | None:
    """Where the weights are: after its resume an attempt stands before the steps its predecessor took."""
    if last is not None and (not recent or recent[-1].attempt < last.attempt):
        return last.resumed_from
    return recent[-1].global_step if recent else None


def _num_steps(ledger: RunLedger) -> int | None:
    if ledger.stage == "serve":  # it has no last one
        return None
    if ledger.num_steps is not None:
        return ledger.num_steps
    try:
        return load.read(ledger.run.config).train.num_steps
    except R1hpcError:  # a run of another version is still worth showing
        return None


def _tokens_per_second(recent: Sequence[Step]) -> float | None:
    timed = [
        (step.tokens_per_second, step.step_time_s)
        for step in recent
        if step.attempt == recent[-1].attempt and step.tokens_per_second and step.step_time_s
    ]
    seconds = sum(s for _, s in timed if s is not None)
    return sum(rate * s for rate, s in timed if rate and s) / seconds if seconds else None


def _eta_s(recent: Sequence[Step], step: int | None, num_steps: int | None) -> float | None:
    """By wall time over the recent steps, so that saves and waits count; None before the second step."""
    times = [s.time for s in recent if s.attempt == recent[-1].attempt and s.time is not None]
    if num_steps is None or step is None or len(times) < 2:
        return None
    return max(0, num_steps - step) * max(0.0, times[-1] - times[0]) / (len(times) - 1)
