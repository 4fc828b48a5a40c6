"""One writer, one part: documents in, whole Zarr v3 shards out.

A part is written by exactly one process, whole shards only: zarr's partial shard write is a
read-modify-write that loses data between processes (zarr-python issue 3682). Nothing here depends on
how many other writers there are.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from r1hpc.base.failpoints import failpoint
from r1hpc.data.encode import SourceCount, Vocabulary, encode_span
from r1hpc.data.layout import CHECKSUMS, INPUTS, TOKENS
from r1hpc.data.manifest import canonical_json, census
from r1hpc.data.recipe import Recipe
from r1hpc.data.segments import segment_arrays
from r1hpc.data.shardfile import ShardFile, parse_layout
from r1hpc.data.sources import Span
from r1hpc.data.vocabulary import Encoder

_ROW_CHUNK = 2**16
_ROW_SHARD = 2**22
_COMPRESSION_LEVEL = 3


@dataclass
class PartResult:
    """Counts of a written part; `sources` by source index."""

    name: str
    num_tokens: int = 0
    num_documents: int = 0
    sources: dict[int, SourceCount] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Census of the part, by path inside its folder; made here so that every writer hashes its own."""


class _Row(NamedTuple):
    """What the per-document arrays say of one document."""

    source: int
    input: int
    position: int
    hash: int
    num_prompt_tokens: int
    token_stop: int


def write_part(
    recipe: Recipe, spans: list[Span], folder: Path, vocabulary: Vocabulary, encoder: Encoder | None
) -> PartResult:
    """Read the spans and write the part `folder`, which must not exist.

    Raises:
        UsageError: an input that cannot be read as the recipe says, or an id outside the vocabulary.
    """
    zarr.create_group(folder)
    result = PartResult(folder.name)
    inputs = sorted({(span.source, span.path) for span in spans})
    input_index = {item: i for i, item in enumerate(inputs)}
    tokens = _TokenWriter(folder, recipe, vocabulary)
    rows: list[_Row] = []
    for span in spans:
        failpoint("data.build.span")
        count = result.sources.setdefault(span.source, SourceCount())
        for item in encode_span(recipe, span, vocabulary, encoder, count):
            tokens.append(item.ids)
            place = input_index[span.source, span.path]
            rows.append(
                _Row(span.source, place, item.position, item.hash, item.num_prompt_tokens, tokens.length)
            )
            count.num_documents += 1
            count.num_tokens += len(item.ids)
            count.num_bytes += item.num_bytes
    tokens.close()
    _write_rows(folder, rows, recipe.is_traces)
    (folder / INPUTS).write_bytes(canonical_json([{"source": s, "path": p} for s, p in inputs]))
    (folder / CHECKSUMS).write_bytes(_read_checksums(folder / TOKENS))
    result.num_tokens, result.num_documents = tokens.length, len(rows)
    result.files = census(folder)
    return result


class _TokenWriter:
    """Fills one shard in memory, writes it whole, begins the next."""

    def __init__(self, folder: Path, recipe: Recipe, vocabulary: Vocabulary) -> None:
        self.length = 0
        self._shard = recipe.shard_tokens
        self._invalid = vocabulary.invalid_id
        self._buffer = np.full(self._shard, self._invalid, dtype=vocabulary.dtype)
        self._array = _create(
            folder / TOKENS,
            (0,),
            vocabulary.dtype,
            recipe.chunk_tokens,
            self._shard,
            self._invalid,
            recipe.profile,
        )

    def append(self, ids: npt.NDArray[np.uint32]) -> None:
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
        """Write the last shard, padded by the invalid id, then give the array its true length."""
        if self.length % self._shard:
            self._write()
        self._array.resize((self.length,))

    def _write(self) -> None:
        stop = -(-self.length // self._shard) * self._shard
        self._array.resize((stop,))
        self._array[stop - self._shard : stop] = self._buffer
        self._buffer.fill(self._invalid)


def _write_rows(folder: Path, rows: list[_Row], is_traces: bool) -> None:
    """The per-document arrays, and those of segments."""
    low = 2**64 - 1
    pairs = np.array([(row.hash >> 64, row.hash & low) for row in rows], dtype="<u8").reshape(-1, 2)
    offsets = [0, *(row.token_stop for row in rows)]
    _write_array(folder / "doc_offsets", np.array(offsets, dtype="<u8"))
    _write_array(folder / "doc_source", np.array([row.source for row in rows], dtype="<u2"))
    _write_array(folder / "doc_hash", pairs)
    _write_array(folder / "doc_input", np.array([row.input for row in rows], dtype="<u4"))
    _write_array(folder / "doc_position", np.array([row.position for row in rows], dtype="<u8"))
    if is_traces:
        for name, values in segment_arrays(offsets, [row.num_prompt_tokens for row in rows]).items():
            _write_array(folder / name, values)


def _write_array(path: Path, values: npt.NDArray[Any]) -> None:
    """A small array in whole shards; chunk and shard follow from its length alone."""
    rows = max(1, len(values))
    chunk = min(_ROW_CHUNK, 1 << (rows - 1).bit_length())
    shard = min(_ROW_SHARD, chunk * (1 << (-(-rows // chunk) - 1).bit_length()))
    fill = int(np.iinfo(values.dtype).max)
    padded = np.full((-(-rows // shard) * shard, *values.shape[1:]), fill, dtype=values.dtype)
    padded[: len(values)] = values
    array = _create(path, padded.shape, values.dtype, chunk, shard, fill, "compact")
    array[:] = padded
    array.resize(values.shape)


def _create(
    path: Path,
    shape: tuple[int, ...],
    dtype: "np.dtype[Any]",
    chunk: int,
    shard: int,
    fill: int,
    profile: str,
) -> "zarr.Array[Any]":
    compact = [ZstdCodec(level=_COMPRESSION_LEVEL, checksum=True)] if profile == "compact" else []
    return zarr.create_array(
        store=path,
        shape=shape,
        dtype=dtype,
        chunks=(chunk, *shape[1:]),
        shards=(shard, *shape[1:]),
        compressors=[*compact, Crc32cCodec()],
        fill_value=fill,
        config={"write_empty_chunks": True},
    )


def _read_checksums(folder: Path) -> bytes:
    """uint32 crc32c of every inner chunk, read back through the verifying reader."""
    layout = parse_layout(folder, (folder / "zarr.json").read_bytes())
    found = np.empty((layout.num_shards, layout.chunks_per_shard), dtype="<u4")
    for number in range(layout.num_shards):
        shard = ShardFile(layout, number, layout.shard_path(number).stat().st_size)
        found[number] = [shard.read_checksum(chunk) for chunk in range(layout.chunks_per_shard)]
    return found.tobytes()
