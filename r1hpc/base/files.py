"""Read and write files that survive a kill at any moment: write beside, sync, rename.

    write_atomic(path, "text")          # whole old file or whole new file, never half
    append_record(path, {"step": 1})    # one line, one write; readers ignore a torn last line
    read_records(path, Begin)           # -> list of dicts of that shape; other lines are left out
    read_json(path, RunPlan)            # -> the value; StateError names the file and what is wrong

Every record of a run is read here, since its folder may contain anything: half a line, a pipe, text instead
of a number. A shape describes a valid record, see base.records.
"""

import contextlib
import errno
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, BinaryIO

from r1hpc.base.errors import StateError, UsageError
from r1hpc.base.records import mistake

COMPRESSED = (".gz", ".zst", ".bz2")
"""Name endings of the files that are unpacked while reading."""
_BATCH_LINES = 256


@contextlib.contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """Yield the descriptor of a file, and close it."""
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def fsync_dir(path: Path) -> None:
    """Make a folder's entries durable; fsync of a file does not cover its name."""
    fsync_file(path, os.O_DIRECTORY)


def fsync_file(path: Path, flags: int = 0) -> None:
    """Make the bytes of an existing file durable."""
    with opened(path, os.O_RDONLY | flags) as fd:
        os.fsync(fd)


def sync_file_system(folder: Path) -> None:
    """Write out what this node holds in memory of the folder's file system (syncfs(2))."""
    import ctypes

    with opened(folder) as fd:
        if ctypes.CDLL(None, use_errno=True).syncfs(fd):
            raise OSError(ctypes.get_errno(), "syncfs failed", str(folder))


def write_atomic(path: Path, content: str | bytes, mode: int = 0o600, durable: bool = True) -> None:
    """Replace `path` by `content`, durably if asked. Readers see the old file or the new one.

    A device, or a link to a pipe (/dev/null, /dev/stdout), is written into: root would replace it. A named
    pipe is replaced: a write would wait for a reader.
    """
    raw = content.encode() if isinstance(content, str) else content
    if path.exists() and not path.is_file() and (path.is_symlink() or not path.is_fifo()):
        path.write_bytes(raw)
        return
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(raw)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    if durable:
        fsync_dir(path.parent)


def write_json(path: Path, value: Any, mode: int = 0o600) -> None:
    """Write indented JSON with write_atomic."""
    write_atomic(path, json.dumps(value, indent=2) + "\n", mode)


def files_of_lines(folder: Path) -> list[Path]:
    """Return the folder's *.jsonl files by name, and those that exist only compressed; not in subfolders."""
    kinds = ("", *COMPRESSED)
    found = [file for kind in kinds for file in folder.glob(f"*.jsonl{kind}") if file.is_file()]
    return sorted(file for file in found if file.suffix == ".jsonl" or file.with_suffix("") not in found)


def matching(path: Path) -> list[Path]:
    """Return the file or folder itself, else the files that match a pattern in the path's last part
    (`train-*.parquet`), sorted by name. Raise UsageError if it is no pattern."""
    if path.exists():
        return [path]
    if not any(sign in path.name for sign in "*?["):
        return []
    try:
        return sorted(path.parent.glob(path.name))
    except ValueError as error:
        raise UsageError(f"{path} is no pattern of file names: {error}") from None


