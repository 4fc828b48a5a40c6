"""Read lines of plain or compressed files, however long, and parse lines of traces.

    for line in iter_lines(path, start, stop):
        line.position, line.raw, line.fault
    prompt, completion = parse_trace(b'{"prompt": "2+2=", "completion": "4"}')      # as UTF-8

A trace is a JSON object whose prompt and completion are text.
"""

import bz2
import contextlib
import gzip
import io
import json
import re
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from r1hpc.base.files import COMPRESSED
from r1hpc.base.names import nearest
from r1hpc.base.units import format_bytes
from r1hpc.data.format.errors import reason, refuse_passing

MAX_RECORD_BYTES = 2**30
"""A longer line is put aside without being held in memory."""
_BLOCK = 2**20
_LONG_BYTES = 4 * _BLOCK
_ESCAPE_OR_QUOTE = re.compile(rb'\\.|"', re.DOTALL)
_WHOLE_ESCAPES = re.compile(
    rb"(?:[^\\]+|\\u[dD][89abAB]..\\u[dD][c-fC-F]..|\\u(?![dD][89abAB]).{4}|\\[^u])*", re.DOTALL
)
_DAMAGE = (OSError, EOFError, ValueError, zlib.error)
_CALLED_OTHERWISE = (
    ("question", "problem", "instruction", "query", "input"),
    ("answer", "response", "output", "solution", "generation", "target"),
)
"""Names that other collections use for a prompt, and for a completion."""
_CONVERSATIONS = ("messages", "conversations", "conversation")
_SAID_BESIDE = ("system", "system_prompt", "context", "input", "thinking", "reasoning", "reasoning_content")
"""Names of texts that other collections put beside them."""
_MOST_SHOWN = 6


@dataclass(frozen=True)
class Line:
    """One line with the byte it begins at (unpacked), or the fault at that place."""

    position: int
    raw: bytes
    fault: str = ""
    size: int = 0
    lost_bytes: int = 0
    """Bytes on disk that were not read, for a damaged file."""


def is_compressed(name: str) -> bool:
    """True if a file can only be read from its beginning."""
    return name.endswith(COMPRESSED)


def open_file(path: Path) -> IO[bytes]:
    """Open the file, unpacked by its suffix."""
    if path.name.endswith(".gz"):
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.name.endswith(".bz2"):
        return bz2.open(path, "rb")
    if path.name.endswith(".zst"):
        import pyarrow

        raw: Any = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
        return io.BufferedReader(raw, _BLOCK)
    return path.open("rb")


def iter_lines(path: Path, start: int, stop: int | None) -> Iterator[Line]:
    """Yield the lines that begin in [start, stop), so that neighbours share no line and leave none out.

    A file that is damaged or ends early gives one faulty line, its last. Blank lines are left out. A damaged
    .gz loses what is behind the damage, any other file everything. A file that ends early is lost completely,
    as nothing tells its length. Raise DataError if the file system does not return it.
    """
    position, read = start, 0
    try:
        with open_file(path) as file:
            try:
                position = _first_line(file, start, stop)
                while stop is None or position < stop:
                    line = [_read_line(file, position)]
                    if not line[0].size:
                        return
                    position += line[0].size
                    if line[0].fault or not line[0].raw.isspace():
                        yield line.pop()  # not held meanwhile: it may be large
            except _DAMAGE:
                read = file.fileobj.tell() if isinstance(file, gzip.GzipFile) else 0
                raise
    except _DAMAGE as error:
        refuse_passing(error, path)
        what = f"the file is damaged or ends early ({reason(error, path) or type(error).__name__})"
        size = path.stat().st_size if stop is None else stop - start
        yield Line(position, b"", fault=what, lost_bytes=size - read if read < size else size)


