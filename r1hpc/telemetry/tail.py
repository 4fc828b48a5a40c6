"""The newest records of a file of lines, without reading all of a long one."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1hpc.base.files import open_plain, parse_object


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
        with open_plain(path) as file:
            first = parse_object(file.readline())
            size = file.seek(0, os.SEEK_END)
            start = max(0, size - max_bytes)
            file.seek(start)
            lines = file.read(max_bytes).splitlines()
    except FileNotFoundError:
        return Tail()
    whole = lines[1:] if start else lines  # the first may be half a line
    return Tail(tuple(r for line in whole if (r := parse_object(line)) is not None), first, start == 0)
