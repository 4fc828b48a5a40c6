"""What W&B wrote into an offline run, read back: framed as LevelDB's log, its records W&B's own.

steps = read_offline(folder)      # {step: {"train/loss": 2.5}}, and an error where a step stands there twice
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK = 32768
_HEADER = struct.Struct("<IHB")
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def read_offline(folder: Path) -> dict[int, dict[str, float]]:
    """Step -> its values, of the one offline run in `folder`."""
    (path,) = folder.glob("offline-run-*/run-*.wandb")
    found: dict[int, dict[str, float]] = {}
    for record in _records(path):
        if record.WhichOneof("record_type") == "history":
            step = record.history.step.num
            assert step not in found, f"step {step} is there twice"
            found[step] = {
                "/".join(item.nested_key) or item.key: json.loads(item.value_json)
                for item in record.history.item
            }
    return found


def run_ids(folder: Path) -> set[str]:
    """The W&B ids of the offline runs in `folder`."""
    return {path.stem.removeprefix("run-") for path in folder.glob("offline-run-*/run-*.wandb")}


def _records(path: Path) -> Iterator[Any]:
    from wandb.proto import wandb_internal_pb2

    for raw in _payloads(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(raw)
        yield record


def _payloads(data: bytes) -> Iterator[bytes]:
    assert data[:4] == b":W&B"
    at, parts = 7, b""
    while at + _HEADER.size <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _HEADER.size:
            at += left
            continue
        _, length, kind = _HEADER.unpack_from(data, at)
        body = data[at + _HEADER.size : at + _HEADER.size + length]
        at += _HEADER.size + length
        if kind in (_FULL, _LAST):
            yield parts + body
        parts = parts + body if kind in (_FIRST, _MIDDLE) else b""
