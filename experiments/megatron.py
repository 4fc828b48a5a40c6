"""Turn Megatron-LM's indexed datasets (PREFIX.bin, PREFIX.idx) into Parquet, which a recipe reads.

    python -m experiments.megatron PREFIX.idx ... --out DIR
    sources: [{name: web, kind: parquet, root: DIR, field: input_ids}]      # with tokenizer.kind: ids

The format is that of megatron/core/datasets/indexed_dataset.py: magic, version 1, a code for the ids' type,
numbers of sequences and of documents, then lengths (int32), byte offsets (int64) and each document's first
sequence (int64).
"""

import functools
import struct
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.parquet

from r1hpc.base.cli import ArgumentParser, run_command
from r1hpc.base.errors import UsageError

_ROWS = 4096
"""Documents in a row group."""
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


def read_documents(path: Path, start: int, stop: int) -> Iterator[npt.NDArray[np.int64]]:
    """Yield the ids of documents [start, stop)."""
    index = _read_index(path)
    binary = path.with_suffix(".bin")
    is_empty = not binary.stat().st_size  # then all documents are, and an empty file cannot be mapped
    data = np.empty(0, np.uint8) if is_empty else np.memmap(binary, dtype=np.uint8, mode="r")
    size = index.dtype.itemsize
    for number in range(start, stop):
        begin, end = index.documents[number : number + 2]
        rows = zip(index.offsets[begin:end].tolist(), index.lengths[begin:end].tolist(), strict=True)
        pieces = [data[at : at + count * size].view(index.dtype) for at, count in rows]
        yield np.concatenate(pieces).astype(np.int64) if pieces else np.empty(0, np.int64)


def _read_index(path: Path) -> _Index:
    status = path.stat()
    return _parsed_index(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=1)  # every span of some thousand documents needs the same
def _parsed_index(path: Path, size: int, mtime_ns: int) -> _Index:
    with path.open("rb") as file:
        if len(head := file.read(_HEADER.size)) < _HEADER.size or not head.startswith(_MAGIC):
            # It may be the .bin, of any size: do not read it completely.
            raise UsageError(f"{path} is not a Megatron index; give the .idx file")
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


def convert(path: Path, out: Path) -> Path:
    """Write the documents of PREFIX.idx as the rows of out/PREFIX.parquet, a list of ids each."""
    schema = pyarrow.schema([("input_ids", pyarrow.list_(pyarrow.int64()))])
    count, made = count_documents(path), out / f"{path.stem}.parquet"
    with pyarrow.parquet.ParquetWriter(made, schema, compression="zstd") as writer:
        for start in range(0, count, _ROWS):
            rows = list(read_documents(path, start, min(start + _ROWS, count)))
            writer.write_table(pyarrow.table({"input_ids": rows}, schema))
    return made


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m experiments.megatron", description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", metavar="PREFIX.idx")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    arguments = parser.parse_args(argv)
    if len({path.stem for path in arguments.files}) < len(arguments.files):
        raise UsageError("two files have the same name: convert them into two folders")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for path in arguments.files:
        print(convert(path, arguments.out))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
