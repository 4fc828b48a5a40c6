"""Whether the budget allows what is about to be submitted.

with budget_held(run_root):
    notes = check_budget([planned], run_root)       # raises where it does not fit
"""

import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from r1hpc.accounting.budget import RunRequest, find_budget, load_budget
from r1hpc.accounting.forecast import Spread
from r1hpc.base.errors import R1hpcError, UsageError
from r1hpc.plan.cards import gpu_type_of
from r1hpc.submission.plan_run import PlannedRun
from r1hpc.telemetry.attempts import read_history


class OverBudgetError(R1hpcError):
    """The budget does not hold it; the message says what would help."""


_PATIENCE_S = 300.0
"""Longer than sbatch is waited for."""


@contextmanager
def budget_held(run_root: Path) -> Iterator[None]:
    """From the check to the job on record nobody else submits within this budget; without one nobody waits.

    A file system without locks is no reason not to submit.

    Raises:
        OverBudgetError: another submission has held it for minutes.
    """
    path = find_budget(run_root)
    if load_budget(path) is None:
        yield
        return
    # NFS gives an exclusive lock to those alone who could write (flock(2)).
    mode = "r+" if os.access(path, os.W_OK) else "r"
    with path.open(mode, encoding="utf-8") as file:
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise OverBudgetError(
                        f"another submission holds the budget {path} for {_PATIENCE_S:.0f} s now: try again"
                    ) from None
                time.sleep(0.2)
                continue
            except OSError:
                pass
            break
        yield


def check_budget(
    planned: Sequence[PlannedRun], run_root: Path, over_budget: str | None = None
) -> tuple[str, ...]:
    """Sentences on what the budget says to these runs together.

    Args:
        over_budget: the reason given for going over it.

    Raises:
        OverBudgetError: they do not fit, and nobody said that they shall go over it.
    """
    if over_budget is not None and not over_budget.strip():
        raise UsageError("--over-budget wants the reason, for whoever answers for the budget: it is empty")
    on_gpus = [each for each in planned if each.plan.topology.num_gpus]
    if not on_gpus:
        return ()
    from r1hpc.accounting.budget_status import check_submission  # here: a run on CPUs has no budget

    config = on_gpus[0].config
    verdict = check_submission(
        run_root,
        [_request(each) for each in on_gpus],
        account=config.resources.account or config.cluster.account,
        qos=config.resources.qos or config.cluster.qos,
        over_budget=over_budget is not None,
        ask_slurm=on_gpus[0].executor == "slurm",
    )
    if not verdict.allowed:
        raise OverBudgetError(verdict.sentence)
    said = [verdict.sentence] if verdict.sentence else []
    return tuple(f"budget: {sentence}" for sentence in (*said, *verdict.warnings))


def _request(planned: PlannedRun) -> RunRequest:
    hours = (planned.estimate or {}).get("gpu_hours")
    share = 1.0 - _share_done(planned)
    return RunRequest(
        rest=None if hours is None else Spread.of_json(hours) * share,
        whole=None if hours is None else hours["p50"],
        ceiling=planned.plan.gpu_hours_ceiling,
        gpu=gpu_type_of(planned.config),
    )


def _share_done(planned: PlannedRun) -> float:
    """How much of its steps a run to be resumed has in a checkpoint."""
    if planned.is_new:
        return 0.0
    last = read_history(planned.run).last
    done = (last.last_committed_step or 0) if last is not None else 0
    return min(1.0, done / max(1, planned.plan.num_steps))
