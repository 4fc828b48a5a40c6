"""Check the folder for runs: room, speed, and the file operations that checkpoints rely on.

facts = collect_storage(Path("/scratch/me/runs"))     # writes 64 MiB and removes them
judge_storage(facts, needed_bytes=2**40)
"""

import errno
import fcntl
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from r1hpc.base.units import GIB, format_bytes, format_duration
from r1hpc.preflight.findings import SiteFinding, fail, ok, unknown, warn

_MIB = 2**20
_WRITE_BYTES = 64 * _MIB
_BLOCK_BYTES = 4 * _MIB
_LONGEST_WRITE_S = 10.0
_LEAST_FREE_BYTES = GIB
_LEAST_FREE_FILES = 10_000
_SLOW_BYTES_S = 100 * _MIB
_CLOCK_TOLERANCE_S = 2.0


@dataclass(frozen=True)
class StorageFacts:
    """Facts about `path`. None: not checked, or it has no such property."""

    path: str
    error: str | None = None
    """Why nothing could be written there."""
    free_bytes: int | None = None
    free_files: int | None = None
    written_bytes: int = 0
    write_s: float | None = None
    """For `written_bytes`, fsync included."""
    write_error: str | None = None
    locks: str | None = None
    """None: flock works; else how it fails."""
    rename: str | None = None
    """None: rename works as the commit of a checkpoint needs; else how it fails."""
    clock_offset_s: float | None = None
    """The file server's clock against this machine's."""
    over_quota: str | None = None
    """Output of `quota -q`: every file system on which the user exceeds the quota."""
    file_system: tuple[str, ...] = ()
    """The device and the mount point of the run root."""

    @property
    def is_over_quota(self) -> bool:
        return not {*self.file_system}.isdisjoint((self.over_quota or "").split())


