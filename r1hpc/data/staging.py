"""A private folder beside the destination that becomes it in one rename, or is nobody's after a kill.

with staging(Path("data/stdlib")) as stage:
    ...                                     # write under stage.content
    publish(stage)

.staging-<uuid>/owner.json                  who is building; locked while they live
.staging-<uuid>/content/                    what will be renamed to the destination
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from r1hpc.base.errors import UsageError
from r1hpc.base.files import fsync_dir, fsync_file

_PREFIX = ".staging-"
_OWNER = "owner.json"
_EMPTY_AGE_S = 60.0


@dataclass(frozen=True)
class Stage:
    """A staging folder and the destination it is for."""

    folder: Path
    destination: Path

    @property
    def content(self) -> Path:
        return self.folder / "content"


@contextlib.contextmanager
def staging(destination: Path) -> Iterator[Stage]:
    """A fresh staging folder, removed at the end whatever happens, short of a kill."""
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        stage, lock = _create(destination)
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"{destination.parent} is not a folder; choose another --out") from None
    try:
        stage.content.mkdir()
        yield stage
    finally:
        shutil.rmtree(stage.folder, ignore_errors=True)
        os.close(lock)


def publish(stage: Stage) -> bool:
    """Make the content durable, then rename it to the destination. False: somebody else was first."""
    _fsync_tree(stage.content)
    try:
        stage.content.rename(stage.destination)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        return False
    fsync_dir(stage.destination.parent)
    return True


def remove_abandoned(folder: Path) -> list[Path]:
    """Remove the staging folders in `folder` whose owner is gone; return them.

    Gone means: begun on this host, and its lock is free. The kernel frees the lock with the process, so
    a reused process id cannot be mistaken for the owner. Folders of other hosts are left alone: not
    every shared filesystem shows us their locks.
    """
    removed = [path for path in sorted(folder.glob(f"{_PREFIX}*")) if path.is_dir() and _is_abandoned(path)]
    for path in removed:
        shutil.rmtree(path, ignore_errors=True)
    return removed


def _create(destination: Path) -> tuple[Stage, int]:
    while True:
        folder = destination.parent / f"{_PREFIX}{uuid.uuid4().hex}"
        folder.mkdir()
        try:
            lock = os.open(folder / _OWNER, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:  # taken for an abandoned empty folder in between
            continue
        fcntl.flock(lock, fcntl.LOCK_EX)
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "destination": str(destination)}
        os.write(lock, json.dumps(owner).encode() + b"\n")
        return Stage(folder, destination), lock


def _is_abandoned(folder: Path) -> bool:
    try:
        lock = os.open(folder / _OWNER, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return _is_old_and_empty(folder)
    except PermissionError:  # another user's
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        owner = json.loads(os.read(lock, 2**16) or b"{}")
    except (BlockingIOError, json.JSONDecodeError):
        return False
    finally:
        os.close(lock)
    return bool(owner.get("host") == socket.gethostname())


def _is_old_and_empty(folder: Path) -> bool:
    """Killed between making the folder and its owner file."""
    return not any(folder.iterdir()) and time.time() - folder.stat().st_mtime > _EMPTY_AGE_S


def _fsync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            fsync_dir(path)
        else:
            fsync_file(path)
    fsync_dir(folder)