def open_plain(path: Path) -> BinaryIO:
    """Open a file for reading bytes; never block on a pipe.

    Raise FileNotFoundError if there is none, StateError for a folder, a pipe, a device, or a file that cannot
    be read.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path} is missing") from None
    except OSError as error:
        raise StateError(f"{path} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise StateError(f"{path} is not a plain file; remove it")
    return os.fdopen(fd, "rb")


def read_json(path: Path, shape: Any = Any) -> Any:
    """Return the value in a JSON file.

    Raise FileNotFoundError if there is none; StateError, which names the mistake, if it is not JSON or of
    another shape.
    """
    with open_plain(path) as file:
        raw = file.read()
    try:
        value = parse_json(raw)
    except ValueError as error:
        raise StateError(f"{path} is not valid JSON ({error}); restore or remove it") from None
    wrong = mistake(value, shape)
    if wrong is not None:
        raise StateError(f"{path}: {wrong}; restore or remove it")
    return value


def parse_json(raw: str | bytes) -> Any:
    """Parse JSON with json.loads, but raise ValueError for every failure, also for too deep nesting."""
    try:
        return json.loads(raw)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_object(path: Path, shape: Any = dict[str, Any]) -> dict[str, Any]:
    """Return the object in a JSON file; empty if the file is missing or holds something else."""
    try:
        value = read_json(path, shape)
    except (FileNotFoundError, StateError):
        return {}
    except OSError as error:
        if error.errno != errno.ESTALE:  # it was replaced meanwhile, on NFS
            raise
        return {}
    return value if isinstance(value, dict) else {}


def append_record(path: Path, record: dict[str, Any], durable: bool = True) -> None:
    """Append one JSON line in one write. Starts a new line first if a kill left a torn one."""
    line = json.dumps(record) + "\n"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        size = os.fstat(fd).st_size
        if size and os.pread(fd, 1, size - 1) != b"\n":
            line = "\n" + line
        raw = line.encode()
        while raw:
            raw = raw[os.write(fd, raw) :]
        if durable:
            os.fsync(fd)
    finally:
        os.close(fd)
    if durable and not size:
        fsync_dir(path.parent)


def read_records(path: Path, shape: Any = Any) -> list[dict[str, Any]]:
    """Return all complete JSON objects of that shape in a file of lines; empty if the file is missing.

    Raise StateError if it is no plain file, or cannot be read.
    """
    return list(iter_records(path, shape))


def iter_records(path: Path, shape: Any = Any) -> Iterator[dict[str, Any]]:
    """Stream what read_records lists."""
    try:
        file = open_plain(path)
    except FileNotFoundError:
        return
    with file:
        # A kill during an append can leave part of a line; the next append starts a new one.
        yield from (value for line in file if (value := parse_object(line, shape)) is not None)


def iter_objects(path: Path, offset: int = 0) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Yield (end offset, object) of each line from byte `offset` on, for many small records.

    Parses many lines at once, and line by line only around a torn one: half the time of iter_records. None:
    the line is no JSON object.
    """
    try:
        file = open_plain(path)
    except FileNotFoundError:
        return
    with file:
        file.seek(offset)
        written = _written_lines(file)
        while lines := list(islice(written, _BATCH_LINES)):
            ends = accumulate(map(len, lines), initial=offset)
            next(ends)
            yield from zip(ends, _parse_all(lines), strict=True)
            offset += sum(map(len, lines))


def _written_lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield lines up to one that is still being written: the file would return its rest as another line."""
    for line in file:
        yield line
        if not line.endswith(b"\n"):
            return


def _parse_all(lines: list[bytes]) -> list[dict[str, Any] | None]:
    try:
        values = json.loads(b"[" + b",".join(lines) + b"]")
        if isinstance(values, list) and len(values) == len(lines):
            return [value if isinstance(value, dict) else None for value in values]
    except (ValueError, RecursionError):
        pass
    return [parse_object(line) for line in lines]


def is_listed(path: Path) -> bool:
    """True if the folder's listing has this file name.

    NFS can remember for a minute that a name was missing, after another node has created it.
    """
    try:
        return path.name in os.listdir(path.parent)  # noqa: PTH208
    except FileNotFoundError:
        return False


def parse_object(line: bytes, shape: Any = Any) -> dict[str, Any] | None:
    """Return the JSON object in a line; None if it is torn, no object, or of another shape."""
    try:
        value = parse_json(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) and mistake(value, shape) is None else None


@dataclass
class GrowingFile:
    """A file of lines that another process appends to; each call returns the new ones."""

    path: Path
    position: int = 0
    """Offset of the next line."""

    def lines(self, most_bytes: int = -1) -> list[bytes]:
        """Return complete lines added since the last call; empty if there is no file yet."""
        whole, end, _ = self._read(most_bytes).rpartition(b"\n")
        self.position += len(whole) + len(end)
        return whole.split(b"\n") if end else []

    def rest(self) -> bytes:
        """Return the bytes after the last complete line."""
        return self._read(-1)

    def _read(self, most_bytes: int) -> bytes:
        try:
            with open_plain(self.path) as file:
                file.seek(self.position)
                return file.read(most_bytes)
        except FileNotFoundError:
            return b""


def check_owned(path: Path) -> None:
    """Raise StateError for a file that somebody else could have planted, before it is unpickled or run."""
    status = os.lstat(path)
    if stat.S_ISLNK(status.st_mode):
        raise StateError(f"{path} is a symbolic link; r1hpc loads only plain files from a run folder")
    if status.st_uid not in (os.getuid(), 0):
        raise StateError(f"{path} belongs to uid {status.st_uid}, not to you; remove it, then try again")
    if status.st_mode & 0o022:
        raise StateError(f"others may write {path}; run: chmod go-w {path}")
