"""Let one process in at a time with a lock on a file; the kernel frees it when the holder dies.

with held(path, "r1", "a submission"):     # an error that names the holder if another has it
    ...
fd = hold(path, "job 7", wait_s=45)        # the same by hand; None: another process has it

On a file system without locks (some Lustre mounts) every caller gets the lock; `doctor` warns of it.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from r1hpc.base.errors import UsageError
from r1hpc.base.files import opened, parse_object

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_POLL_S = 0.2


@contextlib.contextmanager
def held(path: Path, name: str, role: str) -> Iterator[int]:
    """Hold the lock on `name` as `role`; yield the descriptor, which a child process may inherit and keep.

    Raise UsageError if another process holds it; the message says which.
    """
    fd = hold(path, role)
    if fd is None:
        raise UsageError(f"{name} is locked: {holder(path)} holds {path}")
    try:
        yield fd
    finally:
        os.close(fd)  # the lock lives on if a child has inherited the descriptor


def hold(path: Path, role: str, wait_s: float = 0.0) -> int | None:
    """Take the lock and keep it until the descriptor is closed; None if it is not free within `wait_s`."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if not lock_within(fd, wait_s):
            os.close(fd)
            return None
        write_holder(fd, role)
    except OSError:
        os.close(fd)
        raise
    return fd


def lock_within(fd: int, wait_s: float) -> bool:
    """Lock an open file; False if it is not free within `wait_s`."""
    deadline = time.monotonic() + wait_s
    while not _lock(fd):
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_S)
    return True


def is_free(path: Path) -> bool:
    try:
        with opened(path, os.O_RDWR) as fd:
            return _lock(fd)
    except FileNotFoundError:
        return True


def write_holder(fd: int, role: str, pid: int | None = None) -> None:
    record = json.dumps({"role": role, "pid": pid or os.getpid(), "host": socket.gethostname()}).encode()
    os.pwrite(fd, record.ljust(256), 0)


def holder(path: Path) -> str:
    """Describe the lock's holder for a message."""
    record = read_holder(path)
    if not {"role", "pid", "host"} <= record.keys():
        return "another process"
    return f"{record['role']}, process {record['pid']} on {record['host']},"


def read_holder(path: Path) -> dict[str, Any]:
    """Return role, pid and host of the last holder from the lock file; {} if it is torn."""
    with contextlib.suppress(OSError):
        return parse_object(path.read_bytes()) or {}
    return {}


def _lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True
