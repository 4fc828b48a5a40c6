"""Submit an order (a run or a chain) for api.submit.

A run is planned, checked against the budget, frozen and started here; submit_chain.py takes a chain. A dry
run asks Slurm too: it is refused as the submission would be. `prepare_inside_job` is for sbatch/train.sh,
whose job makes its own run folder.
"""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from r1hpc.accounting.budget import find_budget, load_budget
from r1hpc.attempt.begin import check_records
from r1hpc.base.errors import UsageError
from r1hpc.base.files import write_atomic
from r1hpc.base.lock import lock_within
from r1hpc.base.names import check_name
from r1hpc.base.run_dir import RunDir, open_run
from r1hpc.config import load
from r1hpc.config.assets import find_job
from r1hpc.plan.topology.batch import ranks_per_node
from r1hpc.slurm import defaults, rank_env, script
from r1hpc.submission import start_run
from r1hpc.submission.chain.folder import ChainDir
from r1hpc.submission.order import DEFAULT_JOB, Order
from r1hpc.submission.plan_run import OverBudgetError, PlannedRun, check_budget, plan_new_run, show_to_slurm
from r1hpc.submission.resume import plan_resumed_run
from r1hpc.telemetry.records.attempts import read_history, read_run_events

if TYPE_CHECKING:
    from r1hpc.submission.submit_chain import SubmittedChain

_PATIENCE_S = 300.0
"""Longer than sbatch may take."""


@dataclass(frozen=True)
class SubmittedRun:
    planned: PlannedRun
    job_id: str | None = None
    """None: a dry run."""


def submit(order: Order) -> "SubmittedRun | SubmittedChain":
    """Begin a run or a chain, or continue an existing chain.

    Raise UsageError if it cannot run as ordered. Raise R1hpcError if the budget is too small, or Slurm
    refuses or does not answer.
    """
    with nullcontext() if order.is_dry_run else budget_held(order.counted_root):
        chain = _chain(order)
        if chain is not None:
            from r1hpc.submission.submit_chain import submit_chain  # a run needs none of it

            return submit_chain(chain, find_job(order.job) if order.job is not None else None, order)
        if order.reuse or order.from_stage:
            raise UsageError("--from and --reuse take the file of a chain: one with stages")
        if order.is_dry_run:
            planned = plan_within_budget(order)
            said = show_to_slurm(planned)
            return SubmittedRun(replace(planned, notes=(*planned.notes, said.sentence)) if said else planned)
        with start_run.alone(open_run(order.resumed_run().path)) if order.resume else nullcontext():
            planned = plan_within_budget(order)
            return SubmittedRun(planned, start_run.start(planned, order))


def _chain(order: Order) -> ChainDir | None:
    """Return the ordered chain, by its file or its name; None if it is a run."""
    if order.job is not None:
        path = find_job(order.job)
        if not load.is_chain_file(path):
            return None
        chain = ChainDir(order.folder(check_name(order.run_name or path.stem, "--run-name")).path)
        return ChainDir.find(chain.path) or chain
    return ChainDir.find(order.folder(order.run_name).path) if order.run_name else None


@contextmanager
def budget_held(run_root: Path) -> Iterator[None]:
    """Keep other submissions within this budget out, from the check until the job is recorded.

    Without a budget, or locks in the file system, nobody waits. Raise OverBudgetError if another submission
    has held it for minutes.
    """
    path = find_budget(run_root)
    if load_budget(path) is None:
        yield
        return
    # NFS gives an exclusive lock only to users who may write (flock(2)).
    mode = "r+" if os.access(path, os.W_OK) else "r"
    with path.open(mode, encoding="utf-8") as file:
        try:
            is_held = lock_within(file.fileno(), _PATIENCE_S)
        except OSError:
            is_held = True
        if not is_held:
            raise OverBudgetError(
                f"another submission holds the budget {path} for {_PATIENCE_S:.0f} s now: try again"
            )
        yield


def plan_within_budget(order: Order) -> PlannedRun:
    """Return the plan with notes on the budget; raise if it does not fit."""
    planned = plan_resumed_run(order) if order.resume else plan_new_run(order)
    said = check_budget([planned], order.counted_root, order.over_budget)
    return replace(planned, notes=(*planned.notes, *said))


def prepare_inside_job(order: Order) -> tuple[int, RunDir, tuple[str, ...]]:
    """Make this job's run folder for sbatch/train.sh, or find it again; return ranks per node, run, notes.

    Raise UsageError if this is no Slurm job, or the folder is another job's. Raise NotTheNodeError if the
    run's records are damaged.
    """
    job_id = rank_env.job_id(os.environ)
    if job_id is None or order.run_name is None:
        raise UsageError("--prepare-only belongs to sbatch/train.sh and runs inside a job")
    run = order.folder(order.run_name)
    check_records(run)
    if run.config.is_file() and any(s.get("job_id") == job_id for s in read_history(run).submissions):
        config = load.read(run.config)  # a requeued job: everything is already decided
        return ranks_per_node(config, config.resources.gpus_per_node or 0), run, ()
    # What sbatch was really given goes over what the job file says.
    source = run.config if order.resume else order.job or DEFAULT_JOB
    is_cpu_run = load.load(source, order.overrides, order.cluster).resources.gpus_per_node == 0
    actual = defaults.overrides_of_allocation(os.environ, is_cpu_run)
    order = replace(order, executor="slurm", overrides=(*order.overrides, *actual))
    is_ours = run.logs.is_dir() and run.checkpoints.is_dir() and run.ledger.is_dir()
    if is_ours and not read_run_events(run)[0] and not any(run.checkpoints.iterdir()):
        shutil.rmtree(run.path)  # never submitted: this job was preempted while it made the folder
    with budget_held(order.counted_root):
        planned = plan_within_budget(order)
        planned = replace(planned, script=replace(planned.script, by_submitit=False))
        with start_run.written(planned, order):
            write_atomic(run.path / "site.sh", script.site_file(planned.script))
        start_run.record_submission(planned, order, job_id, time.time())
    return planned.script.ranks_per_node, run, planned.notes