def parse_json(raw: bytes, pick: Callable[[Any], Any]) -> Any:
    """Return what `pick` takes of a line's JSON value; ValueError if it is not JSON, or from `pick`.

    A long string in it is UTF-8 bytes: a Python string takes four bytes per character if one of them is an
    emoji, and the parser makes copies.
    """
    if len(raw) > _LONG_BYTES:
        with contextlib.suppress(ValueError, RecursionError):  # json's own error is better
            value, long = _parse_without_long(raw)
            picked = pick(value)
            if isinstance(picked, str):
                return long.get(picked, picked)
    try:
        try:
            value = json.loads(raw)
        except UnicodeDecodeError:  # on_invalid_utf8 decides, of the field alone
            value = json.loads(raw.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error}); kind: jsonl needs one JSON object a line") from None
    return pick(value)


def _parse_without_long(raw: bytes) -> tuple[Any, dict[str, bytes]]:
    """Return the value with a mark in place of each long string, and those strings by mark."""
    short, long, at = bytearray(), dict[str, bytes](), 0
    while (begin := raw.find(b'"', at)) >= 0:
        end = next((m.start() for m in _ESCAPE_OR_QUOTE.finditer(raw, begin + 1) if m.group() == b'"'), None)
        if end is None:
            raise ValueError("a string without an end")
        if end - begin <= _BLOCK:
            short += raw[at : end + 1]
        else:
            mark = uuid.uuid4().hex
            short += raw[at:begin] + f'"{mark}"'.encode()
            long[mark] = _unescape(raw, begin + 1, end)
        at = end + 1
    return json.loads(short + raw[at:]), long


def _unescape(raw: bytes, at: int, end: int) -> bytes:
    """Return the UTF-8 of the text between a JSON string's quotes, block by block."""
    found = bytearray()
    while at < end:
        block = raw[at : min(at + _BLOCK, end)]
        if at + len(block) < end:  # cut no escape, surrogate pair or character
            block = _WHOLE_ESCAPES.match(block).group()  # type: ignore[union-attr]
            while block and raw[at + len(block)] & 0xC0 == 0x80:
                block = block[:-1]
        if not block:
            raise ValueError("no escape of JSON")
        found += json.loads(b'"%b"' % block).encode()
        at += len(block)
    return bytes(found)


def line_number(path: Path, position: int) -> int:
    """Return the number, from 1, of the line that begins at byte `position` (unpacked, for .gz)."""
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
    """Move to the first line that begins at or after `start`; `stop` or beyond if there is none before."""
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


def parse_trace(
    line: bytes, prompt_field: str = "prompt", completion_field: str = "completion"
) -> tuple[bytes, bytes]:
    """Return prompt and completion as UTF-8; ValueError tells what is wrong with the line."""
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start} of the line)") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__}, not an object with {prompt_field!r}")
    fields = (prompt_field, completion_field)
    prompt, completion = (_text(value, fields, index) for index in range(2))
    return prompt, completion


def also_said(line: bytes) -> list[str]:
    """Return fields of a line with text besides prompt and completion, which is not learnt."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return []
    if not isinstance(value, dict):
        return []
    learnt = f"{value.get('prompt')}\n{value.get('completion')}"
    found = {name: value[name].strip() for name in _SAID_BESIDE if isinstance(value.get(name), str)}
    return [repr(name) for name, text in found.items() if text and text not in learnt]


def _text(value: Mapping[str, Any], fields: tuple[str, str], index: int) -> bytes:
    name = fields[index]
    if name not in value:
        raise ValueError(f"no field {name!r}{_what_there_is(value, fields, index)}")
    text = value[name]
    if not isinstance(text, str):
        raise ValueError(f"field {name!r} is {type(text).__name__}, not a string")
    if not text:
        raise ValueError(f"field {name!r} is empty")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"field {name!r} is not UTF-8 (half a surrogate pair at {error.start})") from None


def _what_there_is(value: Mapping[str, Any], fields: tuple[str, str], index: int) -> str:
    """Return what the line has in place of a field, and what becomes of it."""
    if near := nearest(fields[index], value):
        return near
    if other := next((name for name in _CALLED_OTHERWISE[index] if name in value), None):
        return f": rename {other!r} to {fields[index]!r}"
    if chat := next((name for name in _CONVERSATIONS if name in value), None):
        return f": write what the user says in {chat!r} as {fields[0]!r}, what is answered as {fields[1]!r}"
    return f"; it has {', '.join(map(repr, list(value)[:_MOST_SHOWN])) or 'none'}"
