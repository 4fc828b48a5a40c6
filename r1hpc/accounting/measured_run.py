"""What a run will have cost, from the steps it has taken.

found = measured_run(run, now=time.time())
"""

from dataclasses import replace

from r1hpc.accounting.open_ledger import open_ledger
from r1hpc.base.errors import StateError, UsageError
from r1hpc.base.files import read_json
from r1hpc.base.rundir import RunDir
from r1hpc.config.load import read
from r1hpc.config.schema import TRAINED_STAGES
from r1hpc.estimator.estimate import Estimate
from r1hpc.estimator.estimate_run import estimate_of_run
from r1hpc.estimator.measured import measured_estimate
from r1hpc.plan.batch import updates_per_rollout
from r1hpc.plan.run import RunPlan
from r1hpc.telemetry.summary import RunSummary


def measured_run(run: RunDir, now: float) -> Estimate:
    """What is spent by the run's ledger, and the rest at the speed so far.

    Raises:
        UsageError: a stage without steps, no attempt, or too few steps to say anything.
        StateError: its plan is of another version.
    """
    plan, config = _plan(run), read(run.config)
    if config.stage not in TRAINED_STAGES:
        raise UsageError(
            f"{run.run_id} is of stage {config.stage}, which takes no steps to measure: "
            f"python -m r1hpc.report {run.path} has its hours so far"
        )
    ledger = open_ledger(run, now)
    last = ledger.summary.history.last
    if last is None:
        raise UsageError(f"{run.run_id} has begun no attempt: take --method flops")
    on_gpus = last.gpus > 0
    held = ledger.split() if on_gpus else ledger.node_split()
    found = measured_estimate(
        _seconds(ledger.summary, on_gpus),
        num_steps=plan.num_steps,
        num_gpus=last.gpus,
        num_nodes=last.nodes,
        hours_spent=held.in_hours()["allocated"],
        useful=held.useful / held.allocated if held.allocated else 1.0,
        updates_per_rollout=updates_per_rollout(config) if config.stage == "rl" else 1,
    )
    planned = estimate_of_run(config, plan)
    if planned is None:
        return found
    card = {"gpu": planned.assumptions["gpu"]}
    return replace(
        found,
        baselines=planned.baselines,
        memory=planned.memory,
        assumptions={**card, **found.assumptions},
    )


def _plan(run: RunDir) -> RunPlan:
    try:
        return RunPlan.from_json(read_json(run.plan))
    except StateError as error:
        raise StateError(f"{run.plan}: {error}; or take --method flops") from None


def _seconds(summary: RunSummary, on_gpus: bool) -> dict[int, float]:
    """GPU-seconds, of a CPU run node-seconds, of each step that lasted: attempts may differ in width."""
    useful = summary.useful_steps()
    return {
        step.global_step: step.step_time_s * (each.attempt.gpus if on_gpus else each.attempt.nodes)
        for each in summary.attempts
        for step in useful[each.attempt.attempt]
        if step.step_time_s
    }
