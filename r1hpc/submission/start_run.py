"""Freeze a planned run into its folder and start it: on Slurm, or under a supervisor on this machine.

A kill may cut off any step. A folder without config.yaml is incomplete: a stage or a point is made again; for
a single run, plan_run.py asks the user to remove it. A job that sbatch took but nobody recorded is found by
its folder (slurm.queue).
"""

import errno
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from r1hpc.attempt.begin import write_needs
from r1hpc.attempt.detached import start_detached
from r1hpc.attempt.state.state import slurm_jobs
from r1hpc.base.errors import R1hpcError, UsageError
from r1hpc.base.failpoints import failpoint
from r1hpc.base.files import check_owned, read_json, write_atomic, write_json
from r1hpc.base.lock import held, write_holder
from r1hpc.base.run_dir import RunDir
from r1hpc.base.units import format_bytes
from r1hpc.config import load, snapshot
from r1hpc.config.secrets import redact
from r1hpc.slurm import fields, script
from r1hpc.slurm.sbatch import LostSubmissionError
from r1hpc.slurm.shell import contract
from r1hpc.submission.chain.folder import SUPERVISOR, ChainDir
from r1hpc.submission.order import Order
from r1hpc.submission.plan_run import PlannedRun
from r1hpc.telemetry.records.attempts import record
from r1hpc.telemetry.records.lines import PlanFacts


def start(planned: PlannedRun, order: Order) -> str:
    """Write the run folder and start the run; return its job ID. A refusal changes nothing.

    Raise R1hpcError if the folder cannot be made, or Slurm refuses.
    """
    run = planned.run
    with written(planned, order):
        failpoint("submit.written")
        asked_at = time.time()
        if planned.executor == "local":
            process = start_detached(["local", str(run.path)], run, run.logs / "local.out")
            job_id = f"local-{process.pid}"
        else:
            from r1hpc.slurm.submitit_job import submit  # loads submitit, which a dry run does not need

            job_id = submit(run, planned.plan.topology.world_size, known=slurm_jobs(run))
    failpoint("submit.asked")
    record_submission(planned, order, job_id, asked_at)
    return job_id


@contextmanager
def written(planned: PlannedRun, order: Order) -> Iterator[None]:
    """Write everything the job will read; an error inside the block undoes it. Then a new folder is removed,
    and a resumed one restored.

    Nobody else submits a new run meanwhile. The caller that resumes one already holds its lock.
    """
    run = planned.run
    renewed = (run.config, run.plan, run.estimate, run.script, run.shell_functions, *_switches(run))
    before = {} if planned.is_new else {path: _content(path) for path in renewed}
    if planned.is_new:
        create(run)
    try:
        with alone(run) if planned.is_new else nullcontext():
            write(planned, order)
            yield
    except LostSubmissionError as error:  # the job, if there is one, needs its folder
        raise R1hpcError(f"{error}\n{run.path} is kept for it") from None
    except (R1hpcError, OSError):
        if planned.is_new:
            shutil.rmtree(run.path)
        _put_back(before)
        raise


def alone(run: RunDir) -> AbstractContextManager[int]:
    """Hold a lock while a run is submitted: a second submission at the same time is refused.

    Raise UsageError if another process submits it.
    """
    return held(run.submission_lock, run.run_id, "a submission")


def create(run: RunDir) -> None:
    """Make the run's folders.

    Raise UsageError if they exist, R1hpcError if the run root cannot be written.
    """
    create_parent(run)
    try:
        run.create()
    except FileExistsError:
        raise UsageError(f"another submission has just taken the name {run.run_id}: choose another") from None
    except OSError as error:
        raise _no_folder(run.path, error) from None


def create_parent(run: RunDir) -> None:
    """Make the run root. Raise R1hpcError if it cannot be made."""
    try:
        run.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise _no_folder(run.path.parent, error) from None


