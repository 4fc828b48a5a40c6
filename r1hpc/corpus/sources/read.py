"""Read input files as documents: text, JSONL (of texts or traces), Parquet, Arrow and HDF5.

    spans = list_spans(recipe)                  # a listing: which piece of which file, in order
    for document in read_span(recipe, span):    # the reading itself

A span is the smallest piece a writer takes: a complete text file, some megabytes of JSONL lines, a Parquet
row group, some rows of HDF5. Spans depend on the inputs alone, never on who reads them.
"""

import errno
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from r1hpc.base.errors import UsageError
from r1hpc.base.names import nearest, printable
from r1hpc.base.units import format_bytes
from r1hpc.corpus.recipe import PYTHON_STDLIB, TRACES, Recipe, SourceRecipe
from r1hpc.corpus.sources import tables
from r1hpc.corpus.sources.fields import Document, FieldReader, rows_at_once, to_ids
from r1hpc.corpus.sources.globs import Excluded, files_below
from r1hpc.corpus.sources.lines import (
    MAX_RECORD_BYTES,
    Line,
    is_compressed,
    iter_lines,
    parse_json,
    parse_trace,
)
from r1hpc.data.format.errors import reason, refuse_passing

_SPAN_BYTES = 4 * 2**20
_SPAN_ROWS = 4096
_UNREADABLE = -1
_STREAM_IDS = 2**22
"""Ids of one long row held in memory at once."""
_FIRST_ROWS = 16
"""Rows read first if their length is unknown."""
_STDLIB_EXCLUDE = ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__")


@dataclass(frozen=True)
class SourceSpan:
    """A piece of one input file. `start` and `stop` count bytes (text, jsonl) or rows (parquet, hdf5)."""

    source: int
    path: str
    """Relative to the source's root."""
    start: int
    stop: int
    num_bytes: int
    """Input bytes, for dividing the work; an estimate for parquet."""
    group: int = 0
    """Parquet: the row group."""
    fault: str = ""
    """Why the file cannot be opened at all."""


def list_spans(recipe: Recipe, *, is_new: bool = False) -> list[SourceSpan]:
    """Return all spans of a recipe, in the order in which their documents are stored.

    Args:
        is_new: this recipe has made nothing yet; then an exclude that leaves out nothing is an error.

    Raises:
        UsageError: a root that is not there, a glob that matches nothing, a column that does not exist.
    """
    spans: list[SourceSpan] = []
    for index, source in enumerate(recipe.sources):
        root = recipe.resolve(source.root)
        for name, size in _list_files(source, root, is_new):
            spans.extend(_spans_or_aside(recipe, index, root, name, size))
    if not spans:
        places = ", ".join(
            f"{source.name}: {source.glob} in {recipe.resolve(source.root)}" for source in recipe.sources
        )
        raise UsageError(f"the inputs are empty: no documents in any source ({places})")
    return spans


def read_span(recipe: Recipe, span: SourceSpan) -> Iterator[Document]:
    """Yield the documents of one span, without empty ones."""
    return (document for document in read_records(recipe, span) if document.raw or document.fault)


def read_records(recipe: Recipe, span: SourceSpan) -> Iterator[Document]:
    """Yield every record of one span: documents, empty and unreadable ones."""
    source = recipe.sources[span.source]
    path = recipe.resolve(source.root) / span.path
    fields = FieldReader(recipe, source)
    if span.fault:
        return iter([Document(0, b"", fault=span.fault, lost_bytes=span.num_bytes)])
    return _READERS[source.kind](source, path, span, fields)


def _spans_or_aside(recipe: Recipe, index: int, root: Path, name: str, size: int) -> Iterator[SourceSpan]:
    """Yield the spans of a file, or one faulty span if it cannot be opened and may be put aside."""
    try:
        yield from _file_spans(recipe.sources[index], index, root, name, size)
    except UsageError as error:
        if not recipe.max_unreadable:
            raise
        # Records put aside are part of the dataset, whose id must not depend on where inputs lie.
        fault = str(error).replace(str(root / name), name)
        yield SourceSpan(index, name, 0, 1, max(0, size), fault=fault)


