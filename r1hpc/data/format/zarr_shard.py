"""Read one shard of a Zarr v3 array directly: parse its index once, verify its chunks, pread the rest.

    layout = parse_layout(folder, (folder / "zarr.json").read_bytes())
    chunk = ShardFile(layout, number=0, size=...).read_chunk(3)

Supports only our writer's arrays: `sharding_indexed` along the first axis with inner codecs [bytes, crc32c]
or [bytes, zstd, crc32c] and the index at the end (Zarr v3 specification, codecs sharding-indexed 1.0 and
crc32c 1.0). zarr-python is not imported: it reopens the file and reads the index again on every read.
"""

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from r1hpc.data.format.errors import DataError, ShardCorruptError
from r1hpc.data.format.manifest import REPAIR, missing

_NO_CHUNK = 2**64 - 1
_CRC_BYTES = 4


@dataclass(frozen=True)
class ArrayLayout:
    """One array as described by zarr.json. A row is one element, or one line of a two-dimensional array."""

    folder: Path
    dtype: "np.dtype[Any]"
    num_rows: int
    row_items: int
    chunk_rows: int
    shard_rows: int
    compressed: bool
    key_suffix: str
    """`/0` of the shard keys of a two-dimensional array."""

    @property
    def num_shards(self) -> int:
        return -(-self.num_rows // self.shard_rows)

    @property
    def chunks_per_shard(self) -> int:
        return self.shard_rows // self.chunk_rows

    @property
    def chunk_bytes(self) -> int:
        """Return the size of one decoded chunk."""
        return self.chunk_rows * self.row_items * self.dtype.itemsize

    def shard_path(self, number: int) -> Path:
        return self.folder / f"c/{number}{self.key_suffix}"


def parse_layout(folder: Path, raw: bytes) -> ArrayLayout:
    """Return the layout in the zarr.json text `raw` of the array at `folder`; else DataError."""
    try:
        meta = json.loads(raw)
        shape, grid = meta["shape"], meta["chunk_grid"]["configuration"]["chunk_shape"]
        (outer,) = meta["codecs"]
        sharding = outer["configuration"]
        names = [codec["name"] for codec in sharding["codecs"]]
        index = [codec["name"] for codec in sharding["index_codecs"]]
        endian = sharding["codecs"][0].get("configuration", {}).get("endian") if names else ""
        dtype = np.dtype(meta["data_type"]).newbyteorder("<")
        supported = (
            (meta["zarr_format"], meta["node_type"], outer["name"]) == (3, "array", "sharding_indexed")
            and names in (["bytes", "crc32c"], ["bytes", "zstd", "crc32c"])
            and index == ["bytes", "crc32c"]
            and sharding.get("index_location", "end") == "end"
            and (endian == "little" or dtype.itemsize == 1)  # single bytes have no order
            and meta["chunk_key_encoding"]["name"] == "default"
            and grid[1:] == shape[1:] == sharding["chunk_shape"][1:]
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}/zarr.json is not array metadata this reader knows ({error!r})") from None
    if not supported:
        raise DataError(f"{folder}: codecs {names} in {outer['name']} are not read directly; use zarr-python")
    chunk_rows = sharding["chunk_shape"][0]
    suffix = "/0" * (len(shape) - 1)
    compressed = "zstd" in names
    return ArrayLayout(folder, dtype, shape[0], math.prod(shape[1:]), chunk_rows, grid[0], compressed, suffix)


class Handle:
    """A file descriptor that lives until its last holder is gone.

    It closes with the last reference, not on eviction: otherwise a thread inside pread could read another
    file that got the same number.
    """

    def __init__(self, path: Path) -> None:
        self.fd = -1
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            raise missing(path) from None
        # Windows are random: readahead of the default 128 KiB costs 4 times a window's cold read.
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_RANDOM)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class ShardFile:
    """One shard: its index is verified when first opened, each chunk when first read completely."""

    def __init__(
        self,
        layout: ArrayLayout,
        number: int,
        size: int,
        checksums: npt.NDArray[np.uint32] | None = None,
        first: int | None = None,
    ) -> None:
        """
        Args:
            size: bytes the file must have.
            checksums: expected crc32c of each chunk, for shards bound to a dataset.
            first: row number of the first row, where rows are counted beyond this array.
        """
        self.layout = layout
        self.path = layout.shard_path(number)
        self.first = number * layout.shard_rows if first is None else first
        self.stop = self.first + min(layout.shard_rows, layout.num_rows - number * layout.shard_rows)
        self.handle: Handle | None = None
        self.stride = 0
        """Bytes from chunk to chunk if they lie densely in order; else 0."""
        self.verified = bytearray(layout.chunks_per_shard)
        self._size = size
        self._checksums = checksums
        self._identity: tuple[int, ...] = ()
        self._index: npt.NDArray[np.uint64] | None = None

    def open(self) -> Handle:
        """Return the open file, its index verified.

        Raise ShardMissingError, or ShardCorruptError for another size or an index that fails its crc32c.
        """
        if self.handle is not None:
            return self.handle
        handle = Handle(self.path)
        status = os.fstat(handle.fd)
        if status.st_size != self._size:
            raise ShardCorruptError(
                f"{self.path} has {status.st_size} bytes, the manifest says {self._size}; {REPAIR}"
            )
        identity = (status.st_dev, status.st_ino, status.st_mtime_ns)
        if identity != self._identity:  # not the file whose chunks were verified
            self.verified = bytearray(self.layout.chunks_per_shard)
            self._read_index(handle)
            self._identity = identity
        self.handle = handle
        return handle

    def read_chunk(self, chunk: int) -> npt.NDArray[Any]:
        """Return all values of one inner chunk, verified, flat, read-only; ShardCorruptError names it."""
        raw = np.frombuffer(self._read_raw(chunk), dtype=np.uint8)
        if len(raw) < _CRC_BYTES:
            raise self._corrupt(chunk, "is too short for a checksum")
        body = raw[:-_CRC_BYTES]
        stored = int.from_bytes(raw[-_CRC_BYTES:].tobytes(), "little")
        if google_crc32c.value(body) != stored:
            raise self._corrupt(chunk, "fails its crc32c")
        if self._checksums is not None and stored != self._checksums[chunk]:
            raise self._corrupt(
                chunk, "belongs to another dataset or another place (its crc32c is not the one recorded)"
            )
        if self.layout.compressed:
            from numcodecs.zstd import Zstd  # type: ignore[import-untyped]  # only the compact profile needs it

            try:
                body = np.frombuffer(Zstd().decode(body), dtype=np.uint8)
            except RuntimeError as error:
                raise self._corrupt(chunk, f"does not decompress ({error})") from None
        if body.nbytes != self.layout.chunk_bytes:
            raise self._corrupt(chunk, f"decodes to {body.nbytes} bytes instead of {self.layout.chunk_bytes}")
        return body.view(self.layout.dtype)

    def read_checksum(self, chunk: int) -> int:
        """Return the crc32c of one chunk, after verifying its bytes."""
        self.read_chunk(chunk)
        return int.from_bytes(self._read_raw(chunk)[-_CRC_BYTES:], "little")

    def pread(self, handle: Handle, num_bytes: int, offset: int) -> bytes:
        """Return exactly `num_bytes`, or raise an error that names the file."""
        try:
            raw = os.pread(handle.fd, num_bytes, offset)
        except OSError as error:
            raise ShardCorruptError(f"{self.path}: reading failed ({error.strerror}); {REPAIR}") from None
        if len(raw) != num_bytes:
            raise ShardCorruptError(f"{self.path} ends before byte {offset + num_bytes}; {REPAIR}")
        return raw

    def _read_raw(self, chunk: int) -> bytes:
        handle = self.open()
        if self.stride:
            return self.pread(handle, self.stride, chunk * self.stride)
        assert self._index is not None, "an open shard without a dense layout keeps its index"
        offset, num_bytes = (int(value) for value in self._index[chunk])
        return self.pread(handle, num_bytes, offset)

    def _read_index(self, handle: Handle) -> None:
        num_chunks = self.layout.chunks_per_shard
        num_bytes = 16 * num_chunks
        data_bytes = self._size - num_bytes - _CRC_BYTES
        if data_bytes < 0:
            raise ShardCorruptError(f"{self.path} is too short for its index; {REPAIR}")
        raw = self.pread(handle, num_bytes + _CRC_BYTES, data_bytes)
        if google_crc32c.value(raw[:-_CRC_BYTES]) != struct.unpack("<I", raw[-_CRC_BYTES:])[0]:
            raise ShardCorruptError(f"{self.path}: the shard index fails its crc32c; {REPAIR}")
        index = np.frombuffer(raw, dtype="<u8", count=2 * num_chunks).reshape(num_chunks, 2)
        holes = np.flatnonzero((index == np.uint64(_NO_CHUNK)).any(axis=1))
        if len(holes):
            raise self._corrupt(int(holes[0]), "is not in the shard (a hole)")
        offsets, sizes = index[:, 0], index[:, 1]
        bad = (sizes > data_bytes) | (offsets > data_bytes) | (offsets + sizes > data_bytes)
        if not self.layout.compressed:
            bad |= sizes != self.layout.chunk_bytes + _CRC_BYTES
        if bad.any():
            raise self._corrupt(int(np.flatnonzero(bad)[0]), "has an impossible place in the shard index")
        stride = self.layout.chunk_bytes + _CRC_BYTES
        dense = not self.layout.compressed and bool(
            np.array_equal(offsets, np.arange(num_chunks, dtype="<u8") * np.uint64(stride))
        )
        # A dense shard needs no index, which takes hundreds of MB for a terabyte of tokens.
        self.stride, self._index = (stride, None) if dense else (0, index)

    def _corrupt(self, chunk: int, what: str) -> ShardCorruptError:
        return ShardCorruptError(f"{self.path}: chunk {chunk} {what}; {REPAIR}")
