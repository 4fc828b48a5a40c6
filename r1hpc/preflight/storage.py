"""Check the run root: room, speed and locks."""

import errno
import fcntl
import os
import secrets
import shutil
import time
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


def collect_storage(root: Path) -> StorageFacts:
    """Probe `root` in a temporary folder inside it. Takes at most some 10 s."""
    folder = root / f".doctor-{secrets.token_hex(4)}"
    try:
        folder.mkdir(mode=0o700, parents=True)
    except OSError as error:
        return StorageFacts(str(root), error=_words(error))
    try:
        space = os.statvfs(folder)
        written, seconds, write_error = _timed_write(folder / "bandwidth")
        return StorageFacts(
            path=str(root),
            free_bytes=space.f_bavail * space.f_frsize,
            free_files=space.f_favail if space.f_files else None,
            written_bytes=written,
            write_s=seconds,
            write_error=write_error,
            locks=_how_locks_fail(folder),
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def judge_storage(facts: StorageFacts, needed_bytes: int | None = None) -> list[SiteFinding]:
    """Judge room, speed and locks of a run root. A run's checkpoints there take `needed_bytes`, if known."""
    if facts.error is not None:
        fix = "choose a folder that you may write, on a file system that all nodes share: --run-root DIR"
        return [fail("run root", f"{facts.path}: {facts.error}", fix)]
    locks = ok("file locks", "flock holds")
    if facts.locks is not None:
        fix = "mount it with locks (Lustre: -o flock; NFS: without nolock), or take another file system"
        locks = fail("file locks", f"{facts.path}: {facts.locks}", fix)
    return [_judge_room(facts, needed_bytes), _judge_speed(facts), locks]


def _judge_room(facts: StorageFacts, needed: int | None) -> SiteFinding:
    fix = "remove old runs, ask for quota, or take another file system: --run-root DIR"
    if facts.write_error is not None:
        return fail("run root space", f"{facts.path}: {facts.write_error}", fix)
    free = facts.free_bytes or 0
    detail = f"{format_bytes(free)} free under {facts.path}"
    if needed is not None:
        detail += f"; checkpoints of this run take {format_bytes(needed)}"
    if free < max(_LEAST_FREE_BYTES, needed or 0):
        return fail("run root space", detail, fix)
    if facts.free_files is not None and facts.free_files < _LEAST_FREE_FILES:
        return fail("run root space", f"only {facts.free_files} more files fit under {facts.path}", fix)
    return ok("run root space", detail)


def _judge_speed(facts: StorageFacts) -> SiteFinding:
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


def _timed_write(path: Path) -> tuple[int, float | None, str | None]:
    """Return (bytes written, seconds with fsync, error). Random bytes: a file system may compress."""
    block, written = os.urandom(_BLOCK_BYTES), 0
    began = time.perf_counter()
    try:
        with path.open("wb", buffering=0) as file:
            while written < _WRITE_BYTES and time.perf_counter() - began < _LONGEST_WRITE_S:
                written += file.write(block[: _WRITE_BYTES - written])
            os.fsync(file.fileno())
    except OSError as error:
        return written, None, _words(error)
    return written, time.perf_counter() - began, None


def _how_locks_fail(folder: Path) -> str | None:
    try:
        with (folder / "lock").open("w") as held, (folder / "lock").open("w") as other:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
            return "two holders of one flock at once"
    except OSError as error:
        # The timed write reports a full disk; it is no fault of locks.
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return None if full else f"flock fails: {_words(error)}"


def _words(error: OSError) -> str:
    return error.strerror or str(error)
