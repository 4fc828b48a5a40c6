"""Read windows of tokens, verified, at about the speed of a memory map.

    dataset = open_dataset(Path("data/stdlib"), expected_id=plan.dataset_id)
    window = dataset.read(start=123_456, length=2049)

Never a wrong token: an inner chunk's crc32c is checked against its bytes and against the value recorded by
the build. A flipped bit, a stale shard and a shard of another dataset all raise. With verify="once" a chunk
is checked when it is first touched, and later windows of it are one pread of the exact bytes; with
verify="every" each read checks again.

Safe after fork (pread has no shared position). A pickle includes what opening found, so one process opens a
dataset for many: a copy asks the file system for nothing until it reads.
"""

import os
from bisect import bisect_right
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from r1hpc.base.errors import UsageError
from r1hpc.data.format.documents import DocumentInfo, DocumentTable
from r1hpc.data.format.errors import DatasetMismatchError, InvalidTokenError, ShardCorruptError
from r1hpc.data.format.manifest import (
    CHECKSUMS,
    PARTS,
    TOKENIZER,
    TOKENS,
    DatasetManifest,
    DatasetPart,
    read_manifest,
)
from r1hpc.data.format.zarr_shard import ArrayLayout, ShardFile, parse_layout

MAX_OPEN_FILES = 512
_CACHED_CHUNKS = 16
_NO_CHUNK: tuple[int, int, Any] = (-1, -1, None)


def open_dataset(path: Path | str, expected_id: str | None = None, *, verify: str = "once") -> "TokenDataset":
    """Open a built dataset and check that it is complete and the right one, without reading its tokens.

    Raise DatasetMissingError if there is no dataset, DatasetMismatchError if it is not the expected one,
    ShardCorruptError if the manifest is damaged, or a file is missing or of another size.

    Args:
        expected_id: refuse any other dataset; None accepts any.
        verify: `once` (first touch of each chunk in this process) or `every` (each read).
    """
    if verify not in ("once", "every"):
        raise UsageError(f"verify must be once or every, not {verify!r}")
    manifest = read_manifest(Path(path).absolute())
    if expected_id is not None and manifest.id != expected_id:
        raise DatasetMismatchError(
            f"{manifest.path} is dataset {manifest.id}, but {expected_id} was asked for; "
            "point data.path at the dataset the run began with, or begin a new run"
        )
    manifest.check_census()
    return TokenDataset(manifest, [_read_part(manifest, part) for part in manifest.parts], verify)


@dataclass(frozen=True)
class TokenArray:
    """The tokens of one part, as described by its zarr.json and its list of checksums."""

    layout: ArrayLayout
    checksums: npt.NDArray[np.uint32]
    """crc32c of each chunk; shape (num_shards, chunks_per_shard)."""


