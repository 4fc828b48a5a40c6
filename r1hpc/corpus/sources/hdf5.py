"""Read datasets of HDF5 files: strings, rows of token ids, or one long row of ids."""

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

_SPAN_ROWS = 4096
_STREAM_IDS = 2**22
"""Ids of one long row held in memory at once."""
_FIRST_ROWS = 16
"""Rows read first if their length is unknown."""


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
    if source.max_documents is not None:
        num_rows = min(num_rows, source.max_documents)
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
