"""End a run: touch STOP, which lets it save first, or cancel its job by ID.

The ID comes from the run folder. It is used only after checking that the job is yours and this run's:
`scancel --name` would hit other runs, and another cluster may use the same ID for another job.
"""

import contextlib
import os
import re
import signal
import socket
from dataclasses import dataclass

from r1hpc.attempt.state.state import JobRef, Situation, State, is_of_run, ranks_of, read_situation
from r1hpc.base.errors import StateError
from r1hpc.base.names import printable
from r1hpc.base.run_dir import RunDir
from r1hpc.slurm.client import call
from r1hpc.telemetry.records.attempts import record


@dataclass(frozen=True)
class Cancellation:
    action: str
    """none, stop, sigterm or scancel."""
    text: str
    job_id: str | None


def cancel(run: RunDir, save_first: bool = False) -> Cancellation:
    """End a run; do nothing if it is over. Raise the errors of `cancel_job`."""
    situation = read_situation(run)
    if situation.state.is_over:
        text = f"{run.run_id} is {situation.state.value} already: nothing to cancel"
        return Cancellation("none", text, situation.job.job_id if situation.job else None)
    return touch_stop(run, situation) if save_first else cancel_job(run, situation)


def touch_stop(run: RunDir, situation: Situation) -> Cancellation:
    """Ask the run to save and end by itself."""
    run.stop.touch(mode=0o600)
    text = (
        f"{run.run_id} is {situation.state.value}: its next attempt will find STOP and end at once; "
        "without --save-first the job itself is cancelled"
    )
    if situation.state is State.running:
        text = f"{run.run_id} saves after the step under way and ends for good (STOP is touched)"
    return Cancellation("stop", text, situation.job.job_id if situation.job else None)


def cancel_job(run: RunDir, situation: Situation) -> Cancellation:
    """End the newest job of the run.

    Raise StateError if there is no job, or it is another run's, another user's or on another host. Raise
    SlurmError if Slurm does not answer.
    """
    job = situation.job
    if job is None:
        raise StateError(f"{run.path} names no job: it was never submitted")
    if job.pid is not None:
        return Cancellation("sigterm", _end_supervisor(run, job, job.pid), job.job_id)
    if not job.is_slurm:
        raise StateError(
            f"{run.attempts} names a job {printable(job.job_id)!r} that is neither Slurm's nor local"
        )
    check_is_ours(run, job, call(["scontrol", "show", "job", "-o", job.job_id], 10.0))
    # A pending job leaves no attempt. For a running one Slurm's own CANCELLED is better evidence.
    call(["scancel", job.job_id], 20.0)
    _record(run)
    text = (
        f"job {job.job_id} is cancelled; a running attempt gets SIGTERM and, as long as KillWait lasts, "
        "saves. It is not requeued."
    )
    return Cancellation("scancel", text, job.job_id)


def check_is_ours(run: RunDir, job: JobRef, shown: str) -> None:
    """Refuse a job of another user or run, judged by `scontrol show job -o`.

    The job is this run's if it names the run folder or the run (its script, its comment, its log), or if its
    ID is part of the run's name, as in sbatch/train.sh.
    """
    owner = re.search(r" UserId=[^ ]*?\((\d+)\)", shown)
    if owner is None or int(owner[1]) != os.getuid():
        raise StateError(
            f"job {job.job_id} is not yours, so not {run.run_id}'s: was the run made on another cluster?"
        )
    names_run = str(run.path) in shown or re.search(rf"[=/ ]{re.escape(run.run_id)}(?![\w.-])", shown)
    if not names_run and not run.run_id.endswith(f"-{job.job_id}"):
        raise StateError(
            f"job {job.job_id} does not name {run.run_id} anywhere, so it may be another run's. "
            f"Look at `scontrol show job {job.job_id}`; if it is this run's: scancel {job.job_id}"
        )


def _end_supervisor(run: RunDir, job: JobRef, pid: int) -> str:
    if job.host not in (None, socket.gethostname()):
        raise StateError(f"{run.run_id} runs on {job.host}: cancel it there, or touch {run.stop}")
    _record(run)
    if is_of_run(pid, run.path):
        with contextlib.suppress(ProcessLookupError):  # it has ended since, as a sweep's by another point
            # The supervisor passes it on to its ranks, which save and end. If it leads its process group, its
            # other children (building a dataset) get it too.
            send = os.killpg if os.getpgid(pid) == pid else os.kill
            send(pid, signal.SIGTERM)
            return f"process {pid} got SIGTERM: {run.run_id} saves and ends for good"
    ranks = ranks_of(run.path, job.job_id)
    if not ranks:
        return f"process {pid} is gone or not {run.run_id}'s: nothing of {run.run_id} runs any more"
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, signal.SIGTERM)
    return f"process {pid} is gone; its ranks got SIGTERM: {run.run_id} saves and ends for good"


def _record(run: RunDir) -> None:
    """Record the cancel, so that the attempt's cause becomes cancelled, not preempted."""
    record(run, "cancel_requested", by=os.environ.get("USER", str(os.getuid())))