class TokenDataset:
    """All tokens of a dataset in one row, over all its parts. Made by open_dataset."""

    def __init__(self, manifest: DatasetManifest, arrays: list[TokenArray], verify: str = "once") -> None:
        content = manifest.content
        self.manifest = manifest
        self.path = manifest.path
        self.id = manifest.id
        self.num_tokens: int = content["num_tokens"]
        self.num_documents: int = content["num_documents"]
        self.vocab_size: int = content["vocab_size"]
        self.eos_id: int = content["eos_id"]
        self.dtype = np.dtype(content["dtype"])
        self.verify = verify
        self.documents = DocumentTable(manifest)
        self._itemsize = self.dtype.itemsize
        self.arrays = arrays
        self._shards = _list_shards(manifest, arrays)
        self._starts = [shard.first for shard in self._shards]
        self._chunk = self._shards[0].layout.chunk_rows
        self._once_raw = verify == "once" and not self._shards[0].layout.compressed
        self._opened: deque[ShardFile] = deque()
        self._decoded = [_NO_CHUNK] * _CACHED_CHUNKS

    def __repr__(self) -> str:
        return f"TokenDataset({str(self.path)!r}, id={self.id[:12]}, num_tokens={self.num_tokens})"

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenDataset, (self.manifest, self.arrays, self.verify)

    @property
    def tokenizer_path(self) -> Path | None:
        """Return the folder of tokenizer.json; None for a dataset made from ids."""
        folder = self.path / TOKENIZER
        return folder if folder.is_dir() else None

    def read(self, start: int, length: int) -> npt.NDArray[Any]:
        """Return tokens [start, start + length), of `dtype`, shape (length,). The array may be read-only.

        Raise IndexError outside the dataset; ShardCorruptError names the bad file and chunk.
        """
        # The path of nearly every window: inside one verified chunk. Kept flat, because a Python call costs a
        # tenth of the complete read.
        if self._once_raw and start >= 0:
            shard = self._shards[bisect_right(self._starts, start) - 1]
            chunk, offset = divmod(start - shard.first, self._chunk)
            handle = shard.handle
            if (
                handle is not None
                and 0 < length <= self._chunk - offset
                and start + length <= shard.stop
                and shard.verified[chunk]
                and shard.stride
            ):
                size = length * self._itemsize
                try:
                    raw = os.pread(handle.fd, size, chunk * shard.stride + offset * self._itemsize)
                except OSError:
                    raw = b""  # the careful path reads again and names the file
                if len(raw) == size:
                    return np.frombuffer(raw, self.dtype)
        return self._read_pieces(start, length)

    def doc_of(self, token_index: int) -> DocumentInfo:
        """Return the document of token `token_index`, with its source, licence and input file."""
        if not 0 <= token_index < self.num_tokens:
            raise IndexError(f"token {token_index} is outside [0, {self.num_tokens})")
        return self.documents.of_token(token_index)

    def docs_of(self, start: int, length: int) -> list[DocumentInfo]:
        """Return the documents that a window of at least one token touches, in order."""
        found = [self.doc_of(start)]
        last = self.doc_of(start + length - 1)
        found.extend(self.documents[number] for number in range(found[0].number + 1, last.number + 1))
        return found

    def _read_pieces(self, start: int, length: int) -> npt.NDArray[Any]:
        if not (start >= 0 and length >= 0 and start + length <= self.num_tokens):
            raise IndexError(f"window [{start}, {start + length}) is outside [0, {self.num_tokens})")
        tokens = np.empty(length, dtype=self.dtype)
        done = 0
        while done < length:
            number = bisect_right(self._starts, start + done) - 1
            shard = self._shards[number]
            chunk, offset = divmod(start + done - shard.first, self._chunk)
            take = min(length - done, self._chunk - offset, shard.stop - start - done)
            if shard.handle is None:
                shard.open()
                self._opened.append(shard)
                while len(self._opened) > MAX_OPEN_FILES:
                    self._opened.popleft().handle = None
            handle = shard.handle
            if self._once_raw and handle is not None and shard.verified[chunk] and shard.stride:
                at = chunk * shard.stride + offset * self._itemsize
                piece = np.frombuffer(shard.pread(handle, take * self._itemsize, at), self.dtype)
            else:
                piece = self._read_chunk(number, chunk)[offset : offset + take]
            tokens[done : done + take] = piece
            done += take
        return tokens

    def _read_chunk(self, number: int, chunk: int) -> npt.NDArray[Any]:
        """Read and verify a complete chunk. Decoded ones are cached: they serve several windows."""
        slot = chunk % _CACHED_CHUNKS
        kept = self._decoded[slot]  # one tuple, replaced at once: safe beside a prefetch thread
        if kept[:2] == (number, chunk):
            return kept[2]  # type: ignore[no-any-return]
        shard = self._shards[number]
        values = shard.read_chunk(chunk)
        valid = min(self._chunk, shard.stop - shard.first - chunk * self._chunk)
        largest = int(values[:valid].max())
        if largest >= self.vocab_size:
            raise InvalidTokenError(
                f"{shard.path}: chunk {chunk} holds token id {largest}, outside the vocabulary of "
                f"{self.vocab_size} (a hole, or another tokenizer's data); rebuild the dataset"
            )
        shard.verified[chunk] = 1
        if self.verify == "once":
            self._decoded[slot] = (number, chunk, values)
        return values


def _read_part(manifest: DatasetManifest, part: DatasetPart) -> TokenArray:
    folder = f"{PARTS}/{part.name}/{TOKENS}"
    layout = parse_layout(manifest.path / folder, manifest.read_file(f"{folder}/zarr.json"))
    if (layout.num_rows, layout.dtype) != (part.num_tokens, np.dtype(manifest.content["dtype"])):
        raise ShardCorruptError(f"{layout.folder}: shape or dtype is not what the manifest says")
    name = f"{PARTS}/{part.name}/{CHECKSUMS}"
    values = np.frombuffer(manifest.read_file(name), dtype="<u4")
    if len(values) != layout.num_shards * layout.chunks_per_shard:
        raise ShardCorruptError(f"{manifest.path / name} does not fit {layout.folder}; rebuild the dataset")
    return TokenArray(layout, values.reshape(layout.num_shards, layout.chunks_per_shard))


def _list_shards(manifest: DatasetManifest, arrays: list[TokenArray]) -> list[ShardFile]:
    shards: list[ShardFile] = []
    first = 0
    for array in arrays:
        for number in range(array.layout.num_shards):
            path = array.layout.shard_path(number).relative_to(manifest.path).as_posix()
            size = manifest.file_entry(path)["size"]
            start = first + number * array.layout.shard_rows
            shards.append(ShardFile(array.layout, number, size, array.checksums[number], start))
        first += array.layout.num_rows
    return shards