def _list_files(source: SourceRecipe, root: Path, is_new: bool) -> list[tuple[str, int]]:
    if not root.is_dir():
        raise UsageError(f"source {source.name}: root {root} is not a folder")
    excluded = Excluded(source.exclude + (_STDLIB_EXCLUDE if source.root == PYTHON_STDLIB else ()))
    names = sorted(files_below(root, source.glob, excluded))
    for entry in source.exclude if is_new else ():
        is_hidden = any(name.startswith(".") for name in entry.split("/"))  # always left out
        if entry in excluded.idle and not is_hidden:  # unwanted files may be in
            raise UsageError(
                f"source {source.name}: exclude {entry!r} leaves out nothing under {root}: correct it (a "
                "name, a pattern of names, or a path below root), or take it out"
            )
    if source.kind == "arrow":
        names = [name for name in names if not _lies_beside_arrow(Path(name).name, Path(source.glob).name)]
    if not names:
        raise UsageError(f"source {source.name}: no file under {root} matches {source.glob!r}")
    for name in names:
        if not name.isascii() and name.encode("utf-8", "replace").decode() != name:
            raise UsageError(
                f"the name of {printable(str(root / name))} is not UTF-8: rename it, or exclude it"
            )
    return _limit([(name, _size(root / name)) for name in names], source)


def _lies_beside_arrow(name: str, asked: str) -> bool:
    """True for `datasets` files beside the data (descriptions, map() and filter() results), unless named."""
    is_cache = name.startswith("cache-") and not asked.startswith("cache-")
    return is_cache or (name.endswith(".json") and not asked.endswith(".json"))


def _size(path: Path) -> int:
    """Return the bytes; _UNREADABLE for a broken link and the like."""
    try:
        return path.stat().st_size
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            refuse_passing(error, path)
        return _UNREADABLE


def _limit(files: list[tuple[str, int]], source: SourceRecipe) -> list[tuple[str, int]]:
    if source.max_bytes is None:
        return files
    kept, total = [], 0
    for name, size in files:
        if total + max(0, size) <= source.max_bytes:
            kept.append((name, size))
            total += max(0, size)
    if not kept:
        raise UsageError(f"source {source.name}: max_bytes {source.max_bytes} is smaller than every file")
    return kept


def _file_spans(source: SourceRecipe, index: int, root: Path, name: str, size: int) -> Iterator[SourceSpan]:
    if size == _UNREADABLE:
        raise UsageError(f"{root / name} cannot be read: it is gone, or a link that leads nowhere")
    is_lines = source.kind in ("jsonl", TRACES)
    if source.kind == "text" or (is_lines and (is_compressed(name) or source.max_documents)):
        if size:
            yield SourceSpan(index, name, 0, size, size)
    elif is_lines:
        for start in range(0, size, _SPAN_BYTES):
            stop = min(start + _SPAN_BYTES, size)
            yield SourceSpan(index, name, start, stop, stop - start)
    elif source.kind == "parquet":
        yield from _parquet_spans(source, index, root / name, name)
    elif source.kind == "arrow":
        if size:
            yield SourceSpan(index, name, 0, source.max_documents or 2**62, size)
    else:
        yield from _hdf5_spans(source, index, root / name, name, size)


# --- text -----------------------------------------------------------------------------------------


def _read_text(source: SourceRecipe, path: Path, span: SourceSpan, fields: FieldReader) -> Iterator[Document]:
    if span.stop > MAX_RECORD_BYTES:
        most = format_bytes(MAX_RECORD_BYTES)
        fault = f"a document of {format_bytes(span.stop)}; at most {most}"
        yield Document(0, b"", fault=fault, size=span.stop, lost_bytes=span.num_bytes)
        return
    try:
        raw = path.read_bytes()
    except OSError as error:
        refuse_passing(error, path)
        fault = f"cannot be read ({error.strerror})"
        yield Document(0, b"", fault=fault, size=span.stop, lost_bytes=span.num_bytes)
        return
    yield Document(0, raw, size=len(raw))


