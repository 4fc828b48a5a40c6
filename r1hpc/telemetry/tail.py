"""The newest records of a file of lines, without reading all of a long one."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Tail:
    """Whole JSON objects, oldest first."""

    records: tuple[dict[str, Any], ...] = ()
    first: dict[str, Any] | None = None
    """The first record of the file, also where the rest begins later."""
    is_whole: bool = True


def read_tail(path: Path, max_bytes: int) -> Tail:
    """The records in the last `max_bytes` of a file. Missing file: none. Torn lines are left out."""
    try:
        with path.open("rb") as file:
            first = _parse(file.readline())
            size = file.seek(0, os.SEEK_END)
            start = max(0, size - max_bytes)
            file.seek(start)
            lines = file.read(max_bytes).splitlines()
    except FileNotFoundError:
        return Tail()
    whole = lines[1:] if start else lines  # the first may be half a line
    return Tail(tuple(r for line in whole if (r := _parse(line)) is not None), first, start == 0)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
