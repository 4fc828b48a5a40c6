"""Decide on the batch host whether an attempt may begin, and if it cannot, whether another try may help.

It may not while another job has the run: `alone`, `refuse_a_second_job`, `refuse_a_ghost`. A mistake in the
data or the configuration is the same on every node: `on_record` records it, and the run is over. Another try
may succeed after a file system error, a folder that is not visible, or no answer from Slurm. A full disk and
damaged records can be mended, but not by using another node.
"""

import errno
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from r1hpc.attempt.notify import notify
from r1hpc.attempt.state.state import ask, job_named
from r1hpc.base.errors import R1hpcError, StateError
from r1hpc.base.files import read_object
from r1hpc.base.lock import hold, read_holder
from r1hpc.base.run_dir import RunDir
from r1hpc.base.units import format_bytes
from r1hpc.checkpoint import disk
from r1hpc.checkpoint.fence import SupersededError
from r1hpc.config.load import read
from r1hpc.slurm.client import SlurmError
from r1hpc.slurm.requeue import job_state
from r1hpc.slurm.shell.contract import MAYBE_THE_NODE, NOT_THE_NODE, OVER
from r1hpc.telemetry.records.attempts import Attempt, Cause, History, read_history, read_run_events, record

# A cancelled job may still be saving: KillWait is 30 s unless a site sets another.
_LEAVING_S = 45.0


class MustNotGoOnError(R1hpcError):
    """The run may not be restarted as it is; the message says why."""

    exit_status = OVER

    def __init__(self, message: str, cause: Cause | None = Cause.refused) -> None:
        """`cause`: recorded as the run's end; None: nothing, another job is running it."""
        super().__init__(message)
        self.cause = cause


class MayPassError(R1hpcError):
    """Begin failed, perhaps by no fault of the user's: another try, or another node, may succeed."""


class NotTheNodeError(MayPassError):
    """The run's own disk or records are at fault: another node will not help."""

    exit_status = NOT_THE_NODE


class MaybeTheNodeError(NotTheNodeError):
    """This node cannot use the run's disk; another node tells whether it is this one's fault."""

    exit_status = MAYBE_THE_NODE


def is_final(error: R1hpcError) -> bool:
    """True if it would happen again anywhere: a person has to change something first."""
    if isinstance(error, MustNotGoOnError | SupersededError):
        return True
    # An untrusted file may be one that this node reads wrongly.
    if isinstance(error, MayPassError | SlurmError | StateError):
        return False
    return not any(isinstance(each, OSError) for each in _causes(error))


@contextmanager
def on_record(run: RunDir, job_id: str) -> Iterator[None]:
    """Record why no attempt begins, if that is final.

    Raise MustNotGoOnError instead of the final error, NotTheNodeError instead of a full disk.
    """
    try:
        yield
    except (R1hpcError, OSError) as error:
        refuse_a_full_disk(error, run.path)
        if not isinstance(error, R1hpcError) or not is_final(error):
            raise
        cause = error.cause if isinstance(error, MustNotGoOnError) else Cause.refused
        if isinstance(error, SupersededError):
            cause = None  # the newer attempt goes on
        if cause is not None:
            record_not_begun(run, job_id, cause, str(error))
        if isinstance(error, MustNotGoOnError):
            raise
        raise MustNotGoOnError(str(error)) from error


def refuse_a_full_disk(error: R1hpcError | OSError, folder: Path) -> None:
    """Raise a NotTheNodeError if a disk that every node sees is full or over quota, or MaybeTheNodeError if
    it answers with an I/O error or is read-only.

    The node's own temporary folder does not count. `folder`: the run's.
    """
    for each in _causes(error):
        if isinstance(each, OSError) and each.errno in disk.REFUSALS:
            place = Path(str(each.filename or folder))
            if place.is_relative_to(tempfile.gettempdir()) and not place.is_relative_to(folder.parent):
                return
            why = f"{each.strerror}: {place}" if error is each else str(error)
            if each.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NotTheNodeError(f"{why}. Make room or raise the quota") from error
            raise MaybeTheNodeError(f"{each.strerror}: {folder}. Have its file system mended") from error


