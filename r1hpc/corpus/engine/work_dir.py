"""Manage the work folder of a build: units of work, each published by one rename, and a lock.

    with open_work(Path("data/web")) as work:
        path = publish_unit(work.folder, "clean", key, write)       # does nothing if the unit is done
        ...
        publish(content, work.destination)                          # the dataset under its own name
    read_progress(Path("data/web"))                                 # how far the build is

    .staging-<name of the destination>/
        owner.json                      who builds: host, process, destination; locked while they live
        stages.json                     the units of each stage, for `shard status`
        units/<stage>/<key>/done.json   a finished unit: what it made, from what
        tmp/<uuid>/                     files being written

The single holder of the lock clears tmp/ and publishes; jobs that each make a share of the units
(`join_work`) share it.

A unit's key is the digest of its input, its settings and the code (see units.py), so an existing unit is
right whoever made it, on any node. A kill leaves finished units; the next build for the destination continues
with them and removes the folder at the end. The lock only avoids double work: without locks (Lustre without
-o flock), two builds at once publish the same units and one dataset. A build whose files another build
cleared raises an error and publishes nothing.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
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
from r1hpc.base.files import fsync_dir, fsync_file, read_json, write_atomic
from r1hpc.data.format.errors import ClearedError, DatasetMissingError
from r1hpc.data.format.manifest import MANIFEST, read_manifest

DONE = "done.json"
STAGES = "stages.json"
_PREFIX = ".staging-"
_OWNER = "owner.json"
_UNITS = "units"
_TMP = "tmp"
_WRITING = ".writing"
_POLL_S = 0.1
Report = Callable[[str], None]
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


@dataclass(frozen=True)
class Work:
    """An open work folder and its destination."""

    folder: Path
    destination: Path

    def write_stages(self, stages: dict[str, list[list[Any]]]) -> None:
        """Record the units of each stage as [key, input bytes]."""
        write_atomic(self.folder / STAGES, json.dumps(stages), mode=0o644)


def destination_of(out: Path) -> Path:
    """Return the full path of --out; for a link its target, as a rename would not replace the link.

    Raise UsageError for an address such as s3://bucket/x, which would become a local folder `s3:`.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(out)):  # Path has made one slash of two
        raise UsageError(f"--out {out} is an address, not a folder: build into a folder, then copy it there")
    return out.resolve() if out.is_symlink() else out.absolute()


def work_folder(destination: Path) -> Path:
    """Return the work folder of a destination: beside it, hidden."""
    return destination.parent / f"{_PREFIX}{destination.name}"


@contextlib.contextmanager
def open_work(destination: Path, report: Report | None = None) -> Iterator[Work]:
    """Create or take over the work folder of a destination; wait while another build holds it.

    It is removed at the end, unless the next build can use finished units. `report` is called once with the
    build it waits for.
    """
    folder = work_folder(destination)
    lock, is_alone = _acquire(folder, destination, fcntl.LOCK_EX, report)
    try:
        if is_alone:
            shutil.rmtree(folder / _TMP, ignore_errors=True)  # half-written by a dead process
        (folder / _TMP).mkdir(exist_ok=True)
        yield Work(folder, destination)
    finally:
        is_built = (destination / MANIFEST).is_file()  # not exists(): an empty folder may be there
        if is_built or (is_alone and not any((folder / _UNITS).glob(f"*/*/{DONE}"))):
            shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


@contextlib.contextmanager
def join_work(destination: Path, report: Report | None = None) -> Iterator[Work]:
    """Open the work folder for one of several jobs that make units at once; it stays at the end."""
    folder = work_folder(destination)
    lock, _ = _acquire(folder, destination, fcntl.LOCK_SH, report)
    try:
        yield Work(folder, destination)
    finally:
        os.close(lock)


def unit_folder(folder: Path, stage: str, key: str) -> Path:
    """Return the folder of a unit below a work folder; it is there when the unit is finished."""
    return folder / _UNITS / stage / key


