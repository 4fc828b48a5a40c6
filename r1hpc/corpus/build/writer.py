"""Write one part with one writer: documents in, complete Zarr v3 shards out.

Exactly one process writes a part, in complete shards only: zarr's partial shard write is a read-modify-write
that loses data between processes (zarr-python issue 3682). Nothing depends on the number of other writers.
"""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from r1hpc.corpus.build.encode import Encoded, Vocabulary
from r1hpc.corpus.clean.losses import SourceCount
from r1hpc.corpus.recipe import Recipe
from r1hpc.data.format.documents import segment_arrays
from r1hpc.data.format.manifest import CHECKSUMS, INPUTS, TOKENS, canonical_json, census
from r1hpc.data.format.zarr_shard import ShardFile, parse_layout

if TYPE_CHECKING:
    import zarr

_ROW_CHUNK = 2**16
_ROW_SHARD = 2**22
_COMPRESSION_LEVEL = 3
_LOW = 2**64 - 1
_COLUMNS = {"doc_source": "<u2", "doc_hash": "<u8", "doc_input": "<u4", "doc_position": "<u8"}
"""The per-document arrays, which with ends and prompts take 46 bytes per document while they grow."""
_GROWING = {"<u2": "H", "<u4": "I", "<u8": "Q"}
Placed = tuple[int, int, Encoded]
"""A document with the index of its source, and of its file among the inputs of the part."""


@dataclass
class PartResult:
    """Counts of a written part; `sources` by source index."""

    num_tokens: int
    num_documents: int
    sources: dict[int, SourceCount]
    files: dict[str, dict[str, Any]]
    """Census of the part, by path inside its folder; made here so that every writer hashes its own files."""

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "PartResult":
        """Return the result of a unit's record, which holds its asdict()."""
        sources = {int(index): SourceCount(**count) for index, count in record["sources"].items()}
        return cls(**record | {"sources": sources})


def write_part(
    recipe: Recipe,
    items: Iterable[Placed],
    inputs: Sequence[tuple[int, str]],
    folder: Path,
    vocabulary: Vocabulary,
    counts: dict[int, SourceCount],
) -> PartResult:
    """Write the part `folder`, which must not exist, from documents in order.

    Raise UsageError for an input that does not fit the recipe, or an id outside the vocabulary.

    Args:
        inputs: the files of the part, as (source, path).
        counts: by source; the documents are added to them.
    """
    import zarr  # late: plans and existing datasets do not need it

    zarr.create_group(folder)
    tokens = _TokenWriter(folder, recipe, vocabulary)
    columns = {name: array(_GROWING[dtype]) for name, dtype in _COLUMNS.items()}
    offsets, prompts = array("Q", [0]), array("Q")
    end = np.array([vocabulary.eos_id], np.uint32)
    for source, place, item in items:
        tokens.append(item.ids)
        tokens.append(end)
        columns["doc_source"].append(source)
        columns["doc_hash"].extend((item.hash >> 64, item.hash & _LOW))
        columns["doc_input"].append(place)
        columns["doc_position"].append(item.position)
        offsets.append(tokens.length)
        prompts.append(item.num_prompt_tokens)
        count = counts[source]
        count.num_documents += 1
        count.num_tokens += len(item.ids) + 1
        count.num_bytes += item.num_bytes
    tokens.close()
    arrays = {name: np.array(columns[name], dtype) for name, dtype in _COLUMNS.items()}
    arrays |= {"doc_offsets": np.array(offsets, "<u8"), "doc_hash": arrays["doc_hash"].reshape(-1, 2)}
    if recipe.is_traces:
        arrays |= segment_arrays(offsets, prompts)
    for name, values in arrays.items():
        _write_array(folder / name, values)
    (folder / INPUTS).write_bytes(canonical_json([{"source": s, "path": p} for s, p in inputs]))
    (folder / CHECKSUMS).write_bytes(_read_checksums(folder / TOKENS))
    return PartResult(tokens.length, len(prompts), counts, census(folder))