# --- JSONL ----------------------------------------------------------------------------------------


def _read_jsonl(
    source: SourceRecipe, path: Path, span: SourceSpan, fields: FieldReader
) -> Iterator[Document]:
    # map and islice hold no line while its document is in use: it may be large.
    return map(functools.partial(_line_document, fields), _read_lines(source, path, span))


def _line_document(fields: FieldReader, line: Line) -> Document:
    size = len(line.raw)
    if line.fault:
        return Document(line.position, b"", fault=line.fault, size=size, lost_bytes=line.lost_bytes)
    try:
        value = parse_json(line.raw, fields.pick)
    except ValueError as error:
        return Document(line.position, b"", fault=str(error), size=size)
    return fields.document(line.position, value, size)


def _read_lines(source: SourceRecipe, path: Path, span: SourceSpan) -> Iterator[Line]:
    stop = None if is_compressed(path.name) else span.stop
    return islice(iter_lines(path, span.start, stop), source.max_documents)


# --- Traces ---------------------------------------------------------------------------------------


def _read_traces(
    source: SourceRecipe, path: Path, span: SourceSpan, fields: FieldReader
) -> Iterator[Document]:
    for line in _read_lines(source, path, span):
        if line.fault:
            yield Document(line.position, b"", fault=line.fault)
            continue
        try:
            prompt, completion = parse_trace(line.raw, source.prompt_field, source.completion_field)
        except ValueError as error:
            yield Document(line.position, b"", fault=str(error))
        else:
            yield Document(line.position, prompt + completion, prompt_bytes=len(prompt))


# --- Parquet, Arrow -------------------------------------------------------------------------------


def _parquet_spans(source: SourceRecipe, index: int, path: Path, name: str) -> Iterator[SourceSpan]:
    metadata = tables.open_parquet(source, path).metadata
    row = 0
    for group in range(metadata.num_row_groups):
        info = metadata.row_group(group)
        stop = (
            row + info.num_rows
            if source.max_documents is None
            else min(row + info.num_rows, source.max_documents)
        )
        if row < stop:
            yield SourceSpan(index, name, row, stop, info.total_byte_size, group)
        row += info.num_rows


def _read_parquet(
    source: SourceRecipe, path: Path, span: SourceSpan, fields: FieldReader
) -> Iterator[Document]:
    return tables.read_parquet(source, path, span.group, span.start, span.stop, span.num_bytes, fields)


def _read_arrow(
    source: SourceRecipe, path: Path, span: SourceSpan, fields: FieldReader
) -> Iterator[Document]:
    return tables.read_arrow(source, path, span.num_bytes, fields)


# --- HDF5 -----------------------------------------------------------------------------------------


def _hdf5_dataset(source: SourceRecipe, path: Path, file: Any) -> Any:
    """Return the dataset, checked: strings, rows of integers, or one row of integers."""
    import h5py

    names: list[str] = []
    file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    field = source.field.strip("/")
    if field not in names:
        raise UsageError(f"{path}: no dataset {source.field!r}{nearest(field, names)}")
    dataset = file[field]
    is_string = h5py.check_string_dtype(dataset.dtype) is not None
    element = h5py.check_vlen_dtype(dataset.dtype) or dataset.dtype
    is_ids = not is_string and np.issubdtype(element, np.integer) and dataset.ndim in (1, 2)
    if not (is_ids or (is_string and dataset.ndim == 1)):
        raise UsageError(
            f"{path}: dataset {source.field!r} has dtype {dataset.dtype} and {dataset.ndim} dimensions; "
            "expected a row of strings, or rows of integer token ids"
        )
    return dataset


