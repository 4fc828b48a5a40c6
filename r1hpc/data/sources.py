"""Input files into documents: text trees, JSONL (of texts or of traces), Parquet and HDF5.

    spans = list_spans(recipe)                  # a listing: which piece of which file, in order
    for document in read_span(recipe, span):    # the reading itself

A span is the smallest piece a writer takes: a whole text file, some megabytes of JSONL lines, a Parquet
row group, some rows of HDF5. Spans depend on the inputs alone, never on who reads them.
"""

import gzip
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from r1hpc.base.errors import UsageError
from r1hpc.base.names import nearest
from r1hpc.data.recipe import PYTHON_STDLIB, TRACES, Recipe, SourceRecipe

_SPAN_BYTES = 4 * 2**20
_SPAN_ROWS = 4096
_STDLIB_EXCLUDE = ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__")


@dataclass(frozen=True)
class Span:
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


@dataclass(frozen=True)
class Document:
    """One document as it lies in the input: its UTF-8 bytes, or its token ids as little-endian uint32."""

    position: int
    """Where in the file: byte of the line (jsonl; unpacked for .gz), row (parquet, hdf5), 0 (text)."""
    raw: bytes
    is_ids: bool = False
    is_stream: bool = False
    """Ids of many documents in one row, divided by EOS ids; `position` then counts ids."""
    prompt_bytes: int = 0
    """Traces: how many bytes of `raw` are the prompt; the rest is the completion."""
    fault: str = ""
    """Traces: why this line is none."""


def list_spans(recipe: Recipe) -> list[Span]:
    """All spans of a recipe, in the order in which their documents are stored.

    Raises:
        UsageError: a root that is not there, a glob that matches nothing, a column that does not exist.
    """
    spans: list[Span] = []
    for index, source in enumerate(recipe.sources):
        root = recipe.resolve(source.root)
        for name, size in _list_files(source, root):
            spans.extend(_file_spans(source, index, root, name, size))
    if not spans:
        raise UsageError("the inputs are empty: no documents in any source")
    return spans


def read_span(recipe: Recipe, span: Span) -> Iterator[Document]:
    """The documents of one span, empty ones left out."""
    source = recipe.sources[span.source]
    path = recipe.resolve(source.root) / span.path
    return (
        document for document in _READERS[source.kind](source, path, span) if document.raw or document.fault
    )


def _list_files(source: SourceRecipe, root: Path) -> list[tuple[str, int]]:
    if not root.is_dir():
        raise UsageError(f"source {source.name}: root {root} is not a folder")
    excluded = source.exclude + (_STDLIB_EXCLUDE if source.root == PYTHON_STDLIB else ())
    names = sorted(_walk(root, source.glob, excluded))
    if not names:
        raise UsageError(f"source {source.name}: no file under {root} matches {source.glob!r}")
    return _limit([(name, (root / name).stat().st_size) for name in names], source)


