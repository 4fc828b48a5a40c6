"""The work folder of a build: pure units, each published by one rename, and the lock of whoever drives them.

    with open_work(Path("data/web")) as work:
        path = publish_unit(work.folder, "clean", key, write)       # does nothing where the unit is done
        ...
        publish(work, content)                                      # the dataset under its own name

    .staging-<name of the destination>/
        owner.json                      who builds: host, process, destination; locked while they live
        stages.json                     the units of each stage, for `shard status`
        units/<stage>/<key>/done.json   a finished unit: what it made, from what
        tmp/<uuid>/                     what somebody is writing

A unit's key is the digest of its input, its settings and the code (see units), so a unit that is there is the
right one whoever made it, on whatever node. A kill leaves the units that are done; the next build for the
same destination goes on with them and removes the folder at the end. The lock only saves double work: where
the file system has none (Lustre without -o flock), two builds at once publish the same units and one dataset.
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1hpc.base.errors import UsageError
from r1hpc.base.failpoints import failpoint
from r1hpc.base.files import fsync_dir, fsync_file, write_atomic

DONE = "done.json"
STAGES = "stages.json"
_PREFIX = ".staging-"
_OWNER = "owner.json"
_UNITS = "units"
_TMP = "tmp"
_EMPTY_AGE_S = 60.0
_POLL_S = 0.1
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


@dataclass(frozen=True)
class Work:
    """An open work folder and the destination it is for."""

    folder: Path
    destination: Path

    @property
    def tmp(self) -> Path:
        return self.folder / _TMP

    def private(self) -> Path:
        """A new folder that is nobody else's."""
        folder = self.tmp / uuid.uuid4().hex
        folder.mkdir(parents=True)
        return folder

    def write_stages(self, stages: dict[str, list[list[Any]]]) -> None:
        """Record the units of each stage as [key, input bytes]."""
        write_atomic(self.folder / STAGES, json.dumps(stages), mode=0o644)


def work_folder(destination: Path) -> Path:
    """Where the work for a destination lies: beside it, hidden."""
    return destination.parent / f"{_PREFIX}{destination.name}"


