"""Check that a checkpoint folder is as committed. Every problem names its file."""

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath

from r1hpc.base.errors import StateError
from r1hpc.base.files import check_owned, opened
from r1hpc.base.names import printable
from r1hpc.base.units import format_bytes
from r1hpc.checkpoint.disk import patiently, walk
from r1hpc.checkpoint.manifest import (
    MANIFEST_NAME,
    Checkpoint,
    FileRecord,
    digest_fd,
    encode,
    read_checkpoint,
)

# xxhash and read(2) release the interpreter lock; a parallel file system answers several readers faster.
NUM_THREADS = min(4, os.cpu_count() or 1)
Fingerprint = tuple[tuple[str, int, int, int, int], ...]


def find_problems(
    checkpoint: Checkpoint, names: Iterable[str] | None = None, read: Callable[[], object] = lambda: None
) -> list[str]:
    """Return all problems of a checkpoint, or of the files `names` in it; empty if it is good.

    Only the full check, names=None, finds files missing from the manifest.
    """
    try:
        # Compared as bytes: a NaN in `meta` is not equal to itself.
        if encode(read_checkpoint(checkpoint.path).manifest) != encode(checkpoint.manifest):
            return [f"{checkpoint.path / MANIFEST_NAME} has changed since it was read"]
        chosen = _chosen(checkpoint, names)
        problems = patiently(lambda: list(_layout_problems(checkpoint, None if names is None else chosen)))
    except StateError as error:
        return [str(error)]
    except OSError as error:
        return [_unreadable(checkpoint, error)]
    if problems:
        return problems
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for problem in pool.map(partial(_content_problem, checkpoint.path), chosen):
            read()
            if problem:
                problems.append(problem)
    return problems


def _digest(path: Path) -> tuple[int, str]:
    with opened(path, os.O_RDONLY | os.O_NOFOLLOW) as fd:
        return digest_fd(fd)


def find_layout_problems(checkpoint: Checkpoint) -> list[str]:
    """Return the problems found without reading: missing, extra, wrong size, links, owners and modes."""
    try:
        return patiently(lambda: list(_layout_problems(checkpoint, None)))
    except OSError as error:
        return [_unreadable(checkpoint, error)]


def fingerprint(folder: Path) -> Fingerprint | None:
    """Return a value that changes if a file below `folder` is written, replaced, renamed, added or removed.

    A user cannot set ctime back, so this shows "as when it was verified" without reading the bytes. It misses
    silent disk corruption; a load finds that, because it verifies in full. None if the folder cannot be
    listed.
    """
    try:
        return tuple(sorted((n, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for n, s in walk(folder)))
    except OSError:
        return None


def _unreadable(checkpoint: Checkpoint, error: OSError) -> str:
    return f"{os.fsdecode(error.filename or checkpoint.path)} cannot be read: {error.strerror}"


def _chosen(checkpoint: Checkpoint, names: Iterable[str] | None) -> list[FileRecord]:
    records = {record.name: record for record in checkpoint.manifest.files}
    if names is None:
        return list(records.values())
    chosen = list(names)
    for name in chosen:
        if name not in records:
            raise StateError(f"{checkpoint.path / name} is not in the manifest")
    return [records[name] for name in chosen]


def _layout_problems(checkpoint: Checkpoint, only: list[FileRecord] | None) -> Iterator[str]:
    """Yield files that are missing, unexpected, of the wrong size or unsafe; reads no content."""
    records = {record.name: record for record in (checkpoint.manifest.files if only is None else only)}
    found = dict(walk(checkpoint.path)) if only is None else _lstat_each(checkpoint.path, records)
    for name, status in sorted(found.items()):
        path = checkpoint.path / name
        try:
            check_owned(path)
        except StateError as error:
            yield str(error)
            continue
        if stat.S_ISDIR(status.st_mode) or name == MANIFEST_NAME:
            continue
        if not stat.S_ISREG(status.st_mode):
            yield f"{path} is not a plain file"
        elif name not in records:
            yield f"{checkpoint.path / printable(name)} is an unexpected extra file, not in the manifest"
        elif status.st_size != records[name].size:
            yield f"{path} {_size_problem(records[name], status.st_size)}"
    yield from (f"{checkpoint.path / name} is missing" for name in sorted(records.keys() - found.keys()))


def _lstat_each(folder: Path, names: Iterable[str]) -> dict[str, os.stat_result]:
    """Return lstat of the files `names` and of the folders between, as far as they exist."""
    wanted = {str(part) for name in names for part in (PurePosixPath(name), *PurePosixPath(name).parents)}
    found = {}
    for name in wanted - {"."}:
        path = folder / name
        if os.path.lexists(path):
            found[name] = path.lstat()
    return found


def _size_problem(record: FileRecord, size: int) -> str:
    kind = "truncated" if size < record.size else "too long"
    return f"is {kind}: {size} bytes ({format_bytes(size)}), the manifest says {record.size}"


def _content_problem(folder: Path, record: FileRecord) -> str | None:
    path = folder / record.name
    try:
        size, digest = patiently(partial(_digest, path))
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    if size != record.size:
        return f"{path} {_size_problem(record, size)}"
    if digest != record.digest:
        return f"{path} is corrupt: its digest is {digest}, the manifest says {record.digest}"
    return None
