"""Define the errors of checkpoints, and turn an OSError into one of them."""

import errno
import os
from pathlib import Path

from r1hpc.base.errors import R1hpcError, StateError
from r1hpc.base.units import format_bytes


class CheckpointWriteError(R1hpcError):
    """A checkpoint could not be written. Earlier ones are intact."""


class SupersededError(StateError):
    """A newer attempt of the run has begun: this process must not write checkpoints."""


class NoUsableCheckpointError(StateError):
    """Checkpoint folders exist but none verifies. Never treated as a fresh start."""


def write_error(path: Path, error: OSError) -> CheckpointWriteError:
    """Return an error with the path, the cause, and the space and inodes left on its file system."""
    place = error.filename or path
    reason = error.strerror or str(error)
    return CheckpointWriteError(
        f"cannot write checkpoint file {os.fsdecode(place)}: {reason} ({free_space(path)}); "
        f"earlier checkpoints are intact. {_fix(error.errno)}, then resume"
    )


def free_space(path: Path) -> str:
    """Return `1.5 GiB free, 1200 inodes free` for the file system of `path` or its nearest parent."""
    for place in (path, *path.parents):
        try:
            status = os.statvfs(place)
        except OSError:
            continue
        space = f"{format_bytes(status.f_bavail * status.f_frsize)} free"
        # File systems without a fixed inode table (btrfs, many network ones) report 0 of 0.
        return space + (f", {status.f_favail} inodes free" if status.f_files else "")
    return "free space unknown"


def _fix(code: int | None) -> str:
    if code in (errno.ENOSPC, errno.EDQUOT):
        return "Free some space or quota, or lower checkpoint.keep"
    if code == errno.EROFS:
        return "Have the file system made writable"
    if code in (errno.EACCES, errno.EPERM):
        return "Make the folder writable for you"
    return "Check that file system"
