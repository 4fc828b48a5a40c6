"""Plan one run, chain stage or sweep point: decide and check everything, write nothing.

The checks are `_check_settings`, and `_check_job` once the cluster was asked. A workload adds its own
(attempt/workload.py). For planned runs, `check_budget` asks the budget and `show_to_slurm` asks sbatch.
"""

import functools
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from r1hpc.accounting.budget import RunRequest
from r1hpc.accounting.calibrate import corrected, finished_runs
from r1hpc.attempt.trackers import check_trackers
from r1hpc.attempt.workload import Facts, check_packages, workload_of
from r1hpc.base.errors import R1hpcError, UsageError
from r1hpc.base.lock import is_free
from r1hpc.base.run_dir import SWEEP, RunDir
from r1hpc.base.units import format_bytes
from r1hpc.checkpoint.finished import check_inputs
from r1hpc.config import load, paths, plugins
from r1hpc.config.schema.run import RunConfig
from r1hpc.config.secrets import refuse_secrets, withheld
from r1hpc.config.stages import is_rl, is_server, samples
from r1hpc.plan.hours.spread import Spread
from r1hpc.plan.hours.workload import ASSUMED_GPU
from r1hpc.plan.memory.run import asked_host_gib, misfits
from r1hpc.plan.memory.step import MemoryPlan
from r1hpc.plan.run import RunPlan
from r1hpc.plan.topology.gpus import (
    FLAGS_INSTEAD,
    UnknownGpuError,
    find_gpu,
    gpu_type_of,
    known_card,
    smaller_cards,
)
from r1hpc.slurm import defaults, fields, flags, script
from r1hpc.slurm.probe import ClusterFacts
from r1hpc.slurm.sbatch import Trial, try_out
from r1hpc.submission.order import DEFAULT_JOB, Order, Purpose
from r1hpc.telemetry.records.attempts import read_history
from r1hpc.telemetry.records.ranks import measured_save_speed

ASSUMED_GPUS_PER_NODE = 8
"""Used if nothing says how many a node has, and no cluster is asked."""


