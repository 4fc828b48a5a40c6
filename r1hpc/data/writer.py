"""One writer, one part: documents in, whole Zarr v3 shards out.

A part is written by exactly one process, whole shards only: zarr's partial shard write is a
read-modify-write that loses data between processes (zarr-python issue 3682). Nothing here depends on
how many other writers there are.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from r1hpc.base.errors import UsageError
from r1hpc.base.failpoints import failpoint
from r1hpc.data.layout import CHECKSUMS, INPUTS, TOKENS
from r1hpc.data.manifest import canonical_json, census
from r1hpc.data.recipe import Recipe
from r1hpc.data.shardfile import ShardFile, parse_layout
from r1hpc.data.sources import Document, Span, read_span
from r1hpc.data.vocabulary import Encoder

_BATCH_BYTES = 2**20
_ROW_CHUNK = 2**16
_ROW_SHARD = 2**22
_COMPRESSION_LEVEL = 3


@dataclass(frozen=True)
class Vocabulary:
    """What the ids of a dataset mean, as far as its arrays are concerned."""

    vocab_size: int
    eos_id: int

    @property
    def dtype(self) -> "np.dtype[Any]":
        """uint16 where the invalid id 65,535 lies outside the vocabulary, else uint32."""
        return np.dtype("<u2" if self.vocab_size <= 65_535 else "<u4")

    @property
    def invalid_id(self) -> int:
        """The fill value: no token has it, so a hole can never pass as one."""
        return int(np.iinfo(self.dtype).max)


@dataclass
class SourceCount:
    """What one source gave."""

    num_documents: int = 0
    num_tokens: int = 0
    num_bytes: int = 0
    num_skipped: int = 0
    """Documents left out because they are not UTF-8."""


@dataclass
class PartResult:
    """Counts of a written part; `sources` by source index."""

    name: str
    num_tokens: int = 0
    num_documents: int = 0
    sources: dict[int, SourceCount] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Census of the part, by path inside its folder; made here so that every writer hashes its own."""


@dataclass(frozen=True)
class _Encoded:
    position: int
    hash: int
    ids: npt.NDArray[np.uint32]
    num_bytes: int


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
    rows: list[tuple[int, int, int, int, int]] = []
    for span in spans:
        failpoint("data.build.span")
        count = result.sources.setdefault(span.source, SourceCount())
        for item in _encode_span(recipe, span, vocabulary, encoder, count):
            tokens.append(item.ids)
            rows.append(
                (span.source, input_index[span.source, span.path], item.position, item.hash, tokens.length)
            )
            count.num_documents += 1
            count.num_tokens += len(item.ids)
            count.num_bytes += item.num_bytes
    tokens.close()
    _write_rows(folder, rows)
    (folder / INPUTS).write_bytes(canonical_json([{"source": s, "path": p} for s, p in inputs]))
    (folder / CHECKSUMS).write_bytes(_read_checksums(folder / TOKENS))
    result.num_tokens, result.num_documents = tokens.length, len(rows)
    result.files = census(folder)
    return result


def _encode_span(
    recipe: Recipe, span: Span, vocabulary: Vocabulary, encoder: Encoder | None, count: SourceCount
) -> Iterator[_Encoded]:
    """The documents of a span as ids, each closed by the EOS id."""
    batch: list[tuple[Document, str]] = []
    size = 0
    for document in read_span(recipe, span):
        if document.is_ids:
            yield from _split_ids(
                document, vocabulary, f"source {recipe.sources[span.source].name}: {span.path}"
            )
            continue
        text = _text(recipe, span, document)
        if text is None:
            count.num_skipped += 1
            continue
        batch.append((document, text))
        size += len(document.raw)
        if size >= _BATCH_BYTES:
            yield from _encode_batch(batch, vocabulary, encoder)
            batch, size = [], 0
    yield from _encode_batch(batch, vocabulary, encoder)


def _encode_batch(
    batch: list[tuple[Document, str]], vocabulary: Vocabulary, encoder: Encoder | None
) -> Iterator[_Encoded]:
    if not batch:
        return
    if encoder is None:
        raise UsageError("the inputs are text, but tokenizer.kind is ids; take byte_bpe, bytes or path")
    for (document, _), ids in zip(batch, encoder.encode([text for _, text in batch]), strict=True):
        closed = np.append(ids, np.uint32(vocabulary.eos_id))
        yield _Encoded(document.position, xxhash.xxh3_128_intdigest(document.raw), closed, len(document.raw))


def _split_ids(document: Document, vocabulary: Vocabulary, where: str) -> Iterator[_Encoded]:
    """Documents of a row of ids: it ends at each EOS id and at the end of the row."""
    ids = np.frombuffer(document.raw, dtype="<u4")
    largest = int(ids.max())
    if largest >= vocabulary.vocab_size:
        raise UsageError(
            f"{where}, row {document.position}: token id {largest} is outside the vocabulary of "
            f"{vocabulary.vocab_size}; correct tokenizer.vocab_size or the input"
        )
    ends = np.append(np.flatnonzero(ids == vocabulary.eos_id), len(ids))
    begin = 0
    for end in ends.tolist():
        if end > begin:
            piece = ids[begin:end]
            position = document.position + (begin if document.is_stream else 0)
            raw = piece.tobytes()
            closed = np.append(piece, np.uint32(vocabulary.eos_id))
            yield _Encoded(position, xxhash.xxh3_128_intdigest(raw), closed, len(raw))
        begin = end + 1


def _text(recipe: Recipe, span: Span, document: Document) -> str | None:
    source = recipe.sources[span.source]
    try:
        return document.raw.decode("utf-8", "replace" if source.on_invalid_utf8 == "replace" else "strict")
    except UnicodeDecodeError as error:
        if source.on_invalid_utf8 == "skip":
            return None
        path = recipe.resolve(source.root) / span.path
        raise UsageError(
            f"{path}, document at {document.position}: not UTF-8 ({error.reason} at byte {error.start}); "
            f"set on_invalid_utf8: skip or replace for source {source.name}"
        ) from None


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


def _write_rows(folder: Path, rows: list[tuple[int, int, int, int, int]]) -> None:
    """The per-document arrays. One row of `rows`: source, input, position, hash, end in tokens."""
    columns = list(zip(*rows, strict=True)) if rows else [(), (), (), (), ()]
    sources, inputs, positions, hashes, stops = columns
    low = 2**64 - 1
    pairs = np.array([(value >> 64, value & low) for value in hashes], dtype="<u8").reshape(-1, 2)
    _write_array(folder / "doc_offsets", np.array([0, *stops], dtype="<u8"))
    _write_array(folder / "doc_source", np.array(sources, dtype="<u2"))
    _write_array(folder / "doc_hash", pairs)
    _write_array(folder / "doc_input", np.array(inputs, dtype="<u4"))
    _write_array(folder / "doc_position", np.array(positions, dtype="<u8"))


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