def _walk(root: Path, pattern: str, excluded: tuple[str, ...]) -> Iterator[str]:
    """Relative POSIX paths. Links to folders are not followed, so a loop of links ends."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in excluded and not name.startswith(".")]
        for name in files:
            relative = (Path(folder) / name).relative_to(root).as_posix()
            if name not in excluded and not name.startswith(".") and _matches(relative, pattern):
                yield relative


def _matches(relative: str, pattern: str) -> bool:
    """Glob match in which a leading `**/` also matches no folder at all."""
    if pattern.startswith("**/"):
        return fnmatch(relative, pattern) or _matches(relative, pattern[3:])
    return fnmatch(relative, pattern) and (pattern.count("/") == relative.count("/") or "**" in pattern)


def _limit(files: list[tuple[str, int]], source: SourceRecipe) -> list[tuple[str, int]]:
    if source.max_bytes is None:
        return files
    kept, total = [], 0
    for name, size in files:
        if total + size <= source.max_bytes:
            kept.append((name, size))
            total += size
    if not kept:
        raise UsageError(f"source {source.name}: max_bytes {source.max_bytes} is smaller than every file")
    return kept


def _file_spans(source: SourceRecipe, index: int, root: Path, name: str, size: int) -> Iterator[Span]:
    is_lines = source.kind in ("jsonl", TRACES)
    if source.kind == "text" or (is_lines and (name.endswith(".gz") or source.max_documents)):
        if size:
            yield Span(index, name, 0, size, size)
    elif is_lines:
        for start in range(0, size, _SPAN_BYTES):
            stop = min(start + _SPAN_BYTES, size)
            yield Span(index, name, start, stop, stop - start)
    elif source.kind == "parquet":
        yield from _parquet_spans(source, index, root / name, name)
    else:
        yield from _hdf5_spans(source, index, root / name, name, size)


# --- text -----------------------------------------------------------------------------------------


def _read_text(source: SourceRecipe, path: Path, span: Span) -> Iterator[Document]:
    yield Document(0, path.read_bytes())


# --- JSONL ----------------------------------------------------------------------------------------


def _read_jsonl(source: SourceRecipe, path: Path, span: Span) -> Iterator[Document]:
    for position, line in _read_lines(source, path, span):
        yield Document(position, _line_text(source, path, position, line))


def _read_lines(source: SourceRecipe, path: Path, span: Span) -> Iterator[tuple[int, bytes]]:
    """The lines that begin inside the span, so that neighbours share no line and leave none out.

    Yields each with the byte it begins at; blank ones are left out.
    """
    with _open_lines(path) as file:
        position = span.start
        if span.start:
            file.seek(span.start - 1)
            position += len(file.readline()) - 1
        taken = 0
        compressed = path.name.endswith(".gz")
        while (compressed or position < span.stop) and taken != source.max_documents:
            line = file.readline()
            if not line:
                return
            if line.strip():
                yield position, line
                taken += 1
            position += len(line)


def _open_lines(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb")  # type: ignore[return-value]


def _line_text(source: SourceRecipe, path: Path, position: int, line: bytes) -> bytes:
    where = f"{path}, line at byte {position}"
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not JSON ({error}); kind: jsonl needs one JSON object a line") from None
    if not isinstance(value, dict) or source.field not in value:
        known = list(value) if isinstance(value, dict) else []
        raise UsageError(f"{where}: no field {source.field!r}{nearest(source.field, known)}")
    text = value[source.field]
    if not isinstance(text, str):
        raise UsageError(f"{where}: field {source.field!r} is {type(text).__name__}, not a string")
    return text.encode(
        "utf-8", "surrogatepass"
    )  # JSON may escape half a surrogate pair; on_invalid_utf8 decides


# --- Traces ---------------------------------------------------------------------------------------


def line_number(path: Path, position: int) -> int:
    """The number, from 1, of the line that begins at byte `position` (unpacked, for .gz)."""
    number = 1
    with _open_lines(path) as file:
        while position > 0 and (block := file.read(min(position, _SPAN_BYTES))):
            number += block.count(b"\n")
            position -= len(block)
    return number


def _read_traces(source: SourceRecipe, path: Path, span: Span) -> Iterator[Document]:
    for position, line in _read_lines(source, path, span):
        try:
            prompt, completion = _parse_trace(source, line)
        except ValueError as error:
            yield Document(position, b"", fault=str(error))
        else:
            yield Document(position, prompt + completion, prompt_bytes=len(prompt))


def _parse_trace(source: SourceRecipe, line: bytes) -> tuple[bytes, bytes]:
    """Prompt and completion as UTF-8; ValueError says what is wrong with the line."""
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start} of the line)") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__}, not an object with {source.prompt_field!r}")
    return _trace_field(value, source.prompt_field), _trace_field(value, source.completion_field)


def _trace_field(value: dict[str, Any], name: str) -> bytes:
    if name not in value:
        raise ValueError(f"no field {name!r}{nearest(name, value)}")
    text = value[name]
    if not isinstance(text, str):
        raise ValueError(f"field {name!r} is {type(text).__name__}, not a string")
    if not text:
        raise ValueError(f"field {name!r} is empty")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"field {name!r} is not UTF-8 (half a surrogate pair at {error.start})") from None


# --- Parquet --------------------------------------------------------------------------------------


def _parquet_file(source: SourceRecipe, path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UsageError(f"{path} cannot be read as Parquet: {error}") from None
    schema = file.schema_arrow
    if source.field not in schema.names:
        raise UsageError(f"{path}: no column {source.field!r}{nearest(source.field, schema.names)}")
    kind = schema.field(source.field).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise UsageError(f"{path}: column {source.field!r} has type {kind}, expected string")
    return file


def _parquet_spans(source: SourceRecipe, index: int, path: Path, name: str) -> Iterator[Span]:
    metadata = _parquet_file(source, path).metadata
    row = 0
    for group in range(metadata.num_row_groups):
        info = metadata.row_group(group)
        stop = (
            row + info.num_rows
            if source.max_documents is None
            else min(row + info.num_rows, source.max_documents)
        )
        if row < stop:
            yield Span(index, name, row, stop, info.total_byte_size, group)
        row += info.num_rows


def _read_parquet(source: SourceRecipe, path: Path, span: Span) -> Iterator[Document]:
    row = span.start
    batches = _parquet_file(source, path).iter_batches(_SPAN_ROWS, [span.group], [source.field])
    for batch in batches:
        for value in batch.column(0).to_pylist():
            if value is not None and row < span.stop:
                yield Document(row, value.encode())
            row += 1


# --- HDF5 -----------------------------------------------------------------------------------------


def _hdf5_dataset(source: SourceRecipe, path: Path, file: Any) -> Any:
    """The dataset, checked: strings, rows of integers, or one row of integers."""
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
        raise UsageError(f"{path} cannot be read as HDF5: {error}") from None


def _hdf5_spans(source: SourceRecipe, index: int, path: Path, name: str, size: int) -> Iterator[Span]:
    import h5py

    with _open_hdf5(path) as file:
        dataset = _hdf5_dataset(source, path, file)
        num_rows = len(dataset)
        flat = (
            dataset.ndim == 1 and dataset.dtype.kind in "iu" and h5py.check_vlen_dtype(dataset.dtype) is None
        )
    if flat:
        # One long stream of ids: only its EOS ids say where documents end, so one reader takes it whole.
        yield Span(index, name, 0, num_rows, size)
        return
    if source.max_documents is not None:
        num_rows = min(num_rows, source.max_documents)
    for start in range(0, num_rows, _SPAN_ROWS):
        stop = min(start + _SPAN_ROWS, num_rows)
        yield Span(index, name, start, stop, max(1, size * (stop - start) // max(1, num_rows)))


def _read_hdf5(source: SourceRecipe, path: Path, span: Span) -> Iterator[Document]:
    """h5py is done and its file closed before the first document leaves.

    A half-read HDF5 file beside zarr's own thread can deadlock: the garbage collector may close h5py
    objects on that thread while this one holds HDF5's lock (hdmf-zarr issue 362).
    """
    with _open_hdf5(path) as file:
        rows = _hdf5_dataset(source, path, file)[span.start : span.stop]
    if rows.dtype.kind in "iu" and rows.ndim == 1:
        yield Document(span.start, _ids(rows, path, span.start), is_ids=True, is_stream=True)
        return
    for row, value in enumerate(rows, span.start):
        if isinstance(value, bytes | str):
            raw = value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass")
            yield Document(row, raw)
        else:
            yield Document(row, _ids(np.asarray(value), path, row), is_ids=True)


def _ids(values: npt.NDArray[Any], path: Path, row: int) -> bytes:
    if len(values) and (values.min() < 0 or values.max() >= 2**32 - 1):
        raise UsageError(f"{path}, row {row}: token ids must lie between 0 and 2^32 - 2")
    return values.astype("<u4").tobytes()


_READERS = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    TRACES: _read_traces,
    "parquet": _read_parquet,
    "hdf5": _read_hdf5,
}
