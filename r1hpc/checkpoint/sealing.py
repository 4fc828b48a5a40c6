"""Make staged files durable, private and digested, and check that none was forgotten."""

import errno
import os
import stat
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path, PurePosixPath

from r1hpc.checkpoint.disk import at, make_private, walk
from r1hpc.checkpoint.errors import CheckpointWriteError
from r1hpc.checkpoint.manifest import FileRecord, digest_fd


def seal_files(
    staging: Path, names: list[str], sealed: Callable[[], object] = lambda: None
) -> list[FileRecord]:
    """fsync, chmod 0600 and digest each file, then fsync and chmod 0700 the folders between.

    Each file is digested from the page cache while a thread waits for the disk, so the digest is almost free.
    On one local disk several files at once were no faster (benchmarks/checkpoint_seal.py); a parallel file
    system was not measured.
    """
    records = []
    with ThreadPoolExecutor(1) as pool:
        for name in names:
            records.append(_seal_file(staging, name, pool))
            sealed()
    for folder in sorted({parent for name in names for parent in PurePosixPath(name).parents}):
        with at("seal.fsync_dir"):
            make_private(staging / folder)
    return records


def check_sealed(staging: Path, records: Iterable[FileRecord]) -> list[Path]:
    """Return all folders of `staging`, deepest first; check that each file is in one record, at its size.

    Raises:
        CheckpointWriteError: naming the file.
    """
    found = {name: stat.S_ISDIR(status.st_mode) for name, status in walk(staging)}
    folders = [staging / name for name, is_folder in found.items() if is_folder]
    unclaimed = {name for name, is_folder in found.items() if not is_folder}
    for record in records:
        if record.name not in unclaimed:
            raise CheckpointWriteError(f"{staging / record.name} is missing or was sealed by two ranks")
        unclaimed.remove(record.name)
        size = _size(staging / record.name)
        if size != record.size:
            raise CheckpointWriteError(
                f"{staging / record.name} was sealed at {record.size} bytes and has {size} at the commit; "
                "finish writing it before seal()"
            )
    for name in unclaimed:
        raise CheckpointWriteError(f"{staging / name} was written but sealed by no rank")
    return sorted(folders, reverse=True) + [staging]


def _size(path: Path) -> int:
    """Return the size of a file that another node may have written; -1 if it is no plain file.

    Opened: an NFS client asks the server at every open. Otherwise it may answer for seconds from memory, from
    a listing made here while another node was still writing.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ELOOP:
            return -1
        raise
    try:
        status = os.fstat(fd)
    finally:
        os.close(fd)
    return status.st_size if stat.S_ISREG(status.st_mode) else -1


def _seal_file(staging: Path, name: str, pool: ThreadPoolExecutor) -> FileRecord:
    with at("seal.open"):
        fd = os.open(staging / name, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fchmod(fd, 0o600)
        syncing = pool.submit(_fsync, fd)
        try:
            with at("seal.digest"):
                size, digest = digest_fd(fd)
        finally:
            wait([syncing])
        syncing.result()
    finally:
        os.close(fd)
    return FileRecord(name, size, digest)


def _fsync(fd: int) -> None:
    with at("seal.fsync"):
        os.fsync(fd)
