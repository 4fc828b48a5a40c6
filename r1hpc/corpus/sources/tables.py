"""Read rows of Parquet, Arrow and HDF5 files: strings, bytes, messages or ids.

Columns of Parquet and Arrow may be nested or dictionaries; an HDF5 dataset may be one long row of ids.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from r1hpc.base.errors import UsageError
from r1hpc.base.names import nearest
from r1hpc.corpus.recipe import SourceRecipe
from r1hpc.corpus.sources.fields import Document, FieldReader, SourceSpan, rows_at_once, to_ids
from r1hpc.data.format.errors import reason, refuse_passing

_ARROW_FILE = b"ARROW1"
_SPAN_ROWS = 4096
ALL_ROWS = 2**62
"""The stop of a span whose rows are not counted."""
_STREAM_IDS = 2**22
"""Ids of one long row held in memory at once."""
_FIRST_ROWS = 16
"""Rows read first if their length is unknown."""


def _open_parquet(source: SourceRecipe, path: Path) -> Any:
    """Open the file; UsageError if it is invalid, or its column is missing or of numbers."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        refuse_passing(error, path)
        raise UsageError(f"{path} cannot be read as Parquet: {error}") from None
    _check_column(source, path, file.schema_arrow)
    return file


def parquet_spans(source: SourceRecipe, index: int, path: Path, name: str) -> Iterator[SourceSpan]:
    """Yield the row groups of a file."""
    metadata = _open_parquet(source, path).metadata
    row = 0
    for group in range(metadata.num_row_groups):
        info = metadata.row_group(group)
        stop = min(row + info.num_rows, source.max_documents or ALL_ROWS)
        if row < stop:
            yield SourceSpan(index, name, row, stop, info.total_byte_size, group)
        row += info.num_rows


def read_parquet(
    source: SourceRecipe, path: Path, span: SourceSpan, fields: FieldReader
) -> Iterator[Document]:
    """Yield the rows of a span, which begins where its row group begins."""
    import pyarrow

    row = span.start
    try:
        file = _open_parquet(source, path)
        info = file.metadata.row_group(span.group)
        columns = (info.column(number) for number in range(info.num_columns))
        read = (each for each in columns if each.path_in_schema.split(".")[0] == source.field.split(".")[0])
        at_once = rows_at_once(sum(each.total_uncompressed_size for each in read), info.num_rows)
        for batch in file.iter_batches(at_once, [span.group], [source.field]):
            yield from _documents(batch, row, span.stop, fields)
            row += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        yield _unreadable(error, path, "Parquet", row, _bytes_from(row, span))


def read_arrow(source: SourceRecipe, path: Path, span: SourceSpan, fields: FieldReader) -> Iterator[Document]:
    """Yield all rows of an Arrow file, stream or file format, as written by `datasets` with save_to_disk."""
    import pyarrow

    row = read = 0
    try:
        for batch in _open_arrow(source, path):
            yield from _documents(batch, row, span.stop, fields)
            row += batch.num_rows
            read += batch.nbytes
            if row >= span.stop:
                return
    except (pyarrow.ArrowException, OSError) as error:
        left = span.num_bytes - read
        yield _unreadable(error, path, "Arrow", row, left if left > 0 else span.num_bytes)


def _unreadable(error: Exception, path: Path, kind: str, row: int, lost_bytes: int) -> Document:
    """Return the fault of all rows from this one on; DataError if it may pass."""
    refuse_passing(error, path)
    fault = f"cannot be read as {kind} ({reason(error, path)})"
    return Document(row, b"", fault=fault, lost_bytes=lost_bytes)


def _bytes_from(row: int, span: SourceSpan) -> int:
    """Estimate the bytes of a span from a row on."""
    return span.num_bytes * (span.stop - row) // (span.stop - span.start)


def _open_arrow(source: SourceRecipe, path: Path) -> Iterator[Any]:
    import pyarrow

    with pyarrow.memory_map(str(path)) as mapped:
        # A file starts with its name; a stream, which datasets.save_to_disk writes, does not.
        is_file = mapped.read(len(_ARROW_FILE)) == _ARROW_FILE
        mapped.seek(0)
        if is_file:
            stream = pyarrow.ipc.open_file(mapped)
            batches = (stream.get_batch(number) for number in range(stream.num_record_batches))
        else:
            stream = pyarrow.ipc.open_stream(mapped)
            batches = iter(stream)
        _check_column(source, path, stream.schema)
        yield from batches


def _documents(batch: Any, row: int, stop: int, fields: FieldReader) -> Iterator[Document]:
    at_once = rows_at_once(batch.nbytes, batch.num_rows)
    blocks = (batch.slice(start, at_once) for start in range(0, batch.num_rows, at_once))
    for record in (record for block in blocks for record in _records(block)):
        if row >= stop:
            return
        try:
            if record is None:
                raise ValueError("holds a string that is not UTF-8")
            value = fields.pick(record)
        except ValueError as error:  # a struct that is null in this row
            yield Document(row, b"", fault=str(error))
        else:
            yield fields.document(row, value)
        row += 1


