"""Wait until a run is over.

wait(run, timeout_s=3600)            # -> Situation
"""

import time
from dataclasses import dataclass

from r1hpc.attempt.state.state import Situation, read_situation
from r1hpc.base.errors import R1hpcError
from r1hpc.base.run_dir import RunDir

POLL_S = 0.5
# slurmctld serves everybody: ask it seldom, and only if the run folder has nothing new.
_ASK_SLURM_EVERY_S = 10.0
# How long after the run is over the record of an attempt's end may arrive.
_PATIENCE_S = 15.0


def wait(run: RunDir, timeout_s: float | None = None) -> Situation:
    """Wait until a run is over and return its situation.

    Raises:
        R1hpcError: it is not over after `timeout_s`.
    """
    ending, began = Ending(), time.monotonic()
    while True:
        situation = read_situation(run)
        if ending.is_here(situation):
            return situation
        if timeout_s is not None and time.monotonic() - began >= timeout_s:
            raise R1hpcError(f"{run.run_id} is {situation.state} after {timeout_s:g} s; it goes on")
        time.sleep(ask_every(situation.job.job_id if situation.job is not None else ""))


@dataclass
class Ending:
    """Decide whether a run is over and its end recorded. A killed run has no end: wait a while for it."""

    over_since: float | None = None

    def is_here(self, situation: Situation) -> bool:
        if not situation.state.is_over:
            self.over_since = None
            return False
        self.over_since = self.over_since or time.monotonic()
        return _is_closed(situation) or time.monotonic() - self.over_since > _PATIENCE_S


def _is_closed(situation: Situation) -> bool:
    """True if the last attempt's end is recorded, a moment after the ranks have left FINISHED."""
    last = situation.history.last
    return last is None or last.cause is not None


def ask_every(job_id: str) -> float:
    """Return the seconds between questions to Slurm if the run folder has nothing new."""
    return POLL_S if job_id.startswith("local-") else _ASK_SLURM_EVERY_S