@contextlib.contextmanager
def open_work(destination: Path) -> Iterator[Work]:
    """The work folder of a destination, made or taken over; waits while another build holds it.

    Removed at the end, unless units are done that the next build can use.
    """
    folder = work_folder(destination)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        lock, is_alone = _acquire(folder, destination)
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"{destination.parent} is not a folder; choose another --out") from None
    work = Work(folder, destination)
    try:
        if is_alone:
            shutil.rmtree(work.tmp, ignore_errors=True)  # half-written by somebody who is gone
        work.tmp.mkdir(exist_ok=True)
        yield work
    finally:
        if destination.exists() or not any((folder / _UNITS).glob(f"*/*/{DONE}")):
            shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def find_unit(folder: Path, stage: str, key: str) -> Path | None:
    """The folder of a finished unit whose files are all there with their sizes, else None."""
    path = folder / _UNITS / stage / key
    try:
        files = json.loads((path / DONE).read_text())["files"]
        whole = all((path / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return path if whole else None


def unit_record(path: Path) -> dict[str, Any]:
    """What a finished unit reported of itself."""
    record: dict[str, Any] = json.loads((path / DONE).read_text())["record"]
    return record


def publish_unit(folder: Path, stage: str, key: str, write: Callable[[Path], dict[str, Any]]) -> Path:
    """The finished unit, made now unless it is there: `write` fills a folder and returns its record.

    Durable before it has its name, so that what is found after a power cut is whole.
    """
    found = find_unit(folder, stage, key)
    if found is not None:
        return found
    private = folder / _TMP / uuid.uuid4().hex
    private.mkdir(parents=True)
    record = write(private)
    files = {p.relative_to(private).as_posix(): p.stat().st_size for p in private.rglob("*") if p.is_file()}
    (private / DONE).write_text(json.dumps({"stage": stage, "key": key, "record": record, "files": files}))
    fsync_tree(private)
    failpoint("data.unit.publish")
    _rename_unit(private, folder / _UNITS / stage / key, lambda: find_unit(folder, stage, key) is not None)
    return folder / _UNITS / stage / key


def _rename_unit(private: Path, target: Path, is_whole: Callable[[], bool]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        private.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not is_whole():  # damaged since: out of the way
            target.rename(private.with_name(uuid.uuid4().hex))
            private.rename(target)
        else:  # another worker was first, with the same bytes
            shutil.rmtree(private, ignore_errors=True)
    fsync_dir(target.parent)


def publish(work: Work, content: Path) -> bool:
    """Make the content durable, then rename it to the destination. False: somebody else was first."""
    fsync_tree(content)
    try:
        content.rename(work.destination)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        return False
    fsync_dir(work.destination.parent)
    return True


def link_tree(source: Path, target: Path) -> None:
    """The files of `source` below `target` by hard link, or copied where the file system has none."""
    for path in sorted(source.rglob("*")):
        there = target / path.relative_to(source)
        if path.is_dir():
            there.mkdir(parents=True, exist_ok=True)
            continue
        there.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, there)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOSPC):
                raise
            shutil.copy2(path, there)


def remove_leftover(destination: Path) -> None:
    """Remove the work folder of a dataset that is there: its build was killed after the last step but one."""
    folder = work_folder(destination)
    if folder.is_dir() and not is_held(folder):
        shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(folder: Path) -> list[Path]:
    """Remove what builds of earlier versions left in `folder`; return it.

    They had a folder of their own for each try, of no use to the next. Gone means: begun on this host, and
    its lock is free. The kernel frees the lock with the process, so a reused process id cannot be mistaken
    for the owner. Folders of other hosts are left alone: not every shared filesystem shows us their locks.
    """
    removed = [path for path in sorted(folder.glob(f"{_PREFIX}*")) if path.is_dir() and _is_abandoned(path)]
    for path in removed:
        shutil.rmtree(path, ignore_errors=True)
    return removed


def _acquire(folder: Path, destination: Path) -> tuple[int, bool]:
    """An open descriptor of owner.json, and whether it is locked: not every file system can."""
    while True:
        folder.mkdir(exist_ok=True)
        try:
            lock = os.open(folder / _OWNER, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:  # the build before us removed it in between
            continue
        locked = _lock(lock)
        if locked is not False and _is_current(lock, folder / _OWNER):
            break
        os.close(lock)
        time.sleep(_POLL_S)
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "destination": str(destination)}
    os.ftruncate(lock, 0)
    os.pwrite(lock, json.dumps(owner).encode() + b"\n", 0)
    return lock, bool(locked)


def _lock(descriptor: int) -> bool | None:
    """True: ours now; False: somebody else's; None: this file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return True


def _is_current(descriptor: int, path: Path) -> bool:
    """Whether the locked file is still the one at `path`: the build before may have removed the folder."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def is_held(folder: Path) -> bool:
    """Whether a build on a host whose locks we see drives this work folder now."""
    try:
        descriptor = os.open(folder / _OWNER, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return _lock(descriptor) is False
    finally:
        os.close(descriptor)


def _is_abandoned(folder: Path) -> bool:
    if (folder / _UNITS).exists() or (folder / _TMP).exists():
        return False  # units that the next build for its destination goes on with
    try:
        lock = os.open(folder / _OWNER, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return _is_old_and_empty(folder)
    except PermissionError:  # another user's
        return False
    try:
        owner = json.loads(os.read(lock, 2**16) or b"{}") if _lock(lock) else {}
    except json.JSONDecodeError:
        return False
    finally:
        os.close(lock)
    return bool(owner.get("host") == socket.gethostname())


def _is_old_and_empty(folder: Path) -> bool:
    """Killed between making the folder and its owner file."""
    return not any(folder.iterdir()) and time.time() - folder.stat().st_mtime > _EMPTY_AGE_S


def fsync_tree(folder: Path) -> None:
    """Make every file and folder below `folder` durable, and itself."""
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            fsync_dir(path)
        else:
            fsync_file(path)
    fsync_dir(folder)
