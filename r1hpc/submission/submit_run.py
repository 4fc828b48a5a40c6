"""Submit one run: read the job, plan it, check it against the budget, freeze it, start it.

    done = submit_run(Order(job="jobs/smoke.yaml", executor="local"))
    done.planned.run.path, done.job_id
    trial = show_to_slurm(planned)   # trial.sentence: "as its queue stands, Slurm would start this at ..."
    with budget_held(run_root):
        notes = check_budget([planned], run_root)       # raises if it does not fit

A dry run asks Slurm too: it is refused as the submission would be.
"""

import fcntl
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from r1hpc.accounting.budget import RunRequest, find_budget, load_budget
from r1hpc.accounting.forecast import Spread
from r1hpc.attempt.begin import check_records
from r1hpc.base.errors import R1hpcError, UsageError
from r1hpc.base.files import write_atomic
from r1hpc.base.run_dir import RunDir, open_run
from r1hpc.config import load
from r1hpc.plan.topology.batch import ranks_per_node
from r1hpc.plan.topology.gpus import gpu_type_of
from r1hpc.slurm import defaults, rank_env, script
from r1hpc.slurm.defaults import slurm_is_here
from r1hpc.slurm.sbatch import Trial, try_out
from r1hpc.slurm.script import render
from r1hpc.submission import start_run
from r1hpc.submission.order import DEFAULT_JOB, Order
from r1hpc.submission.plan_run import PlannedRun, plan_new_run, plan_resumed_run
from r1hpc.telemetry.records.attempts import read_history, read_run_events

_PATIENCE_S = 300.0
"""Longer than sbatch may take."""


def show_to_slurm(planned: PlannedRun) -> Trial | None:
    """Ask Slurm about a planned job; None if the job is not for Slurm, or there is no Slurm here.

    Raises:
        SlurmError: sbatch would refuse the job.
    """
    if planned.executor != "slurm" or not slurm_is_here():
        return None
    return try_out(render(planned.script))


class OverBudgetError(R1hpcError):
    """The budget is too small for it; the message says what would help."""


@contextmanager
def budget_held(run_root: Path) -> Iterator[None]:
    """Keep other submissions within this budget out, from the check until the job is recorded.

    Without a budget, or locks in the file system, nobody waits.

    Raises:
        OverBudgetError: another submission has held it for minutes.
    """
    path = find_budget(run_root)
    if load_budget(path) is None:
        yield
        return
    # NFS gives an exclusive lock only to users who may write (flock(2)).
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
    """Check these runs together against the budget; return notes on it.

    Args:
        over_budget: the reason given for exceeding it.

    Raises:
        OverBudgetError: they do not fit, and no reason was given.
    """
    if over_budget is not None and not over_budget.strip():
        raise UsageError("--over-budget is empty: give the reason for exceeding the budget")
    on_gpus = [each for each in planned if each.plan.topology.num_gpus]
    if not on_gpus:
        return ()
    from r1hpc.accounting.budget_status import check_submission  # deferred: a run on CPUs has no budget

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
    """Return the share of its steps that a run to be resumed has in a checkpoint."""
    if planned.is_new:
        return 0.0
    last = read_history(planned.run).last
    done = (last.last_committed_step or 0) if last is not None else 0
    return min(1.0, done / max(1, planned.plan.num_steps))


@dataclass(frozen=True)
class SubmittedRun:
    """One run after its submission."""

    planned: PlannedRun
    job_id: str | None
    """None: a dry run."""


def submit_run(order: Order) -> SubmittedRun:
    """Plan a run, and start it unless this is a dry run.

    Raises:
        UsageError: it cannot run as ordered.
        R1hpcError: the budget is too small, or Slurm refuses.
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
    """Return the plan with notes on the budget; raise if it does not fit."""
    planned = plan_resumed_run(order) if order.resume else plan_new_run(order)
    said = check_budget([planned], order.counted_root, order.over_budget)
    return replace(planned, notes=(*planned.notes, *said))


def prepare_inside_job(order: Order) -> tuple[int, RunDir, tuple[str, ...]]:
    """Make this job's run folder for sbatch/train.sh, or find it again; return ranks per node, run, notes.

    Raises:
        UsageError: this is no Slurm job, or the folder is another job's.
        NotTheNodeError: the run's records are damaged.
    """
    job_id = rank_env.job_id(os.environ)
    if job_id is None or order.run_name is None:
        raise UsageError("--prepare-only belongs to sbatch/train.sh and runs inside a job")
    run = order.folder(order.run_name)
    check_records(run)
    if run.config.is_file() and any(s.get("job_id") == job_id for s in read_history(run).submissions):
        config = load.read(run.config)  # a requeued job: everything is already decided
        return ranks_per_node(config, config.resources.gpus_per_node or 0), run, ()
    order = _as_allocated(order, run)
    if _is_half_made(run):
        shutil.rmtree(run.path)  # this job was preempted while it made the folder
    with budget_held(order.counted_root):
        planned = plan_within_budget(order)
        planned = replace(planned, script=replace(planned.script, by_submitit=False))
        with start_run.written(planned, order):
            write_atomic(run.path / "site.sh", script.site_file(planned.script))
        start_run.record_submission(planned, order, job_id, time.time())
    return planned.script.ranks_per_node, run, planned.notes


def _as_allocated(order: Order, run: RunDir) -> Order:
    """Return the order with what sbatch was really given over what the job file says."""
    source = run.config if order.resume else order.job or DEFAULT_JOB
    is_cpu_run = load.load(source, order.overrides, order.cluster).resources.gpus_per_node == 0
    actual = defaults.overrides_of_allocation(os.environ, is_cpu_run)
    return replace(order, executor="slurm", overrides=(*order.overrides, *actual))


def _is_half_made(run: RunDir) -> bool:
    """True if the folder is ours and was never submitted: no event, no checkpoint."""
    ours = run.logs.is_dir() and run.checkpoints.is_dir() and run.ledger.is_dir()
    return ours and not read_run_events(run)[0] and not any(run.checkpoints.iterdir())