def find_unit(folder: Path, stage: str, key: str) -> Path | None:
    """Return the folder of a finished unit whose files all exist with their sizes, else None."""
    path = unit_folder(folder, stage, key)
    try:
        files = json.loads((path / DONE).read_text())["files"]
        whole = all((path / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return path if whole else None


def unit_record(path: Path) -> dict[str, Any]:
    """Return the record of a finished unit."""
    record: dict[str, Any] = json.loads((path / DONE).read_text())["record"]
    return record


def publish_unit(folder: Path, stage: str, key: str, write: Callable[[Path], dict[str, Any]]) -> Path:
    """Return the finished unit, made now if missing: `write` fills a folder and returns its record.

    It is durable before it gets its name, so units found after a power cut are complete.
    """
    found = find_unit(folder, stage, key)
    if found is not None:
        return found
    private = new_folder(folder)
    before = time.process_time()
    try:
        record = write(private)
    except FileNotFoundError:
        _check_private(private)
        raise
    cpu_s = time.process_time() - before
    files = {p.relative_to(private).as_posix(): p.stat().st_size for p in private.rglob("*") if p.is_file()}
    files.pop(_WRITING, None)
    done = {"stage": stage, "key": key, "record": record, "files": files, "cpu_s": cpu_s}
    done["peak_memory_bytes"] = _peak_memory()
    (private / DONE).write_text(json.dumps(done))
    failpoint("data.unit.publish")
    target = unit_folder(folder, stage, key)
    target.parent.mkdir(parents=True, exist_ok=True)
    if not publish(private, target):
        if find_unit(folder, stage, key) is None:  # damaged since: move it away
            target.rename(private.with_name(uuid.uuid4().hex))
            private.rename(target)
            fsync_dir(target.parent)
        else:  # another worker was first, with the same bytes
            shutil.rmtree(private, ignore_errors=True)
    return target


def new_folder(folder: Path) -> Path:
    """Return a new folder below tmp/ of a work folder, with a mark, which clearing tmp/ removes."""
    private = folder / _TMP / uuid.uuid4().hex
    private.mkdir(parents=True)
    (private / _WRITING).touch()
    return private


def _check_private(folder: Path) -> None:
    """Raise ClearedError for a folder another build cleared: files written since are only a part."""
    if not (folder / _WRITING).is_file():
        raise ClearedError(
            f"another build of this dataset cleared {folder} while it was written (a driver that was started "
            "again, or hosts that do not see one another's locks): what is done is kept, build again"
        )


def _peak_memory() -> int:
    """Return the most memory this process has held so far; 0 without /proc.

    getrusage does not work: there a child starts with its parent's maximum.
    """
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    return 0


def publish(content: Path, target: Path) -> bool:
    """Make a complete folder durable, then give it its name. False if another build was first.

    Raise ClearedError if another build cleared it while it was written.
    """
    fsync_tree(content)
    _check_private(content)
    (content / _WRITING).unlink()
    fsync_dir(content)
    try:
        content.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        return False
    fsync_dir(target.parent)
    return True


def link_tree(source: Path, target: Path) -> None:
    """Hard-link the files of `source` below `target`, or copy them if the file system has no links."""
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
    """Remove the work folder of an existing dataset, whose build was killed just before its last step."""
    folder = work_folder(destination)
    if folder.is_dir() and not is_held(folder):
        shutil.rmtree(folder, ignore_errors=True)


def _acquire(folder: Path, destination: Path, how: int, report: Report | None) -> tuple[int, bool]:
    """Return an open descriptor of owner.json, and whether it is locked: not every file system can."""
    is_waiting = False
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"{destination.parent} is not a folder; choose another --out") from None
    while True:
        folder.mkdir(exist_ok=True)
        try:
            lock = os.open(folder / _OWNER, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:  # the previous build removed it meanwhile
            continue
        locked = _lock(lock, how)
        if locked is not False and _is_current(lock, folder / _OWNER):
            break
        os.close(lock)
        if report is not None and locked is False and not is_waiting:
            report(f"waiting for {_owner_said(folder)}, which builds {destination}")
            is_waiting = True
        time.sleep(_POLL_S)
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "destination": str(destination)}
    os.ftruncate(lock, 0)
    os.pwrite(lock, json.dumps(owner).encode() + b"\n", 0)
    return lock, bool(locked)


def _owner_said(folder: Path) -> str:
    try:
        owner = json.loads((folder / _OWNER).read_text())
        return f"process {owner['pid']} on {owner['host']}"
    except (OSError, ValueError, KeyError, TypeError):  # not written yet
        return "another process"


def _lock(descriptor: int, how: int = fcntl.LOCK_EX) -> bool | None:
    """Return True if locked now; False if another process holds it; None if the file system has no locks."""
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return True


def _is_current(descriptor: int, path: Path) -> bool:
    """True if the locked file is still the one at `path`: an earlier build may have removed the folder."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def is_held(folder: Path) -> bool:
    """True if a build on a host whose locks are visible holds this work folder now."""
    try:
        descriptor = os.open(folder / _OWNER, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return _lock(descriptor) is False
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Make `folder` and every file and folder below it durable."""
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            fsync_dir(path)
        else:
            fsync_file(path)
    fsync_dir(folder)


def read_progress(out: Path) -> dict[str, Any]:
    """Return the state of the build for `out`: units, CPU seconds, memory, rate and time left per stage.

    The state is `done`, `building`, `stopped` (no visible lock) or `none`. Rates are the input bytes of units
    over the time in which they were finished.
    """
    folder = work_folder(destination_of(out))
    if (folder / STAGES).is_file():
        state = "building" if is_held(folder) else "stopped"
        stages = [_stage(folder, name, units) for name, units in read_json(folder / STAGES).items()]
        return {"state": state, "path": str(out), "work": str(folder), "stages": stages}
    try:
        manifest = read_manifest(out)
    except DatasetMissingError:
        return {"state": "none", "path": str(out), "stages": []}
    return {"state": "done", "path": str(out), "id": manifest.id, "stages": []}


def _stage(folder: Path, name: str, units: list[list[Any]]) -> dict[str, Any]:
    times, done_bytes, cpu_s, memory = [], 0, 0.0, 0
    for key, num_bytes in units:
        record = unit_folder(folder, name, key) / DONE
        if key and record.is_file():
            times.append(record.stat().st_mtime)
            done_bytes += num_bytes
            found = read_json(record)
            cpu_s += found.get("cpu_s", 0.0)
            memory = max(memory, found.get("peak_memory_bytes", 0))
    span = max(times) - min(times) if len(times) > 1 else 0.0
    # The span excludes the first unit's time, so the rate excludes its bytes.
    rate = done_bytes * (len(times) - 1) / len(times) / span if span > 0 else None
    left = sum(size for _, size in units) - done_bytes
    return {
        "stage": name,
        "units": len(units),
        "done": len(times),
        "cpu_s": cpu_s,
        "peak_memory_bytes": memory or None,
        "bytes_per_second": rate,
        "left_s": left / rate if rate and len(times) < len(units) else None,
        "last_done_s_ago": max(0.0, time.time() - max(times)) if times else None,
    }