class _TokenWriter:
    """Fills one shard in memory, writes it, starts the next."""

    def __init__(self, folder: Path, recipe: Recipe, vocabulary: Vocabulary) -> None:
        self.length = 0
        self._folder, self._recipe, self._vocabulary = folder, recipe, vocabulary
        self._shard = recipe.shard_tokens
        self._buffer = np.full(self._shard, vocabulary.invalid_id, dtype=vocabulary.dtype)
        self._array: zarr.Array[Any] | None = None

    def append(self, ids: npt.NDArray[Any]) -> None:
        done = 0
        while done < len(ids):
            at = self.length % self._shard
            take = min(self._shard - at, len(ids) - done)
            self._buffer[at : at + take] = ids[done : done + take]
            self.length += take
            done += take
            if self.length % self._shard == 0:
                self._write()

    def close(self) -> None:
        """Write the last shard, padded by the invalid id, then give the array its true length.

        A part of less than one shard gets a smaller one, not padded beyond its last chunk.
        """
        if self._array is None:
            chunk = self._recipe.chunk_tokens
            self._shard = max(chunk, -(-self.length // chunk) * chunk)
        if self.length % self._shard or (self._array is None and self.length):
            self._write()
        self._open().resize((self.length,))

    def _write(self) -> None:
        stop = -(-self.length // self._shard) * self._shard
        array = self._open()
        array.resize((stop,))
        array[stop - self._shard : stop] = self._buffer[: self._shard]
        self._buffer.fill(self._vocabulary.invalid_id)

    def _open(self) -> "zarr.Array[Any]":
        """Return the array, created once its shard size is known."""
        if self._array is None:
            path, recipe, dtype = self._folder / TOKENS, self._recipe, self._vocabulary.dtype
            self._array = _create(path, (0,), dtype, recipe.chunk_tokens, self._shard, recipe.profile)
        return self._array


def _write_array(path: Path, values: npt.NDArray[Any]) -> None:
    """Write a small array in complete shards; chunk and shard follow from its length alone."""
    rows = max(1, len(values))
    chunk = min(_ROW_CHUNK, 1 << (rows - 1).bit_length())
    shard = min(_ROW_SHARD, chunk * (1 << (-(-rows // chunk) - 1).bit_length()))
    shape = (-(-rows // shard) * shard, *values.shape[1:])
    padded = np.full(shape, np.iinfo(values.dtype).max, dtype=values.dtype)
    padded[: len(values)] = values
    array = _create(path, shape, values.dtype, chunk, shard, "compact")
    array[:] = padded
    array.resize(values.shape)


def _create(
    path: Path, shape: tuple[int, ...], dtype: "np.dtype[Any]", chunk: int, shard: int, profile: str
) -> "zarr.Array[Any]":
    import zarr
    from zarr.codecs import Crc32cCodec, ZstdCodec

    compact = [ZstdCodec(level=_COMPRESSION_LEVEL, checksum=True)] if profile == "compact" else []
    return zarr.create_array(
        store=path,
        shape=shape,
        dtype=dtype,
        chunks=(chunk, *shape[1:]),
        shards=(shard, *shape[1:]),
        compressors=[*compact, Crc32cCodec()],
        fill_value=int(np.iinfo(dtype).max),
        config={"write_empty_chunks": True},
    )


def _read_checksums(folder: Path) -> bytes:
    """Return the crc32c (uint32) of every inner chunk, read back through the verifying reader."""
    layout = parse_layout(folder, (folder / "zarr.json").read_bytes())
    found = np.empty((layout.num_shards, layout.chunks_per_shard), dtype="<u4")
    for number in range(layout.num_shards):
        shard = ShardFile(layout, number, layout.shard_path(number).stat().st_size)
        found[number] = [shard.read_checksum(chunk) for chunk in range(layout.chunks_per_shard)]
    return found.tobytes()
