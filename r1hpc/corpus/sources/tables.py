"""Read columns of Parquet and Arrow files: strings, bytes, messages or ids, plain, nested or dictionaries."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from r1hpc.base.errors import UsageError
from r1hpc.base.names import nearest
from r1hpc.corpus.recipe import SourceRecipe
from r1hpc.corpus.sources.fields import Document, FieldReader, SourceSpan, rows_at_once
from r1hpc.data.format.errors import reason, refuse_passing

_ARROW_FILE = b"ARROW1"


def _open_parquet(source: SourceRecipe, path: Path) -> Any:
    """Open the file and check its column.

    Raises:
        UsageError: names an invalid file, or a column that is missing or of numbers.
    """
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
        stop = (
            row + info.num_rows
            if source.max_documents is None
            else min(row + info.num_rows, source.max_documents)
        )
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
        refuse_passing(error, path)
        lost = span.num_bytes * (span.stop - row) // (span.stop - span.start)
        fault = f"cannot be read as Parquet ({reason(error, path)})"
        yield Document(row, b"", fault=fault, lost_bytes=lost)


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
        refuse_passing(error, path)
        fault = f"cannot be read as Arrow ({reason(error, path)})"
        left = span.num_bytes - read
        yield Document(row, b"", fault=fault, lost_bytes=left if left > 0 else span.num_bytes)


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
