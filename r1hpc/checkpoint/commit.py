"""Seal the files of a folder, and turn the folder into a checkpoint by one rename(2).

CheckpointStore (store.py) calls it:

each file private, digested and synced -> no file forgotten -> manifest written and synced -> folders synced
-> [other checkpoint of this step moved out] -> staging folder renamed to step-<n>  (from here on it exists)
-> parent synced -> LATEST
"""

import errno
import logging
import os
import stat
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path, PurePosixPath

from r1hpc.base.files import fsync_dir, opened
from r1hpc.checkpoint import fence
from r1hpc.checkpoint.disk import (
    CheckpointWriteError,
    at,
    discard,
    make_private,
    move_to_trash,
    remove_tree,
    walk,
    write_new,
)
from r1hpc.checkpoint.manifest import MANIFEST_NAME, Checkpoint, FileRecord, decode, digest_fd, examine
from r1hpc.checkpoint.verification import find_problems

LATEST = "LATEST"
_SMALL_BYTES = 2**18
_log = logging.getLogger(__name__)


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


def _seal_file(staging: Path, name: str, pool: ThreadPoolExecutor) -> FileRecord:
    with at("seal.open"):
        fd = os.open(staging / name, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        status = os.fstat(fd)
        if stat.S_IMODE(status.st_mode) != 0o600:  # a change would cost a commit of the disk's journal
            os.fchmod(fd, 0o600)
        if status.st_size <= _SMALL_BYTES:  # no thread is worth it
            _fsync(fd)
            with at("seal.digest"):
                return FileRecord(name, *digest_fd(fd))
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


def commit_folder(root: Path, staging: Path, records: list[FileRecord], raw: bytes) -> Checkpoint:
    """Make `staging`, sealed as `records`, the checkpoint with manifest `raw`.

    A good checkpoint of the same step and attempt is kept and returned instead. One of another attempt is
    replaced: the newest attempt's state wins. Raise CheckpointWriteError if the folder does not match the
    manifest; nothing outside it changed. Raise OSError from the file system; the store is as before.
    """
    target = root / staging.name
    with at("commit.check"):
        folders = _check_sealed(staging, records)
    write_new(staging / MANIFEST_NAME, raw, staging / f".{MANIFEST_NAME}.tmp", "commit.manifest")
    for folder in folders:
        with at("commit.fsync_staging"):
            make_private(folder)
    manifest = decode(raw, target / MANIFEST_NAME)
    kept = _good_one(target, manifest.attempt)
    fence.check(staging.parent)
    if kept:
        with at("commit.fsync_kept"):
            fsync_dir(root)
        # Fails if this incarnation is superseded, like the rename of a new checkpoint.
        dropped = move_to_trash(staging, staging.parent, "commit.drop")
        if dropped:
            remove_tree(dropped, "commit.drop")
        return kept
    replaced = _move_out(target, staging.parent)
    try:
        _publish(staging, target, raw)
    except OSError:
        if replaced:
            replaced.rename(target)
        raise
    if replaced:
        with suppress(OSError):  # the checkpoint exists; the next begin removes the rest of the other
            discard(replaced, staging.parent, "commit.discard_replaced")
    return Checkpoint(manifest.step, target, manifest)


def point_latest(root: Path, target: Path, own: Path) -> None:
    """Write the hint LATEST. The checkpoint exists whether or not this works."""
    try:
        # Through the incarnation's own folder, so that a superseded one cannot set the hint back.
        write_new(root / LATEST, f"{target.name}\n".encode(), own / f".{LATEST}.tmp", "commit.latest")
    except OSError as error:
        _log.warning("%s not updated: %s", root / LATEST, error.strerror)


def _check_sealed(staging: Path, records: Iterable[FileRecord]) -> list[Path]:
    """Return all folders of `staging`, deepest first; check that each file is in one record, at its size.

    Raise CheckpointWriteError with the name of the file.
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
        with opened(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK) as fd:
            status = os.fstat(fd)
    except OSError as error:
        if error.errno == errno.ELOOP:
            return -1
        raise
    return status.st_size if stat.S_ISREG(status.st_mode) else -1


def _good_one(target: Path, attempt: int) -> Checkpoint | None:
    if not os.path.lexists(target):
        return None
    checkpoint = examine(target).checkpoint
    ours = checkpoint is not None and checkpoint.manifest.attempt == attempt
    return checkpoint if checkpoint and ours and not find_problems(checkpoint) else None


def _move_out(target: Path, own: Path) -> Path | None:
    """Move a bad or another attempt's checkpoint of this step out of the way; None if there is none.

    It goes into the incarnation's own folder, so that a superseded process cannot do this. After a kill
    before the next rename the step has no checkpoint until `begin` puts it back.
    """
    if not os.path.lexists(target):
        return None
    replaced = own / f"{fence.REPLACED_PREFIX}{target.name}"
    discard(replaced, own, "commit.discard_replaced")
    try:
        with at("commit.replace"):
            target.rename(replaced)
    except OSError:
        # It may have succeeded all the same, see _was_renamed; the store must be as before.
        if not os.path.lexists(target):
            with suppress(OSError):
                replaced.rename(target)
        raise
    return replaced


def _publish(staging: Path, target: Path, raw: bytes) -> None:
    try:
        with at("commit.rename"):
            staging.rename(target)
    except OSError:
        if not _was_renamed(staging, target, raw):
            raise
    try:
        with at("commit.fsync_root"):
            fsync_dir(target.parent)
    except OSError:
        # The new name may not survive a power loss, so it does not count.
        with suppress(OSError):
            move_to_trash(target, staging.parent, "commit.withdraw")
        raise


def _was_renamed(staging: Path, target: Path, raw: bytes) -> bool:
    """True if a rename that reported an error happened all the same.

    NFS answers ENOENT to a completed rename if its first answer was lost.
    """
    try:
        return not staging.exists() and (target / MANIFEST_NAME).read_bytes() == raw
    except OSError:
        return False
