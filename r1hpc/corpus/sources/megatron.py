"""Read Megatron-LM's indexed datasets: ids in PREFIX.bin, starts of sequences and documents in PREFIX.idx.

    count_documents(path)               # of PREFIX.idx
    read_documents(path, 0, 100)

The format is that of megatron/core/datasets/indexed_dataset.py: magic, version 1, a code for the ids' type,
numbers of sequences and of documents, then lengths (int32), byte offsets (int64) and each document's first
sequence (int64).
"""

import functools
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from r1hpc.base.errors import UsageError
from r1hpc.corpus.sources.fields import Document, to_ids

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


@dataclass(frozen=True)
class _Index:
    dtype: "np.dtype[Any]"
    lengths: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    documents: npt.NDArray[np.int64]
    """First sequence of each document, and the number of sequences."""


def count_documents(path: Path) -> int:
    """Return how many documents a PREFIX.idx names.

    Raises:
        UsageError: not such an index, or no PREFIX.bin beside it.
    """
    return len(_read_index(path).documents) - 1


def read_documents(path: Path, start: int, stop: int) -> Iterator[Document]:
    """Yield documents [start, stop); their position is their number."""
    index = _read_index(path)
    binary = path.with_suffix(".bin")
    is_empty = not binary.stat().st_size  # then all documents are, and an empty file cannot be mapped
    data = np.empty(0, np.uint8) if is_empty else np.memmap(binary, dtype=np.uint8, mode="r")
    size = index.dtype.itemsize
    for number in range(start, stop):
        begin, end = index.documents[number : number + 2]
        rows = zip(index.offsets[begin:end].tolist(), index.lengths[begin:end].tolist(), strict=True)
        pieces = [data[at : at + count * size].view(index.dtype) for at, count in rows]
        try:
            raw = to_ids(np.concatenate(pieces)) if pieces else b""
        except ValueError as error:
            yield Document(number, b"", fault=str(error))
        else:
            yield Document(number, raw, is_ids=True)


def _read_index(path: Path) -> _Index:
    status = path.stat()
    return _parsed_index(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=1)  # every span of some thousand documents needs the same
def _parsed_index(path: Path, size: int, mtime_ns: int) -> _Index:
    with path.open("rb") as file:
        if len(head := file.read(_HEADER.size)) < _HEADER.size or not head.startswith(_MAGIC):
            # It may be the .bin, of any size: do not read it completely.
            raise UsageError(f"{path} is not a Megatron index; glob must match the .idx files")
        file.seek(0)
        raw = file.read()
    _, version, code, sequences, documents = _HEADER.unpack_from(raw)
    if version != 1 or code not in _TYPES:
        raise UsageError(f"{path}: version {version} with ids of type {code} is not known")
    end = _HEADER.size + 12 * sequences + 8 * documents
    if len(raw) < end or not path.with_suffix(".bin").is_file():
        what = f"{path.with_suffix('.bin')} is not there" if len(raw) >= end else f"{path} ends early"
        raise UsageError(f"{what}; a Megatron dataset is a pair of .bin and .idx")
    at = _HEADER.size
    lengths = np.frombuffer(raw, "<i4", sequences, at)
    offsets = np.frombuffer(raw, "<i8", sequences, at + 4 * sequences)
    first = np.frombuffer(raw, "<i8", documents, at + 12 * sequences)
    dtype = np.dtype(_TYPES[code])
    needed = int(offsets[-1]) + int(lengths[-1]) * dtype.itemsize if sequences else 0
    if path.with_suffix(".bin").stat().st_size < needed:
        raise UsageError(f"{path.with_suffix('.bin')} ends before the {needed} bytes that its index names")
    return _Index(dtype, lengths, offsets, first)
