"""Read input files as documents: text, JSONL (of texts or traces), Parquet, Arrow and HDF5.

    spans = list_spans(recipe)                  # a listing: which piece of which file, in order
    for document in read_span(recipe, span):    # the reading itself

A span is the smallest piece a writer takes: a complete text or Arrow file, some megabytes of JSONL lines, a
Parquet row group, some rows of HDF5. Spans depend on the inputs alone, never on who reads them. lines.py and
tables.py read the formats.
"""

import errno
import fnmatch
import functools
import os
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from r1hpc.base.errors import UsageError
from r1hpc.base.names import printable
from r1hpc.base.units import format_bytes
from r1hpc.corpus.recipe import PYTHON_STDLIB, TRACES, Recipe, SourceRecipe
from r1hpc.corpus.sources import lines, tables
from r1hpc.corpus.sources.fields import Document, FieldReader, SourceSpan
from r1hpc.corpus.sources.lines import MAX_RECORD_BYTES, Line, is_compressed
from r1hpc.data.format.errors import refuse_passing

_SPAN_BYTES = 4 * 2**20
_UNREADABLE = -1
_PIECES = re.compile(r"((?:^|(?<=/))\*\*/|\*\*|\*|\?|\[!?\]?[^\]]*\])")
_MEANINGS = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
_STDLIB_EXCLUDE = ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__")


def list_spans(recipe: Recipe, *, is_new: bool = False) -> list[SourceSpan]:
    """Return all spans of a recipe, in the order in which their documents are stored.

    With `is_new` this recipe has made nothing yet; then an exclude that leaves out nothing is an error. Raise
    UsageError for a root that is not there, a glob that matches nothing, or a column that does not exist.
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
    """Yield every record of one span: documents, empty and unreadable ones."""
    source = recipe.sources[span.source]
    path = recipe.input_path(span.source, span.path)
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
    files = [(name, _size(root / name)) for name in names]
    if source.max_bytes is None:
        return files
    left, kept = source.max_bytes, []
    for name, size in files:
        if size <= left:
            kept.append((name, size))
            left -= max(0, size)  # _UNREADABLE is less
    if not kept:
        raise UsageError(f"source {source.name}: max_bytes {source.max_bytes} is smaller than every file")
    return kept


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
        yield from tables.parquet_spans(source, index, root / name, name)
    elif source.kind == "arrow":
        if size:
            yield SourceSpan(index, name, 0, source.max_documents or tables.ALL_ROWS, size)
    else:
        yield from tables.hdf5_spans(source, index, root / name, name, size)


class Excluded:
    """Files and folders to leave out.

    An entry without `/` is the name of a file or folder anywhere, or a pattern of such names; one with `/`
    is a pattern of paths below the root. `/` at its end: folders alone.
    """

    def __init__(self, entries: Sequence[str]) -> None:
        self.idle = list(entries)
        """Entries that have left out nothing so far."""
        self._names = {entry for entry in entries if not set(entry) & set("*?[/")}
        self._patterns = [entry for entry in entries if entry not in self._names]

    def leaves_out(self, relative: str, *, is_folder: bool) -> bool:
        """True if an entry matches this path, relative to the root."""
        name = relative.rpartition("/")[2]
        found = [name] if name in self._names else []
        for entry in self._patterns:
            pattern = entry.rstrip("/")
            meant = relative if "/" in pattern else name
            is_of_kind = is_folder or not entry.endswith("/")
            if is_of_kind and (meant == pattern or _regex(pattern).fullmatch(meant)):
                found.append(entry)
        if found:
            self.idle = [entry for entry in self.idle if entry not in found]
        return bool(found)


def files_below(root: Path, pattern: str, excluded: Excluded) -> Iterator[str]:
    """Yield the relative POSIX paths of matching files, in no order.

    In a pattern `**/` is any number of folders, also none; other wildcards stay within one name. Links to
    folders are not followed, so a loop of links ends. Raise UsageError if a folder cannot be listed.
    """
    deepest = None if "**" in pattern else pattern.count("/")
    for folder, subfolders, files in os.walk(root, onerror=_refuse_unlistable):
        above = "" if Path(folder) == root else f"{Path(folder).relative_to(root).as_posix()}/"
        subfolders[:] = [
            name
            for name in subfolders
            if not name.startswith(".") and not excluded.leaves_out(above + name, is_folder=True)
        ]
        if deepest is not None and above.count("/") >= deepest:
            subfolders.clear()  # nothing below could match
        for name in files:
            if name.startswith(".") or excluded.leaves_out(above + name, is_folder=False):
                continue
            if _regex(pattern).fullmatch(above + name):
                yield above + name


def _refuse_unlistable(error: OSError) -> None:
    raise UsageError(
        f"{error.filename} cannot be listed ({error.strerror}): make it readable, or name it in the source's "
        "exclude"
    )


@functools.cache
def _regex(pattern: str) -> re.Pattern[str]:
    """Return the expression of a glob: `**/` is any number of folders; `*`, `?`, `[...]` stay in one name."""
    found = ""
    for piece in _PIECES.split(pattern):
        if piece in _MEANINGS:
            found += _MEANINGS[piece]
        elif piece.startswith("[") and piece.endswith("]"):
            found += "(?!/)" + fnmatch.translate(piece)[len("(?s:") : -len(r")\Z")]
        else:
            found += re.escape(piece)
    return re.compile(found, re.DOTALL)


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
    fault = _why_no_text(raw)
    yield Document(0, b"" if fault else raw, fault=fault, size=len(raw))


def _why_no_text(raw: bytes) -> str:
    if raw[:1024].lstrip().lower().startswith(b"warc/"):
        return "a WARC archive, not text; extract its texts first, to kind: jsonl for instance"
    if b"\0" in raw:
        return "holds NUL bytes, so it is binary or UTF-16; exclude it, or convert it to UTF-8"
    return ""


# --- Lines ----------------------------------------------------------------------------------------


def _read_lines(
    source: SourceRecipe, path: Path, span: SourceSpan, fields: FieldReader
) -> Iterator[Document]:
    stop = None if is_compressed(path.name) else span.stop
    first = islice(lines.iter_lines(path, span.start, stop), source.max_documents)
    # map and islice hold no line while its document is in use: it may be large.
    return map(functools.partial(_line_document, source, fields), first)


def _line_document(source: SourceRecipe, fields: FieldReader, line: Line) -> Document:
    size = len(line.raw)
    if line.fault:
        return Document(line.position, b"", fault=line.fault, size=size, lost_bytes=line.lost_bytes)
    try:
        if source.kind != TRACES:
            return fields.document(line.position, lines.parse_json(line.raw, fields.pick), size)
        prompt, completion = lines.parse_trace(line.raw, source.prompt_field, source.completion_field)
    except ValueError as error:
        return Document(line.position, b"", fault=str(error), size=size)
    return Document(line.position, prompt + completion, prompt_bytes=len(prompt), size=size)


_READERS = {
    "text": _read_text,
    "jsonl": _read_lines,
    TRACES: _read_lines,
    "parquet": tables.read_parquet,
    "arrow": tables.read_arrow,
    "hdf5": tables.read_hdf5,
}
