"""Define what the readers of all formats share: documents, spans of input files, and FieldReader.

It turns a field's value into the bytes of a document:

reader = FieldReader(recipe, source)
reader.document(position, value)    # a string, bytes, messages, token ids or nothing
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from r1hpc.base.errors import UsageError
from r1hpc.base.names import nearest
from r1hpc.corpus.recipe import Recipe, SourceRecipe
from r1hpc.data.format.manifest import digest
from r1hpc.plan.model.chat_template import TOKENIZER_FILE, ChatTemplate, load_template, special_tokens

_T = TypeVar("_T")
_MAX_ID = 2**32 - 2
BATCH_BYTES = 2**20
_BATCH_ITEMS = 2**15
_BLOCK_BYTES = 2**23
BLOCK_ROWS = 1024


def rows_at_once(num_bytes: int, num_rows: int, most: int = BLOCK_ROWS) -> int:
    """Return how many rows of a table to read together: `most`, or as many as fit 8 MiB, but at least one.

    `num_bytes` is of all `num_rows`, unpacked; an estimate suffices.
    """
    return min(most, max(1, _BLOCK_BYTES * num_rows // max(1, num_bytes)))


def batched(items: Iterable[_T], size_of: Callable[[_T], int]) -> Iterator[list[_T]]:
    """Yield consecutive items in lists of about a megabyte, with a limit on their number for empty ones."""
    batch: list[_T] = []
    size = 0
    for item in items:
        batch.append(item)
        size += size_of(item)
        if size >= BATCH_BYTES or len(batch) == _BATCH_ITEMS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


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


@dataclass(frozen=True)
class Document:
    """One document as in the input: its UTF-8 bytes, or its token ids as little-endian uint32."""

    position: int
    """Place in the file: byte of the line (jsonl; unpacked if compressed), row (tables, hdf5), 0 (text)."""
    raw: bytes
    is_ids: bool = False
    is_stream: bool = False
    """Ids of many documents in one row, divided by EOS ids; `position` then counts ids."""
    prompt_bytes: int = 0
    """Traces: how many bytes of `raw` are the prompt; the rest is the completion."""
    fault: str = ""
    """Why this record is no document."""
    is_null: bool = False
    """The field exists but is empty."""
    is_chat: bool = False
    """Messages through a template: the special tokens it spells are intended."""
    size: int = 0
    """Bytes of the record in the file (unpacked), for kinds whose position counts bytes."""
    lost_bytes: int = 0
    """If more than this record is lost: bytes of the input from here on, as on disk."""


class FieldReader:
    """Converts the values of one source's field to documents."""

    def __init__(self, recipe: Recipe, source: SourceRecipe) -> None:
        self._recipe, self._source = recipe, source

    def pick(self, record: Any) -> Any:
        """Return the field's value in a JSON object or a row; `a.b` goes inside. ValueError if missing."""
        name = self._source.field
        if isinstance(record, Mapping) and name in record:
            return record[name]
        value = record
        for key in name.split("."):
            if not isinstance(value, Mapping) or key not in value:
                known = [str(item) for item in record] if isinstance(record, Mapping) else []
                raise ValueError(f"no field {name!r}{nearest(name, known)}")
            value = value[key]
        return value

    def document(self, position: int, value: Any, size: int = 0) -> Document:
        """Return the document of a value; an invalid one has a fault."""
        if isinstance(value, str):
            return Document(position, _to_bytes(value), size=size)
        if isinstance(value, bytes):
            return Document(position, value, size=size)
        is_list = isinstance(value, list | np.ndarray)
        if value is None or (is_list and not len(value)):
            return Document(position, b"", is_null=True, size=size)
        if not is_list:
            fault = f"field {self._source.field!r} is {type(value).__name__}, not a string"
            return Document(position, b"", fault=fault, size=size)
        try:
            if isinstance(value, list) and isinstance(value[0], Mapping):
                return Document(position, self._template.render(value).encode(), is_chat=True, size=size)
            return Document(position, to_ids(value), is_ids=True, size=size)
        except ValueError as error:
            return Document(position, b"", fault=str(error), size=size)

    @functools.cached_property
    def _template(self) -> ChatTemplate:
        return template_of(self._recipe, self._source)


def _to_bytes(text: str) -> bytes:
    """Return UTF-8; on_invalid_utf8 decides about other bytes and half surrogate pairs of JSON."""
    for policy in ("strict", "surrogateescape"):
        with contextlib.suppress(UnicodeEncodeError):
            return text.encode("utf-8", policy)
    return text.encode("utf-8", "surrogatepass")


def template_of(recipe: Recipe, source: SourceRecipe) -> ChatTemplate:
    """Return the chat template for a source's messages; UsageError if there is none."""
    path = source.chat_template or recipe.tokenizer.path
    if path is None:
        raise UsageError(
            f"source {source.name}: field {source.field!r} holds messages; set "
            "chat_template to a Jinja file or to the folder of a tokenizer that has one"
        )
    own = recipe.resolve(path)
    file: Path | None = None
    if recipe.tokenizer.path is not None:  # else it is made here, with EOS as its only special token
        file = recipe.resolve(recipe.tokenizer.path)
        file = file / TOKENIZER_FILE if file.is_dir() else file
    is_jinja = own.is_file() and own.name != TOKENIZER_FILE
    template = load_template(own, file.parent if file is not None and is_jinja else None)
    # Messages must not spell what the tokenizer would read, wherever the template comes from.
    read = special_tokens(file) if file is not None else (recipe.tokenizer.eos_token,)
    return replace(template, special=tuple(dict.fromkeys((*template.special, *read))))


def template_digest(recipe: Recipe, source: SourceRecipe) -> str:
    """Return a digest of what a rendering depends on: the template, and the tokens it uses or refuses."""
    template = template_of(recipe, source)
    return digest([template.source, dict(template.variables), template.special])


def to_ids(values: Any) -> bytes:
    """Return token ids as little-endian uint32; ValueError if they are not valid."""
    found = np.asarray(values)
    if found.dtype.kind not in "iu" or found.ndim != 1:
        raise ValueError(f"a list of {found.dtype}, not of token ids")
    if len(found) and (found.min() < 0 or found.max() > _MAX_ID):
        raise ValueError("token ids must lie between 0 and 2^32 - 2")
    return found.astype("<u4").tobytes()
