"""How far a run is, from its newest metrics or its finished parts: what `status` says and `watch` shows.

now = read_progress(ledger)
now.global_step, now.num_steps, now.tokens_per_second, now.eta_s
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from r1hpc.accounting.ledger import RunLedger
from r1hpc.attempt.state import State
from r1hpc.base.errors import R1hpcError
from r1hpc.config import load
from r1hpc.plan.parts import STAGES_IN_PARTS, num_parts
from r1hpc.telemetry.attempts import Attempt
from r1hpc.telemetry.metrics import Step, last_steps
from r1hpc.telemetry.parts import finish_times

_RECENT_STEPS = 20
"""The speed is averaged over these."""


@dataclass(frozen=True)
class Progress:
    """Where the weights of a run are, and how fast they get on; of a stage in parts, how many there are."""

    recent: tuple[Step, ...]
    """The newest steps on record, oldest first."""
    global_step: int | None
    num_steps: int | None
    tokens_per_second: float | None
    """Over the recent steps of the newest attempt."""
    eta_s: float | None
    """Seconds to the last step; None where the run is not running, or too young to say."""
    in_parts: bool = False
    """Its stage takes no steps: `global_step` and `num_steps` count parts."""

    @property
    def unit(self) -> str:
        """What is counted."""
        return "part" if self.in_parts else "step"


def read_progress(ledger: RunLedger, num_recent: int = _RECENT_STEPS) -> Progress:
    """The progress of a run.

    Args:
        num_recent: steps to read; the speed is that of the last 20 at most.
    """
    if ledger.stage in STAGES_IN_PARTS:
        return _of_parts(ledger)
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


def _of_parts(ledger: RunLedger) -> Progress:
    made, of = ledger.run.all_parts, _num_steps(ledger)
    left = None if of is None else max(0, of - len(made))
    return Progress((), len(made), of, None, _eta_of_parts_s(ledger, made, left), in_parts=True)


def _eta_of_parts_s(ledger: RunLedger, made: Sequence[Path], left: int | None) -> float | None:
    """By the parts of the attempt that runs, from its begin on: ranks finish their parts at about the same
    moments, between which nothing is told of how long one takes. None before its first part.
    """
    last = ledger.situation.history.last
    if not left or last is None or ledger.situation.state is not State.running:
        return None  # after the last part the ranks sum up, for as long as that takes
    times = finish_times(made, last.start)
    if not times:
        return None
    ranks = max(1, last.ranks)  # they begin together, again and again: where one is done, the others are near
    rounds = -(-len(times) // ranks)
    return left * (times[-1] - last.start) / min(rounds * ranks, left + len(times))


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
        config = load.read(ledger.run.config)
    except R1hpcError:  # a run of another version is still worth showing
        return None
    if config.stage not in STAGES_IN_PARTS:
        return config.train.num_steps
    return None if config.generate.items_per_part is None else num_parts(config)


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
