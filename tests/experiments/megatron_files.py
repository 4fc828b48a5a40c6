"""PREFIX.bin and PREFIX.idx as megatron/core/datasets/indexed_dataset.py writes them, a sequence a document.

write_megatron(tmp_path / "PREFIX", [[5, 6, 0], [7, 0]])
"""

import struct
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

_UINT16 = 8
"""The code for ids of two bytes."""


def write_megatron(prefix: Path, documents: Sequence[Sequence[int]]) -> None:
    prefix.parent.mkdir(parents=True, exist_ok=True)
    lengths = [len(ids) for ids in documents]
    prefix.with_suffix(".bin").write_bytes(b"".join(np.array(ids, "<u2").tobytes() for ids in documents))
    head = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, _UINT16, len(lengths), len(lengths) + 1)
    offsets = [2 * start for start in accumulate(lengths, initial=0)][: len(lengths)]
    columns = (np.array(lengths, "<i4"), np.array(offsets, "<i8"), np.arange(len(lengths) + 1, dtype="<i8"))
    prefix.with_suffix(".idx").write_bytes(head + b"".join(column.tobytes() for column in columns))
