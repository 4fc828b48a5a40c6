"""Lines of a plain or compressed file, one at a time, however long the file or a line is.

for line in iter_lines(path, start, stop):
    line.position, line.raw, line.fault
"""

import bz2
import gzip
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from r1hpc.base.files import COMPRESSED
from r1hpc.base.units import format_bytes
from r1hpc.data.errors import reason, refuse_passing

MAX_RECORD_BYTES = 2**30
"""A longer line is put aside without being held in memory."""
_BLOCK = 2**20
_DAMAGE = (OSError, EOFError, ValueError, zlib.error)


@dataclass(frozen=True)
class Line:
    """One line with the byte it begins at (unpacked), or what is wrong at that place."""

    position: int
    raw: bytes
    fault: str = ""
    size: int = 0


def is_compressed(name: str) -> bool:
    """Whether a file can only be read from its beginning."""
    return name.endswith(COMPRESSED)


def open_file(path: Path) -> IO[bytes]:
    """The file, unpacked as its name says."""
    if path.name.endswith(".gz"):
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.name.endswith(".bz2"):
        return bz2.open(path, "rb")
    if path.name.endswith(".zst"):
        return _open_zstd(path)
    return path.open("rb")


def iter_lines(path: Path, start: int, stop: int | None) -> Iterator[Line]:
    """The lines that begin in [start, stop), so that neighbours share no line and leave none out.

    A file that is damaged or ends early gives one faulty line, its last. Blank lines are left out.

    Raises:
        DataError: the file system does not give it.
    """
    position = start
    try:
        with open_file(path) as file:
            position = _first_line(file, start, stop)
            while stop is None or position < stop:
                line = _read_line(file, position)
                if not line.size:
                    return
                if line.fault or line.raw.strip():
                    yield line
                position += line.size
    except _DAMAGE as error:
        refuse_passing(error, path)
        what = f"the file is damaged or ends early ({reason(error, path) or type(error).__name__})"
        yield Line(position, b"", fault=what)


def line_number(path: Path, position: int) -> int:
    """The number, from 1, of the line that begins at byte `position` (unpacked, for .gz)."""
    number = 1
    with open_file(path) as file:
        while position > 0 and (block := file.read(min(position, _BLOCK))):
            number += block.count(b"\n")
            position -= len(block)
    return number


def _read_line(file: IO[bytes], position: int) -> Line:
    raw = file.readline(MAX_RECORD_BYTES)
    size = len(raw)
    if size < MAX_RECORD_BYTES or raw.endswith(b"\n"):
        return Line(position, raw, size=size)
    del raw
    while block := file.readline(_BLOCK):
        size += len(block)
        if block.endswith(b"\n"):
            break
    return Line(
        position, b"", f"a line of {format_bytes(size)}; at most {format_bytes(MAX_RECORD_BYTES)}", size
    )


def _first_line(file: IO[bytes], start: int, stop: int | None) -> int:
    """Move to the first line that begins at or after `start`; `stop` or beyond when there is none before."""
    if not start:
        return 0
    file.seek(start - 1)
    position = start - 1
    while stop is None or position < stop:
        block = file.readline(_BLOCK)
        position += len(block)
        if not block or block.endswith(b"\n"):
            break
    return position


def _open_zstd(path: Path) -> IO[bytes]:
    import pyarrow

    raw: Any = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
    return io.BufferedReader(raw, _BLOCK)