def collect_storage(root: Path) -> StorageFacts:
    """Probe `root` in a temporary folder inside it. Takes at most some 10 s."""
    folder = root / f".doctor-{secrets.token_hex(4)}"
    try:
        folder.mkdir(mode=0o700, parents=True)
    except OSError as error:
        return StorageFacts(str(root), error=_words(error))
    try:
        space = os.statvfs(folder)
        written, seconds, write_error = _timed_write(folder / "bandwidth", _WRITE_BYTES)
        return StorageFacts(
            path=str(root),
            free_bytes=space.f_bavail * space.f_frsize,
            free_files=space.f_favail if space.f_files else None,
            written_bytes=written,
            write_s=seconds,
            write_error=write_error,
            locks=_tried(_how_locks_fail, folder),
            rename=_tried(_how_rename_fails, folder),
            clock_offset_s=_clock_offset(folder),
            over_quota=_over_quota(),
            file_system=_file_system_of(folder),
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def judge_storage(facts: StorageFacts, needed_bytes: int | None = None) -> list[SiteFinding]:
    """Judge room, speed, locks, rename and clock of a run root.

    Args:
        needed_bytes: size of a run's checkpoints there; None: unknown.
    """
    if facts.error is not None:
        fix = "choose a folder that you may write, on a file system that all nodes share: --run-root DIR"
        return [fail("run root", f"{facts.path}: {facts.error}", fix)]
    return [
        _judge_room(facts, needed_bytes),
        *_judge_other_quota(facts),
        _judge_speed(facts, needed_bytes),
        _judge_locks(facts),
        _judge_rename(facts),
        *_judge_clock(facts),
    ]


def _judge_room(facts: StorageFacts, needed: int | None) -> SiteFinding:
    fix = "remove old runs, ask for quota, or take another file system: --run-root DIR"
    if facts.write_error is not None:
        return fail("run root space", f"{facts.path}: {facts.write_error}", fix)
    if facts.is_over_quota:
        return fail("run root space", f"over quota: {facts.over_quota}", fix)
    free = facts.free_bytes or 0
    detail = f"{format_bytes(free)} free under {facts.path}"
    if needed is not None:
        detail += f"; checkpoints of this run take {format_bytes(needed)}"
    if free < max(_LEAST_FREE_BYTES, needed or 0):
        return fail("run root space", detail, fix)
    if facts.free_files is not None and facts.free_files < _LEAST_FREE_FILES:
        return fail("run root space", f"only {facts.free_files} more files fit under {facts.path}", fix)
    return ok("run root space", detail)


def _judge_other_quota(facts: StorageFacts) -> list[SiteFinding]:
    if not facts.over_quota or facts.is_over_quota:
        return []
    fix = "remove files there: it does not hold the run root, but a home folder has caches and settings"
    return [warn("quota", f"over quota, not under {facts.path}: {facts.over_quota}", fix)]


def _judge_speed(facts: StorageFacts, needed: int | None) -> SiteFinding:
    if not facts.write_s or not facts.written_bytes:
        return unknown("run root speed", "nothing could be written, so nothing was timed")
    rate = facts.written_bytes / facts.write_s
    detail = (
        f"{format_bytes(rate)}/s for {format_bytes(facts.written_bytes)}, fsync included, from one process"
    )
    if rate < _SLOW_BYTES_S:
        seconds = format_duration(10 * GIB / rate)
        fix = f"take the cluster's parallel file system: 10 GiB take {seconds} here, more than a grace time"
        return warn("run root speed", detail, fix)
    return ok("run root speed", f"{detail}; as checkpoint.assumed_bandwidth_gib_s: {rate / GIB:.2g}")


def _judge_locks(facts: StorageFacts) -> SiteFinding:
    if facts.locks is not None:
        fix = "mount it with locks (Lustre: -o flock; NFS: without nolock), or take another file system"
        return fail("file locks", f"{facts.path}: {facts.locks}", fix)
    return ok("file locks", "flock holds")


def _judge_rename(facts: StorageFacts) -> SiteFinding:
    if facts.rename is not None:
        fix = "checkpoints are committed by rename: take a POSIX file system, not an object store's mount"
        return fail("atomic rename", f"{facts.path}: {facts.rename}", fix)
    return ok("atomic rename", "rename replaces files, and refuses a folder that is not empty")


def _judge_clock(facts: StorageFacts) -> list[SiteFinding]:
    offset = facts.clock_offset_s
    if offset is None:
        return []
    if abs(offset) > _CLOCK_TOLERANCE_S:
        detail = f"the file server's clock is {offset:+.1f} s from this machine's"
        fix = "ask the administrators for NTP (chronyc tracking) on both"
        return [warn("file server clock", detail, fix)]
    return [ok("file server clock", f"within {_CLOCK_TOLERANCE_S:g} s of this machine's")]


def _timed_write(path: Path, count: int) -> tuple[int, float | None, str | None]:
    """Return (bytes written, seconds with fsync, error). Random bytes: a file system may compress."""
    block, written = os.urandom(_BLOCK_BYTES), 0
    began = time.perf_counter()
    try:
        with path.open("wb", buffering=0) as file:
            while written < count and time.perf_counter() - began < _LONGEST_WRITE_S:
                written += file.write(block[: count - written])
            os.fsync(file.fileno())
    except OSError as error:
        return written, None, _words(error)
    return written, time.perf_counter() - began, None


def _how_locks_fail(folder: Path) -> str | None:
    path = folder / "lock"
    with path.open("w") as held, path.open("w") as other:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return f"flock fails: {_words(error)}"
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        return "two holders of one flock at once"


def _how_rename_fails(folder: Path) -> str | None:
    """Test what checkpoint/commit.py and checkpoint/fence.py rely on; return what fails."""
    old, new = folder / "old", folder / "new"
    old.write_text("old")
    new.write_text("new")
    new.replace(old)
    if old.read_text() != "new" or new.exists():
        return "a rename over a file does not replace it"
    staged, final = folder / "staged", folder / "final"
    for each in (staged, final):
        each.mkdir()
        (each / "file").touch()
    try:
        staged.rename(final)
    except OSError as error:
        return (
            None if error.errno in (errno.ENOTEMPTY, errno.EEXIST) else f"rename of a folder: {_words(error)}"
        )
    return "a folder is renamed over another that is not empty"


def _tried(probe: Callable[[Path], str | None], folder: Path) -> str | None:
    try:
        return probe(folder)
    except OSError as error:
        # The timed write reports a full disk; it is no fault of locks or of rename.
        return None if error.errno in (errno.ENOSPC, errno.EDQUOT) else _words(error)


def _clock_offset(folder: Path) -> float | None:
    """Return how far the file server's clock is ahead. A server stamps mtime by it, a local disk by ours."""
    try:
        before = time.time()
        path = folder / "clock"
        path.write_bytes(b"")
        return path.stat().st_mtime - (before + time.time()) / 2
    except OSError:
        return None


def _over_quota() -> str | None:
    """Return the output of `quota -q`: only exceeded quotas; None if empty or without that command."""
    try:
        done = subprocess.run(
            ["quota", "-q"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return " ".join(done.stdout.split()) or None


def _file_system_of(folder: Path) -> tuple[str, ...]:
    """Return (device, mount point) of the innermost mount; of several at one place the last is visible."""
    try:
        lines = Path("/proc/self/mounts").read_text(errors="replace").splitlines()
    except OSError:
        return ()
    where = folder.resolve()
    around = [(device, point) for device, point, *_ in map(str.split, lines) if where.is_relative_to(point)]
    return max(reversed(around), key=lambda pair: len(pair[1]), default=())


def _words(error: OSError) -> str:
    return error.strerror or str(error)
