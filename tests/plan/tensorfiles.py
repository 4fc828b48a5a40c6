"""Safetensors files in tests: the header is what it says, the data are zeros that the disk does not hold."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path


def write_header(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """A file of bytes (U8) of these names and shapes."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, size = end, 1
        for length in shape:
            size *= length
        end = begin + size
        header[name] = {"dtype": "U8", "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + end)
    return path