def estimate_for(
    run_root: Path, config: RunConfig, plan: RunPlan, expected_model: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """Return the hours of a run, corrected by what this site's finished runs really took.

    Args:
        expected_model: the config.json that an earlier stage of a chain will leave in model.path.

    Returns:
        Estimate.to_json(), with `uncorrected` and `correction` added if it was corrected; and notes.
    """
    try:
        found = workload_of(config.stage).estimate(
            config, plan, expected_model=expected_model, run_root=run_root
        )
    except UnknownGpuError as error:
        said = str(error).replace(FLAGS_INSTEAD, "set cluster.gpu_type to")
        return None, (f"no estimate: {said}",)
    if found is None:
        return None, ()
    correction: dict[str, Any] = {}
    if (site := _site(run_root.absolute())).runs:
        found, correction = corrected(found, config.stage, site)
    return {**found.to_json(), **correction}, ()


_site = functools.cache(finished_runs)
_save_speed = functools.cache(measured_save_speed)
"""Both read every run under a run root: once for all stages of a submission."""


@dataclass(frozen=True)
class PlannedRun:
    """Everything that is decided before the first file is written."""

    run: RunDir
    executor: str
    """slurm or local."""
    config: RunConfig
    """Complete: nothing is left open."""
    plan: RunPlan
    script: script.Script
    notes: tuple[str, ...]
    """Sentences for the person: assumptions, the warning before a kill, what could not be found out."""
    is_new: bool = True
    """The run folder does not exist yet."""
    estimate: dict[str, Any] | None = None
    """Estimated cost, as in estimate.json; None: unknown."""
    needs: tuple[str, ...] | None = None
    """The stages of a chain that must be finished before this one begins."""
    prompt: str | None = None
    """A prompt in the form the model will see; None: it sees none, or the form is not known yet."""
    shared: RunDir | None = None
    """The folder whose frozen code it uses; None: its own."""

    @property
    def hours(self) -> Spread | None:
        """Return the estimated GPU-hours, of a CPU run node-hours; None: unknown."""
        unit = "gpu_hours" if self.plan.topology.num_gpus else "node_hours"
        found = (self.estimate or {}).get(unit)
        return None if found is None else Spread.of_json(found)


@dataclass(frozen=True)
class OrderFacts(Facts):
    """Facts about a run, and the order behind it."""

    order: Order = field(default_factory=Order)


def plan_new_run(order: Order) -> PlannedRun:
    """Plan a run that does not exist yet. Raise UsageError if it exists."""
    config = load.load(order.job or DEFAULT_JOB, order.overrides, order.cluster)
    run = order.new_run()
    if (run.path / SWEEP).is_file():
        raise UsageError(f"{run.path} is a sweep: choose another --run-name")
    if os.path.lexists(run.path):
        raise UsageError(
            f"a submission that was cut off has left {run.path}, without submitting anything: remove it, "
            "or choose another --run-name"
            if is_leftover(run)
            else f"there is a run called {run.run_id} in {run.path.parent}: continue it with --resume, "
            "or choose another --run-name"
        )
    return plan_run(config, OrderFacts(run, order=order))


def is_leftover(run: RunDir) -> bool:
    """True if a submission that was cut off while it froze the run left the folder without a job."""
    try:
        is_whole = run.config.exists() or run.attempts.exists()
        return not is_whole and run.submission_lock.is_file() and is_free(run.submission_lock)
    except OSError:  # another user's
        return False


def plan_run(config: RunConfig, facts: OrderFacts, cluster: ClusterFacts | None = None) -> PlannedRun:
    """Check the settings, ask the cluster, check the job, write the script's text, and estimate.

    Args:
        facts: what is known about the run and its order, without executor and GPUs.
        cluster: what Slurm says about the job's place, if it was asked already.
    """
    order, run = facts.order, facts.run
    config = paths.with_absolute_paths(config)
    executor, notes = defaults.choose_executor(order.executor, will_submit=order.purpose is Purpose.start)
    facts = replace(facts, executor=executor)
    notes += _check_settings(config, facts)
    workload = workload_of(config.stage)
    checked = workload.check_settings(config, facts)
    decision = defaults.decide(
        checked.config,
        executor,
        vocab_size=workload.vocab_size(checked.config),
        assumed_gpus_per_node=ASSUMED_GPUS_PER_NODE if order.is_dry_run else None,
        facts=cluster,
        expected_model=facts.expected_model,
        expected_teacher=facts.expected_teacher,
        save_speed=_save_speed(order.counted_root, config.resources.nodes),
        has_nodes=order.purpose is Purpose.inside_job,
    )
    config, plan = decision.config, decision.plan
    facts = replace(facts, gpus_per_node=config.resources.gpus_per_node or 0)
    notes += [*checked.notes, *_check_job(facts, decision)]
    text = script.make_script(run, config)
    estimate, no_estimate = estimate_for(order.counted_root, config, plan, facts.expected_model)
    notes += no_estimate
    return PlannedRun(
        run, executor, config, plan, text, tuple(notes), facts.is_new, estimate, prompt=checked.prompt
    )


def _check_settings(config: RunConfig, facts: OrderFacts) -> list[str]:
    """Check the settings, before the workload does and the cluster is asked; return notes."""
    fields.check_cluster(config.cluster)
    fields.check_resources(config.resources)
    fields.check_parents(facts.run.path, config.cluster.trust_shared_run_root)
    if facts.is_new:
        config.deepspeed.check_new()
        if samples(config.stage):
            config.rollout.check_new()
        if is_rl(config.stage):
            config.rl.check_new()
    refuse_secrets(config, facts.order.overrides)
    if config.model.path or config.rl.teacher or config.data.traces:
        check_inputs(config, by_content=False)  # the batch host compares the contents
    if not facts.is_new:
        plugins.refuse_changes(paths.names_in(config), facts.run.code)
        plugins.refuse_changed_files(facts.run.code)
    return check_trackers(config, facts.executor) if config.monitor.trackers else []


def _check_job(facts: OrderFacts, decision: defaults.Decision) -> list[str]:
    """Check the job, once nodes, GPUs and time are known; return notes for the person who submits."""
    config, plan = decision.config, decision.plan
    notes: list[str] = []
    if facts.order.purpose is not Purpose.estimate:
        if facts.executor == "slurm":
            decision.refuse_missing_nodes()
        notes += _check_packages(config, facts)
    if ignored := flags.ignored_variables(os.environ):
        notes.append(f"not used from the environment: {', '.join(ignored)}")
    if hidden := withheld(os.environ) if facts.executor == "slurm" else ():
        notes.append(
            f"not passed to the job, since the value holds a password or a token: {', '.join(hidden)}. Keep "
            "the login in ~/.netrc, or set the variable in a cluster.setup line that reads a file"
        )
    notes += decision.notes
    if plan.memory is not None and plan.topology.num_gpus:
        notes += _memory_notes(config, plan.memory, facts.is_new)
    notes += workload_of(config.stage).check(config, facts)
    if facts.is_new:
        notes += little_room(config, facts.run, plan)
    return notes


def _check_packages(config: RunConfig, facts: OrderFacts) -> list[str]:
    try:
        check_packages(config, facts.executor, workload_of(config.stage).packages)
    except UsageError as error:
        if not facts.order.is_dry_run or defaults.slurm_is_here():
            raise
        return [f"submit refuses this run here: {error}"]  # a laptop need not have them
    return []


def _memory_notes(config: RunConfig, memory: MemoryPlan, is_new: bool) -> list[str]:
    """Return what exceeds the GPUs' memory or a node's requested one; for a new run also what would fit."""
    gpu_type = gpu_type_of(config)
    gpu = known_card(gpu_type or ASSUMED_GPU)  # if it is unknown, the estimate has said so
    card = gpu.memory_gib if gpu else None
    # A resumed run can seldom change what would make it fit.
    memory = memory if is_new else replace(memory, way_out="")
    notes = [*misfits(memory, gpu_gib=card, host_gib=asked_host_gib(config))]
    others = smaller_cards(gpu_type or ASSUMED_GPU.split("-")[0])
    if others and is_new and not is_server(config.stage):  # the cluster may have one of these
        planned = find_gpu(gpu_type or ASSUMED_GPU)
        names = f"{planned.name.lower()} or {others[0].lower()}"
        notes.append(
            f"memory and hours are planned for {planned.name}: say which cards there are, "
            f"cluster.gpu_type={names}"
        )
    return notes


def little_room(config: RunConfig, run: RunDir, plan: RunPlan) -> list[str]:
    """Warn if the checkpoints of a run may not fit under its root. Quotas cannot be seen from here."""
    if plan.checkpoint_bytes is None:
        return []
    there = next(folder for folder in run.path.absolute().parents if folder.exists())
    most, free = config.checkpoint.keep + 1, shutil.disk_usage(there).free
    if most * plan.checkpoint_bytes <= free:
        return []
    return [
        f"{most} checkpoints of {format_bytes(plan.checkpoint_bytes)} may exist there at once "
        f"(checkpoint.keep={config.checkpoint.keep}), and {there} has {format_bytes(free)} free: give a "
        "--run-root with more room"
    ]


def show_to_slurm(planned: PlannedRun) -> Trial | None:
    """Ask Slurm about a planned job; None if the job is not for Slurm, or there is no Slurm here.

    Raise SlurmError if sbatch would refuse the job.
    """
    if planned.executor != "slurm" or not defaults.slurm_is_here():
        return None
    return try_out(script.render(planned.script))


class OverBudgetError(R1hpcError):
    """The budget is too small for it; the message says what would help."""


def check_budget(
    planned: Sequence[PlannedRun], run_root: Path, over_budget: str | None = None
) -> tuple[str, ...]:
    """Check these runs together against the budget; return notes on it.

    Raise OverBudgetError if they do not fit and no reason was given.
    """
    if over_budget is not None and not over_budget.strip():
        raise UsageError("--over-budget is empty: give the reason for exceeding the budget")
    on_gpus = [each for each in planned if each.plan.topology.num_gpus]
    if not on_gpus:
        return ()
    from r1hpc.accounting.budget_status import check_submission  # deferred: a run on CPUs has no budget

    _, qos, account = defaults.place_in_cluster(on_gpus[0].config)
    verdict = check_submission(
        run_root,
        [_request(each) for each in on_gpus],
        account=account,
        qos=qos,
        over_budget=over_budget is not None,
        ask_slurm=on_gpus[0].executor == "slurm",
    )
    if not verdict.allowed:
        raise OverBudgetError(verdict.sentence)
    said = [verdict.sentence] if verdict.sentence else []
    return tuple(f"budget: {sentence}" for sentence in (*said, *verdict.warnings))


def _request(planned: PlannedRun) -> RunRequest:
    hours = planned.hours
    share = 1.0 if planned.is_new else 1.0 - share_done(planned.run, planned.plan.num_steps)
    return RunRequest(
        rest=None if hours is None else hours * share,
        whole=None if hours is None else hours.p50,
        ceiling=planned.plan.gpu_hours_ceiling,
        gpu=gpu_type_of(planned.config),
    )


def share_done(run: RunDir, num_steps: int) -> float:
    """Return the share of its steps that a run to be resumed has in a checkpoint."""
    last = read_history(run).last
    done = (last.last_committed_step or 0) if last is not None else 0
    return min(1.0, done / max(1, num_steps))
