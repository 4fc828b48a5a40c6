"""JSON over a pipe: four bytes of length, then the text. What a verifier and its process speak."""

import json
import struct
from typing import Any, BinaryIO

HEADER = struct.Struct(">I")


def pack(value: Any) -> bytes:
    """A frame. Escaped to ASCII, so that lone surrogates travel too."""
    body = json.dumps(value).encode("ascii")
    return HEADER.pack(len(body)) + body


def read_frame(stream: BinaryIO) -> Any:
    """The next value, or None where the other side has closed."""
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    body = stream.read(HEADER.unpack(header)[0])
    return json.loads(body)
