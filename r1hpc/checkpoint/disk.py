"""Make the file system calls of the checkpoint package: retry reads, rename before removing, explain errors.

`with at("commit.rename"):` passes the failpoints `commit.rename.before` and `commit.rename.after`; the
tests kill a process at every one of them.
"""

import contextlib
import errno
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from r1hpc.base.errors import R1hpcError
from r1hpc.base.failpoints import failpoint
from r1hpc.base.files import fsync_dir
from r1hpc.base.units import format_bytes

TRASH_PREFIX = ".trash-"
_REMOVE_TRIES = 20
_MAY_PASS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)
_PAUSES_S = (1.0, 4.0, 15.0)
REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)
"""Answers of a file system that no rank and no code is at fault for."""
_PROBE_BYTES = 1 << 20
_T = TypeVar("_T")


class CheckpointWriteError(R1hpcError):
    """A checkpoint could not be written. Earlier ones are intact."""


def patiently(read: Callable[[], _T]) -> _T:
    """Retry a read that failed for a moment. A passing error must not make a good checkpoint look bad: the
    run would fall back to an older one, and replace the good one.
    """
    for pause_s in _PAUSES_S:
        try:
            return read()
        except OSError as error:
            if error.errno not in _MAY_PASS:
                raise
            time.sleep(pause_s)
    return read()


@contextlib.contextmanager
def at(name: str) -> Iterator[None]:
    """Pass the failpoints before and after a file system call."""
    failpoint(f"{name}.before")
    yield
    failpoint(f"{name}.after")


def walk(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Yield (POSIX path relative to `folder`, lstat) of all below it, folders too. Follows no link."""
    pending = [""]
    while pending:
        prefix = pending.pop()
        with os.scandir(folder / prefix) as entries:
            for entry in entries:
                status = entry.stat(follow_symlinks=False)
                yield prefix + entry.name, status
                if stat.S_ISDIR(status.st_mode):
                    pending.append(f"{prefix}{entry.name}/")


def make_private(path: Path) -> None:
    """Make a folder 0700 whatever the umask, and its entries durable."""
    if stat.S_IMODE(path.stat().st_mode) != 0o700:
        path.chmod(0o700)
    fsync_dir(path)


def write_new(path: Path, raw: bytes, scratch: Path, label: str) -> None:
    """Write `raw` durably to `path`, through the file `scratch` on the same file system."""
    with at(f"{label}_open"):
        fd = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(fd, "wb") as file:
        os.fchmod(fd, 0o600)
        with at(f"{label}_write"):
            file.write(raw)
            file.flush()
        with at(f"{label}_fsync"):
            os.fsync(fd)
    with at(f"{label}_rename"):
        scratch.replace(path)
    with at(f"{label}_fsync_dir"):
        fsync_dir(path.parent)


def move_to_trash(path: Path, parent: Path, label: str) -> Path | None:
    """Rename `path` to a trash name under `parent`; None if it is not there.

    One rename hides it from every reader and writer, however long removal takes.
    """
    trash = parent / f"{TRASH_PREFIX}{secrets.token_hex(4)}-{path.name.lstrip('.')}"
    with at(f"{label}_rename"):
        try:
            path.rename(trash)
        except FileNotFoundError:
            if parent.is_dir():
                return None
            raise
    return trash


def remove_tree(path: Path, label: str) -> bool:
    """Remove a trashed folder or file; False if something is left for a later begin or prune.

    Tries for about a second: a superseded process may still be creating files in it.
    """
    with at(f"{label}_rmtree"):
        for _ in range(_REMOVE_TRIES):
            shutil.rmtree(path, ignore_errors=True)
            with contextlib.suppress(OSError):
                path.unlink()
            if not os.path.lexists(path):
                return True
            time.sleep(0.05)
    return False


def discard(path: Path, parent: Path, label: str) -> None:
    """Move to the trash and remove; remove in place if even the rename fails (a full disk)."""
    try:
        trash = move_to_trash(path, parent, label)
    except OSError:
        trash = path
    if trash is not None:
        remove_tree(trash, label)


def sweep_trash(folder: Path, label: str) -> None:
    """Remove trash that a kill left in `folder`."""
    for trash in sorted(folder.glob(f"{TRASH_PREFIX}*")):
        remove_tree(trash, label)


def write_error(path: Path, error: OSError) -> CheckpointWriteError:
    """Return an error with the path, the cause, and the space and inodes left on its file system."""
    place = error.filename or path
    reason = error.strerror or str(error)
    return CheckpointWriteError(
        f"cannot write checkpoint file {os.fsdecode(place)}: {reason} ({free_space(path)}); "
        f"what was committed before is intact. {_fix(error.errno)}, then resume"
    )


def refusal_of(folder: Path) -> str:
    """Write a megabyte into a folder, and remove it; return the file system's refusal, or empty."""
    probe = folder / f".probe-{secrets.token_hex(4)}"
    try:
        with probe.open("xb", buffering=0) as file:
            file.write(bytes(_PROBE_BYTES))
            os.fsync(file.fileno())
    except OSError as error:
        return os.strerror(error.errno or 0) if error.errno in REFUSALS else ""
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    return ""


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
