"""Why an attempt does not begin, and whether another try, or another node, can change that.

    with on_record(run, job_id):
        ...                          # what is final leaves a `not_begun` in attempts.jsonl, with its cause

A mistake in the data or the configuration is the same on every node, and trying again spends hours. A file
system that refuses, a folder that is not visible, Slurm that does not answer, are not: another try may pass.
A full disk and damaged records may be mended, but by no other node.
"""

import errno
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from r1hpc.base.errors import R1hpcError, StateError
from r1hpc.base.rundir import RunDir
from r1hpc.checkpoint.errors import SupersededError
from r1hpc.slurm.client import SlurmError
from r1hpc.slurm.contract import NOT_THE_NODE, OVER
from r1hpc.telemetry.attempts import Cause, record


class MustNotGoOnError(R1hpcError):
    """The run may not be started again as it is; the message says why."""

    exit_status = OVER

    def __init__(self, message: str, cause: Cause | None = Cause.refused) -> None:
        """`cause`: what is put on record as the run's end; None: nothing, it is at work elsewhere."""
        super().__init__(message)
        self.cause = cause


class MayPassError(R1hpcError):
    """It failed, and perhaps by no fault of the user's: another try, or another node, may do it."""


class NotTheNodeError(MayPassError):
    """The run's own disk or records are at fault: no other node can begin it."""

    exit_status = NOT_THE_NODE


def is_final(error: R1hpcError) -> bool:
    """Whether the same would happen again, anywhere: a person has to change something first."""
    if isinstance(error, MustNotGoOnError | SupersededError):
        return True
    # A file that cannot be trusted may be one that this node reads wrongly.
    if isinstance(error, MayPassError | SlurmError | StateError):
        return False
    return not any(isinstance(each, OSError) for each in _causes(error))


@contextmanager
def on_record(run: RunDir, job_id: str) -> Iterator[None]:
    """Put on record why no attempt begins, where that is final.

    Raises:
        MustNotGoOnError: in place of whatever was final.
        NotTheNodeError: in place of a full disk.
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
    """Raise a NotTheNodeError where a disk is full, or over quota, that every node sees.

    The node's own temporary folder is none. `folder`: the run's.
    """
    for each in _causes(error):
        if isinstance(each, OSError) and each.errno in (errno.ENOSPC, errno.EDQUOT):
            place = Path(str(each.filename or folder))
            if place.is_relative_to(tempfile.gettempdir()) and not place.is_relative_to(folder.parent):
                return
            why = f"{each.strerror}: {place}" if error is each else str(error)
            raise NotTheNodeError(f"{why}. Make room or raise the quota") from error


def record_not_begun(run: RunDir, job_id: str, cause: Cause, detail: str) -> None:
    """That the run is over ahead of its next attempt, and why."""
    try:
        record(run, "not_begun", job_id=job_id, cause=cause.value, detail=" ".join(detail.split()))
    except OSError as error:
        print(f"{run.attempts} could not be written: {error.strerror}", file=sys.stderr)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was raised for, also where `from None` hides that from a reader."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