def write(planned: PlannedRun, order: Order) -> None:
    """Write everything the job will read. A resumed run keeps its code; configuration and plan are renewed.

    Raise R1hpcError if the disk is full, a file cannot be copied, or another user owns the folder or could
    replace it.
    """
    run = planned.run
    fields.check_parents(run.path, planned.config.cluster.trust_shared_run_root)
    check_owned(run.path.resolve())
    free = shutil.disk_usage(run.path).free
    try:
        if planned.is_new:
            snapshot.freeze(run, planned.config, order.argv, order.overrides, planned.shared)
        else:
            load.renew(planned.config, run.config)
            if planned.script.contract < contract.CURRENT:
                write_atomic(run.shell_functions, script.FUNCTIONS.read_bytes())
        if planned.needs is not None:
            write_needs(run, planned.needs)
        write_json(run.plan, planned.plan.to_json())
        if planned.estimate is not None:
            write_json(run.estimate, planned.estimate)
        write_atomic(run.script, script.render(planned.script))
        for switch in _switches(run):  # submitting the run again takes them back
            switch.unlink(missing_ok=True)
    except OSError as error:
        raise _not_written(run.path, error, free) from error


def _switches(run: RunDir) -> tuple[Path, ...]:
    return run.stop, run.save, run.finished


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _put_back(before: Mapping[Path, bytes | None]) -> None:
    """Restore every file. Skip unchanged ones: the disk may be full."""
    for path, content in before.items():
        try:
            if content is None:
                path.unlink(missing_ok=True)
            elif content != _content(path):
                write_atomic(path, content)
        except OSError as error:
            print(f"{path} could not be put back as it was: {error.strerror}", file=sys.stderr)


def clear_incomplete(run: RunDir) -> None:
    """Remove a folder that a kill left without its config.yaml: it cannot have a job."""
    if run.path.is_dir() and not run.config.is_file():
        shutil.rmtree(run.path)


def adopt(run: RunDir, job_id: str) -> None:
    """Complete a submission that was cut off after sbatch took the job."""
    from r1hpc.slurm import submitit_job  # loads submitit, which a dry run does not need

    limit_s = read_json(run.plan, PlanFacts).get("time_limit_s") if run.plan.is_file() else None
    submitit_job.adopt(run, job_id)
    record(run, "submitted", executor="slurm", job_id=job_id, script=str(run.script), time_limit_s=limit_s)


def supervise(
    chain: ChainDir,
    planned: Sequence[PlannedRun],
    runs: Sequence[RunDir],
    order: Order,
    lock: int,
    at_most: int = 1,
) -> str:
    """Write the folders of `planned`, and start the one process that runs `runs` here; return its job ID."""
    asked_at = time.time()
    for each in planned:
        if each.is_new:
            clear_incomplete(each.run)
            create(each.run)
        write(each, order)
        failpoint("chain.written")
    # The frozen code of an earlier version does not know --at-most, and knows no sweeps.
    limit = ["--at-most", str(at_most)] if at_most > 1 else []
    stages = [str(run.path) for run in runs]
    words = ["chain", str(chain.path), "--lock-fd", str(lock), *limit, "--stages", *stages]
    process = start_detached(words, planned[-1].run, chain.log, keep=(lock,))
    write_holder(lock, SUPERVISOR, process.pid)  # the next command may come before the process writes it
    failpoint("chain.supervising")
    for each in planned:
        record_submission(each, order, f"local-{process.pid}", asked_at)
    return f"local-{process.pid}"


def record_submission(planned: PlannedRun, order: Order, job_id: str, asked_at: float) -> None:
    """Record the submission, dated before the start, so that the next attempt belongs to it."""
    record(
        planned.run,
        "submitted",
        time=asked_at,
        executor=planned.executor,
        job_id=job_id,
        script=str(planned.run.script),
        time_limit_s=planned.plan.time_limit_s,
        overrides=[redact(item) for item in order.overrides],
        **({"over_budget": redact(order.over_budget)} if order.over_budget is not None else {}),
    )


def _not_written(path: Path, error: OSError, free: int) -> Exception:
    """Return the error in one sentence; copytree collects one for each file, as text."""
    if any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT)):
        return R1hpcError(
            f"{path.parent} is full, or your quota there is: {format_bytes(free)} are free, and a run's "
            f"folder needs {format_bytes(snapshot.size_of_copy())} before its first checkpoint; make room, "
            "or choose another --run-root"
        )
    if isinstance(error, shutil.Error):
        source, _, why = error.args[0][0]
        return R1hpcError(f"cannot copy {source} into the run folder: {why}")
    return R1hpcError(
        f"the run folder could not be written: {error.strerror or error} {error.filename or ''}".rstrip()
    )


def _no_folder(path: Path, error: OSError) -> R1hpcError:
    return R1hpcError(f"cannot make the folder {path} ({error.strerror}): choose another --run-root")