def _records(batch: Any) -> Iterator[dict[str, Any] | None]:
    """Yield the rows; one with a string that is not UTF-8 has bytes for strings, and on_invalid_utf8 decides.

    None if that string is inside a list, as in messages.
    """
    try:
        yield from batch.to_pylist()
        return
    except UnicodeDecodeError:
        pass
    import pyarrow

    schema = pyarrow.schema([(field.name, _with_bytes(field.type)) for field in batch.schema])
    as_bytes = batch.cast(schema)
    for number in range(batch.num_rows):
        record = None
        try:
            (record,) = batch.slice(number, 1).to_pylist()
        except UnicodeDecodeError:
            with contextlib.suppress(UnicodeDecodeError):
                (record,) = as_bytes.slice(number, 1).to_pylist()
        yield record


def _with_bytes(kind: Any) -> Any:
    """Return the type with bytes for strings, also inside structs; dictionaries are decoded."""
    import pyarrow

    types = pyarrow.types
    if types.is_dictionary(kind):
        return _with_bytes(kind.value_type)
    if types.is_struct(kind):
        inner = [kind.field(number) for number in range(kind.num_fields)]
        return pyarrow.struct([(field.name, _with_bytes(field.type)) for field in inner])
    if types.is_string(kind) or types.is_string_view(kind):
        return pyarrow.binary()
    return pyarrow.large_binary() if types.is_large_string(kind) else kind


def _check_column(source: SourceRecipe, path: Path, schema: Any) -> None:
    import pyarrow

    name = source.field
    top, _, rest = (name, "", "") if name in schema.names else name.partition(".")
    if top not in schema.names:
        raise UsageError(f"{path}: no column {name!r}{nearest(name, schema.names)}")
    kind = schema.field(top).type
    for key in filter(None, rest.split(".")):
        if not pyarrow.types.is_struct(kind) or kind.get_field_index(key) < 0:
            known = [kind.field(i).name for i in range(kind.num_fields)] if kind.num_fields else []
            raise UsageError(f"{path}: no field {name!r}{nearest(key, known)} in column {top!r}")
        kind = kind.field(key).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    types = pyarrow.types
    is_text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    is_bytes = types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    if not (is_text or is_bytes or is_list):
        raise UsageError(f"{path}: column {name!r} has type {kind}, expected string, binary, messages or ids")


# --- HDF5 -----------------------------------------------------------------------------------------


def _hdf5_dataset(source: SourceRecipe, path: Path, file: Any) -> Any:
    """Return the dataset, checked: strings, rows of integers, or one row of integers."""
    import h5py

    field = source.field.strip("/")
    group, _, last = field.rpartition("/")
    dataset, broken = None, ""
    with contextlib.suppress(KeyError, ValueError, RuntimeError):  # RuntimeError: a circle of links
        parent = file[group or "/"]
        if isinstance(parent, h5py.Group) and last in list(parent):  # lists links without a target too
            broken = "; its link cannot be followed; correct the link or name the dataset itself"
            dataset, broken = parent[last], ""
    if not isinstance(dataset, h5py.Dataset):
        names: list[str] = []
        file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        raise UsageError(f"{path}: no dataset {source.field!r}{broken or nearest(field, names)}")
    others = {dataset.file.filename} - {file.filename}
    if dataset.is_virtual:  # h5py fills rows of a missing file with zeros
        others.update(part.file_name for part in dataset.virtual_sources() if part.file_name != ".")
    others.update(name for name, _, _ in dataset.external or ())
    if others:
        raise UsageError(
            f"{path}: dataset {source.field!r} lies in another file, {min(others)}, which a build does not "
            "check for changes; name that file as the input, or copy the data into this one"
        )
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


def hdf5_spans(source: SourceRecipe, index: int, path: Path, name: str, size: int) -> Iterator[SourceSpan]:
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
    num_rows = min(num_rows, source.max_documents or ALL_ROWS)
    for start in range(0, num_rows, _SPAN_ROWS):
        stop = min(start + _SPAN_ROWS, num_rows)
        yield SourceSpan(index, name, start, stop, max(1, size * (stop - start) // max(1, num_rows)))


def read_hdf5(source: SourceRecipe, path: Path, span: SourceSpan, fields: FieldReader) -> Iterator[Document]:
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
            yield _unreadable(error, path, "HDF5", start, _bytes_from(start, span))
            return
        if _is_stream(rows):
            yield Document(start, _ids(rows, path, start), is_ids=True, is_stream=True)
        else:
            for row, value in enumerate(rows, start):
                if isinstance(value, bytes | str):
                    yield fields.document(row, value)
                else:
                    yield Document(row, _ids(np.asarray(value), path, row), is_ids=True)
        sizes = (value.nbytes if isinstance(value, np.ndarray) else len(value) for value in rows)
        num_bytes += sum(sizes) if rows.dtype.kind == "O" else rows.nbytes
        start = stop


def _is_stream(rows: Any) -> bool:
    """True if a dataset, or a piece of it, is one long row of ids."""
    return rows.dtype.kind in "iu" and rows.ndim == 1


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
