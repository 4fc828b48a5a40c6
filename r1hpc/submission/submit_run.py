"""One submission: read the job, plan it, hold it against the budget, freeze it, start it.

done = submit_run(Order(job="jobs/smoke.yaml", executor="local"))
done.planned.run.path, done.job_id
"""

import os
import shutil
import time
from dataclasses import dataclass, replace

from r1hpc.attempt.begin import check_records
from r1hpc.base.errors import UsageError
from r1hpc.base.files import write_atomic
from r1hpc.base.rundir import RunDir, open_run
from r1hpc.config import load
from r1hpc.plan.batch import ranks_per_node
from r1hpc.slurm import decide, env, script
from r1hpc.submission import start_run
from r1hpc.submission.budget_check import budget_held, check_budget
from r1hpc.submission.order import DEFAULT_JOB, Order
from r1hpc.submission.plan_run import PlannedRun, plan_new_run, plan_resumed_run
from r1hpc.submission.trial import show_to_slurm
from r1hpc.telemetry.attempts import read_history, read_run_events


@dataclass(frozen=True)
class SubmittedRun:
    """One run after its submission."""

    planned: PlannedRun
    job_id: str | None
    """None: a dry run."""


def submit_run(order: Order) -> SubmittedRun:
    """Plan a run, and start it unless this is a dry run.

    Raises:
        UsageError: it cannot be as it was asked for.
        R1hpcError: the budget does not hold it, or Slurm refuses.
    """
    if order.resume and not order.is_dry_run:
        with start_run.alone(open_run(order.resumed_run().path)):
            return _start(order)
    return _start(order)


def _start(order: Order) -> SubmittedRun:
    planned = plan_within_budget(order)
    if order.is_dry_run:
        said = show_to_slurm(planned)
        notes = (*planned.notes, said.sentence) if said else planned.notes
        return SubmittedRun(replace(planned, notes=notes), None)
    return SubmittedRun(planned, start_run.start(planned, order))


def plan_within_budget(order: Order) -> PlannedRun:
    """The plan, with what the budget says to it; an error where it does not fit."""
    planned = plan_resumed_run(order) if order.resume else plan_new_run(order)
    said = check_budget([planned], order.counted_root, order.over_budget)
    return replace(planned, notes=(*planned.notes, *said))


def prepare_inside_job(order: Order) -> tuple[int, RunDir, tuple[str, ...]]:
    """For sbatch/train.sh: make this job's run folder, or find it again; ranks per node, the run, notes.

    Raises:
        UsageError: this is no Slurm job, or the folder is another job's.
        NotTheNodeError: the run's records are damaged.
    """
    job_id = env.job_id(os.environ)
    if job_id is None or order.run_name is None:
        raise UsageError("--prepare-only belongs to sbatch/train.sh and runs inside a job")
    run = order.folder(order.run_name)
    check_records(run)
    if run.config.is_file() and any(s.get("job_id") == job_id for s in read_history(run).submissions):
        config = load.read(run.config)  # a requeued job: nothing is decided again
        return ranks_per_node(config, config.resources.gpus_per_node or 0), run, ()
    order = _as_allocated(order, run)
    if _is_half_made(run):
        shutil.rmtree(run.path)  # this job was preempted while it made it
    with budget_held(order.counted_root):
        planned = plan_within_budget(order)
        planned = replace(planned, script=replace(planned.script, by_submitit=False))
        with start_run.written(planned, order):
            write_atomic(run.path / "site.sh", script.site_file(planned.script))
        start_run.record_submission(planned, order, job_id, time.time())
    return planned.script.ranks_per_node, run, planned.notes


def _as_allocated(order: Order, run: RunDir) -> Order:
    """The order with what sbatch was really given over what the job file says."""
    source = run.config if order.resume else order.job or DEFAULT_JOB
    is_cpu_run = load.load(source, order.overrides, order.cluster).resources.gpus_per_node == 0
    actual = decide.overrides_of_allocation(os.environ, is_cpu_run)
    return replace(order, executor="slurm", overrides=(*order.overrides, *actual))


def _is_half_made(run: RunDir) -> bool:
    """Whether the folder is one of ours that was never submitted: no event, no checkpoint."""
    ours = run.logs.is_dir() and run.checkpoints.is_dir() and run.ledger.is_dir()
    return ours and not read_run_events(run)[0] and not any(run.checkpoints.iterdir())
