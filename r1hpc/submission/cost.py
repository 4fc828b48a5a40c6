"""What a submission will cost, and whether the budget allows it.

told = estimate_for(run_root, config, plan)       # for estimate.json; None where nobody can tell
notes = check_budget([prepared], order)           # raises where it does not fit
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from r1hpc.accounting.budget import Request
from r1hpc.accounting.budget_status import check_submission
from r1hpc.accounting.calibrate import Site, corrected, finished_runs
from r1hpc.accounting.forecast import Spread
from r1hpc.base.errors import R1hpcError
from r1hpc.config.schema import RunConfig
from r1hpc.estimator.estimate_run import estimate_of_run
from r1hpc.plan.run import RunPlan
from r1hpc.submission.text import Prepared
from r1hpc.telemetry.attempts import read_history


class OverBudgetError(R1hpcError):
    """The budget does not hold it; the message says what would help."""


def estimate_for(run_root: Path, config: RunConfig, plan: RunPlan) -> dict[str, Any] | None:
    """The hours of a run by its plan, corrected by what this site's finished runs really took.

    Returns:
        Estimate.to_json(), with `uncorrected` and `correction` beside it where there was one.

    Raises:
        UnknownGpuError: cluster.gpu_type is no card in the table.
    """
    found = estimate_of_run(config, plan)
    if found is None:
        return None
    found, correction = corrected(found, config.stage, _site(run_root.absolute()))
    return {**found.to_json(), **correction}


def check_budget(
    submissions: Sequence[Prepared], run_root: Path, over_budget: str | None = None
) -> tuple[str, ...]:
    """Sentences on what the budget says to these runs together.

    Args:
        over_budget: the reason given for going over it.

    Raises:
        OverBudgetError: they do not fit, and nobody said that they shall go over it.
    """
    on_gpus = [each for each in submissions if each.decision.plan.topology.num_gpus]
    if not on_gpus:
        return ()
    config = on_gpus[0].decision.config
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
    said = [f"budget: {verdict.sentence}"] if verdict.sentence else []
    return (*said, *(f"budget: {warning}" for warning in verdict.warnings))


def _request(prepared: Prepared) -> Request:
    hours = (prepared.estimate or {}).get("gpu_hours")
    return Request(
        rest=hours_left(prepared),
        whole=None if hours is None else hours["p50"],
        ceiling=prepared.decision.plan.gpu_hours_ceiling,
        gpu=prepared.decision.config.cluster.gpu_type,
    )


def hours_left(prepared: Prepared) -> Spread | None:
    """GPU-hours of a run from where it stands, by its estimate."""
    hours = (prepared.estimate or {}).get("gpu_hours")
    if hours is None:
        return None
    share = 1.0 - _share_done(prepared)
    return Spread(hours["p10"] * share, hours["p50"] * share, hours["p90"] * share)


def _share_done(prepared: Prepared) -> float:
    if prepared.is_new:
        return 0.0
    last = read_history(prepared.run).last
    done = (last.last_committed_step or 0) if last is not None else 0
    return min(1.0, done / max(1, prepared.decision.plan.num_steps))


@functools.cache
def _site(run_root: Path) -> Site:
    """Once for all stages of a submission: every finished run is looked at."""
    return finished_runs(run_root)