def refuse_the_same_full_disk(run: RunDir, last: Attempt | None) -> None:
    """Raise a NotTheNodeError if the last attempt ended at a full disk that still has no room to save."""
    if last is None or last.cause is not Cause.cluster or os.strerror(errno.ENOSPC) not in last.detail:
        return
    need, free = read_object(run.plan).get("checkpoint_bytes"), shutil.disk_usage(run.path).free
    if need is not None and free < need:
        why = f"a checkpoint needs {format_bytes(need)}, {format_bytes(free)} are free. Make room"
        raise NotTheNodeError(f"{os.strerror(errno.ENOSPC)}: {run.path}: {why}")


def record_not_begun(run: RunDir, job_id: str, cause: Cause, detail: str) -> None:
    """Record that the run is over before its next attempt began, and why, and tell the user."""
    try:
        record(run, "not_begun", job_id=job_id, cause=cause.value, detail=" ".join(detail.split()))
    except OSError as error:
        print(f"{run.attempts} could not be written: {error.strerror}", file=sys.stderr)
    with suppress(R1hpcError, OSError):  # the settings themselves may be the reason
        notify(run, read(run.config).notify, cause, detail)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error and its causes, including those hidden by `from None`."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@contextmanager
def alone(run: RunDir, job_id: str) -> Iterator[None]:
    """Hold the run's lock while this job begins an attempt; another job of the run waits for it.

    Raise MustNotGoOnError if the other job held it too long, perhaps while it builds a dataset.
    """
    lock = hold(run.begin_lock, f"job {job_id}", _LEAVING_S)
    if lock is None:
        other = str(read_holder(run.begin_lock).get("role", "")).removeprefix("job ")
        # Held by this job, or by processes on a node that Slurm lost. The fence deals with those.
        if other != job_id and _is_alive(other):
            raise MustNotGoOnError(
                f"job {other} begins an attempt of {run.run_id}: this job leaves it alone", cause=None
            )
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def refuse_a_second_job(run: RunDir, job_id: str) -> None:
    """Refuse to begin while another job runs in this folder. If nobody can be asked, the fence must suffice.

    Refuse at once, unless the other job is ending. Raise MustNotGoOnError if another job is running.
    """
    history = read_history(run)
    last = history.last
    if last is None or last.cause is not None or last.job_id in (None, job_id):
        return
    is_cancelled = history.is_newer("cancel_requested", "begin")
    deadline = time.monotonic() + _LEAVING_S
    while (other := ask(run, job_named(run, last.job_id), timeout_s=10.0)).alive:
        if not (is_cancelled or other.leaving) or time.monotonic() > deadline:
            raise MustNotGoOnError(
                f"{run.run_id} is already running as job {last.job_id} in attempt {last.attempt}: "
                "this job leaves it alone",
                cause=None,
            )
        time.sleep(2.0)


def refuse_a_ghost(run: RunDir, executor: str, job_id: str, known: History | None = None) -> None:
    """Refuse if Slurm, having lost this batch host, restarted the job elsewhere while this process runs on.

    Raise MustNotGoOnError if that happened: the run belongs to the other process.

    Args:
        known: the records when this began; no attempt may have begun since.
    """
    restarts = 0
    if executor == "slurm":
        try:
            restarts = job_state(job_id).restarts
        except SlurmError:  # then the records decide
            restarts = _restarts_on_record(run, job_id)
    last = read_history(run).last
    before = known.last.attempt if known is not None and known.last is not None else 0
    is_overtaken = known is not None and last is not None and last.attempt > before
    if is_overtaken or restarts > own_restarts():
        raise MustNotGoOnError(
            f"job {job_id} was started again on another node, and {run.run_id} runs there: this one "
            "leaves it alone",
            cause=None,
        )


def _restarts_on_record(run: RunDir, job_id: str) -> int:
    restarts = 0
    for event in read_run_events(run)[0]:
        if event["event"] in ("submitted", "resubmitted"):
            restarts = 0
        elif (event["event"], str(event.get("job_id"))) == ("begin", job_id):
            restarts = max(restarts, event.get("restarts", 0))
    return restarts


def own_restarts() -> int:
    """Return how often Slurm had restarted this job when it started this process."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def _is_alive(job_id: str) -> bool:
    if not re.fullmatch(r"\d+(_\d+)?", job_id):
        return True  # a local supervisor
    try:
        return job_state(job_id).live
    except SlurmError:
        return True