def _open_hdf5(path: Path) -> Any:
    import h5py

    try:
        return h5py.File(path, "r")
    except OSError as error:
        refuse_passing(error, path)
        raise UsageError(f"{path} cannot be read as HDF5: {error}") from None


def _hdf5_spans(source: SourceRecipe, index: int, path: Path, name: str, size: int) -> Iterator[SourceSpan]:
    with _open_hdf5(path) as file:
        dataset = _hdf5_dataset(source, path, file)
        num_rows = len(dataset)
        flat = _is_stream(dataset)
    if flat and source.max_documents is not None:
        raise UsageError(
            f"{path}: dataset {source.field!r} is one row of ids, which max_documents cannot cut; "
            "leave it out"
        )
    if flat:
        # One long stream of ids: only its EOS ids end documents, so one reader takes it all.
        yield SourceSpan(index, name, 0, num_rows, size)
        return
    if source.max_documents is not None:
        num_rows = min(num_rows, source.max_documents)
    for start in range(0, num_rows, _SPAN_ROWS):
        stop = min(start + _SPAN_ROWS, num_rows)
        yield SourceSpan(index, name, start, stop, max(1, size * (stop - start) // max(1, num_rows)))


def _read_hdf5(source: SourceRecipe, path: Path, span: SourceSpan, fields: FieldReader) -> Iterator[Document]:
    """Read blocks of rows, closing the file before the first document of a block is returned.

    A half-read HDF5 file beside zarr's own thread can deadlock: the garbage collector may close h5py
    objects on that thread while this one holds HDF5's lock (hdmf-zarr issue 362).
    """
    start, num_bytes = span.start, 0
    while start < span.stop:
        try:
            with _open_hdf5(path) as file:
                dataset = _hdf5_dataset(source, path, file)
                stop = min(span.stop, start + _rows_of_block(dataset, num_bytes, start - span.start))
                rows = dataset[start:stop]
        except OSError as error:
            refuse_passing(error, path)
            lost = span.num_bytes * (span.stop - start) // (span.stop - span.start)
            fault = f"cannot be read as HDF5 ({reason(error, path)})"
            yield Document(start, b"", fault=fault, lost_bytes=lost)
            return
        if _is_stream(rows):
            yield Document(start, _ids(rows, path, start), is_ids=True, is_stream=True)
        else:
            for row, value in enumerate(rows, start):
                if isinstance(value, bytes | str):
                    yield fields.document(row, value)
                else:
                    yield Document(row, _ids(np.asarray(value), path, row), is_ids=True)
        num_bytes += _num_bytes(rows)
        start = stop


def _is_stream(rows: Any) -> bool:
    """True if a dataset, or a piece of it, is one long row of ids."""
    return rows.dtype.kind in "iu" and rows.ndim == 1


def _num_bytes(rows: npt.NDArray[Any]) -> int:
    if rows.dtype.kind != "O":
        return rows.nbytes
    return sum(value.nbytes if isinstance(value, np.ndarray) else len(value) for value in rows)


def _rows_of_block(dataset: Any, num_bytes: int, num_rows: int) -> int:
    """Return how many rows to read together, from the `num_bytes` of the `num_rows` before them."""
    if _is_stream(dataset):
        return _STREAM_IDS
    count = rows_at_once(num_bytes, num_rows, _SPAN_ROWS) if num_rows else _FIRST_ROWS
    # Rows of one length lie in the chunks, each unpacked completely whenever it is touched.
    chunk = dataset.chunks[0] if dataset.chunks and dataset.dtype.kind != "O" else 1
    return -(-count // chunk) * int(chunk)


def _ids(values: npt.NDArray[Any], path: Path, row: int) -> bytes:
    try:
        return to_ids(values)
    except ValueError as error:
        raise UsageError(f"{path}, row {row}: {error}") from None


_READERS = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    TRACES: _read_traces,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
    "hdf5": _read_hdf5,
}
