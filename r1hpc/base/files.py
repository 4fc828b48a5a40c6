"""Files that survive a kill at any moment: written beside their place, synced, then renamed.

write_atomic(path, "text")          # whole old file or whole new file, never half
append_record(path, {"step": 1})    # one line, one write; a torn last line is ignored by readers
read_records(path)                  # -> list of dicts
"""

import contextlib
import json
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from r1hpc.base.errors import StateError


def fsync_dir(path: Path) -> None:
    """Make the entries of a folder durable. fsync of a file does not cover its name."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_file(path: Path) -> None:
    """Make the bytes of an existing file durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomic(path: Path, content: str | bytes, mode: int = 0o600) -> None:
    """Replace `path` by `content`, durably. A reader sees the old file or the new one."""
    raw = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    fsync_dir(path.parent)


def write_json(path: Path, value: Any, mode: int = 0o600) -> None:
    """write_atomic of indented JSON."""
    write_atomic(path, json.dumps(value, indent=2) + "\n", mode)


def read_json(path: Path) -> Any:
    """Parse a JSON file; raise StateError that names it when it is not JSON."""
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StateError(f"{path} is not valid JSON ({error}); restore or remove it") from None


def append_record(path: Path, record: dict[str, Any], durable: bool = True) -> None:
    """Append one JSON line in one write. Starts a new line first if a kill left a torn one."""
    line = json.dumps(record) + "\n"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        size = os.fstat(fd).st_size
        if size and os.pread(fd, 1, size - 1) != b"\n":
            line = "\n" + line
        _write_all(fd, line.encode())
        if durable:
            os.fsync(fd)
    finally:
        os.close(fd)


def read_records(path: Path) -> list[dict[str, Any]]:
    """All whole JSON objects of a file of lines. Missing file: empty. Torn lines are left out."""
    return list(iter_records(path))


def iter_records(path: Path) -> Iterator[dict[str, Any]]:
    """Stream what read_records lists."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        for line in file:
            # A kill during an append can leave part of a line; the next append starts a new one.
            with contextlib.suppress(json.JSONDecodeError, UnicodeDecodeError):
                value = json.loads(line)
                if isinstance(value, dict):
                    yield value


def check_owned(path: Path) -> None:
    """Refuse a file that somebody else could have planted, before it is unpickled or executed.

    Raises:
        StateError: a symlink, a file of another user, or one that others may write.
    """
    status = os.lstat(path)
    if stat.S_ISLNK(status.st_mode):
        raise StateError(f"{path} is a symbolic link; r1hpc loads only plain files from a run folder")
    if status.st_uid not in (os.getuid(), 0):
        raise StateError(f"{path} belongs to uid {status.st_uid}, not to you; remove it, then try again")
    if status.st_mode & 0o022:
        raise StateError(f"others may write {path}; run: chmod go-w {path}")


def _write_all(fd: int, raw: bytes) -> None:
    while raw:
        raw = raw[os.write(fd, raw) :]
