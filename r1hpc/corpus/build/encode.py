"""Turn the records of an input, span by span, into documents of ids; count those that the recipe leaves out.

Records are texts (vocabulary.py encodes them), existing ids, or traces of prompt and completion. Used by
stage tokens of a plain recipe; tokenize.py encodes cleaned texts without it.

for item in encode_span(recipe, span, vocabulary, encoder, count):
    item.ids                        # without the EOS id, which the writer appends
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import xxhash

from r1hpc.base.errors import UsageError
from r1hpc.corpus.build.vocabulary import NO_CUT, PIECE_BYTES, Encoder, is_utf8
from r1hpc.corpus.clean.decisions import EMPTY, NO_TRACE, NOT_UTF8
from r1hpc.corpus.clean.losses import SourceCount
from r1hpc.corpus.recipe import Recipe
from r1hpc.corpus.sources.fields import BATCH_BYTES, Document, SourceSpan, batched
from r1hpc.corpus.sources.lines import line_number
from r1hpc.corpus.sources.read import read_span

_Ids = npt.NDArray[Any] | str


@dataclass(frozen=True)
class Vocabulary:
    """Properties of a dataset's ids that its arrays depend on."""

    vocab_size: int
    eos_id: int

    @property
    def dtype(self) -> "np.dtype[Any]":
        """Return uint16 if the invalid id 65,535 lies outside the vocabulary, else uint32."""
        return np.dtype("<u2" if self.vocab_size <= 65_535 else "<u4")

    @property
    def invalid_id(self) -> int:
        """Return the fill value: no token has it, so a hole never passes as one."""
        return int(np.iinfo(self.dtype).max)


@dataclass(frozen=True)
class Encoded:
    """One document, without the EOS id that closes it."""

    position: int
    hash: int
    """xxh3-128 of the document's bytes of text (traces: prompt and completion) or ids."""
    ids: npt.NDArray[Any]
    num_bytes: int
    num_prompt_tokens: int = 0
    """Traces: how many of the ids belong to the prompt."""


def encode_span(
    recipe: Recipe, span: SourceSpan, vocabulary: Vocabulary, encoder: Encoder | None, count: SourceCount
) -> Iterator[Encoded]:
    """Yield a span's documents as ids, counting those the recipe leaves out; UsageError names a misfit."""
    if recipe.is_traces:
        assert encoder is not None, "the recipe refuses traces with tokenizer.kind ids"
        yield from _encode_traces(recipe, span, encoder, count)
        return
    batch: list[tuple[Document, str | bytes]] = []
    size = 0
    where = f"source {recipe.sources[span.source].name}: {span.path}"
    stream = _IdStream(vocabulary, where, recipe.tokenizer.pad_id)
    for document in _documents(recipe, span, count):
        if document.is_ids:
            yield from stream.split(document)
        elif (text := _text(recipe, span, document)) is None:
            count.leave_out(NOT_UTF8)
        else:
            batch.append((document, text))
            size += len(document.raw)
        if size >= BATCH_BYTES:
            yield from _encode_batch(recipe, span, batch, encoder)
            batch, size = [], 0
    yield from stream.close()
    yield from _encode_batch(recipe, span, batch, encoder)


def _documents(recipe: Recipe, span: SourceSpan, count: SourceCount) -> Iterator[Document]:
    """Yield the records with a text or ids; count the empty ones. UsageError for one that is unreadable."""
    is_jsonl = recipe.sources[span.source].kind == "jsonl"
    for document in read_span(recipe, span):
        if document.fault:
            raise UsageError(
                f"{_place(recipe, span, document)}: {document.fault}; correct it, or set max_unreadable to "
                "the share of the records that may be put aside"
            )
        if document.raw:
            yield document
        else:  # manifests count only null lines, as always: they decide a dataset's id
            count.leave_out(EMPTY, document.is_null and is_jsonl)


def _place(recipe: Recipe, span: SourceSpan, document: Document) -> str:
    what = "line at byte" if recipe.sources[span.source].kind == "jsonl" else "record"
    return f"{recipe.input_path(span.source, span.path)}, {what} {document.position}"


def _encode_batch(
    recipe: Recipe, span: SourceSpan, batch: list[tuple[Document, str | bytes]], encoder: Encoder | None
) -> Iterator[Encoded]:
    if not batch:
        return
    if encoder is None:
        raise UsageError("the inputs are text, but tokenizer.kind is ids; take byte_bpe, bytes or path")
    chats = [document.is_chat for document, _ in batch]
    for (document, _), ids in zip(batch, encoder.encode_known([t for _, t in batch], chats), strict=True):
        if isinstance(ids, str) and ids.startswith(NO_CUT):
            raise UsageError(
                f"{_place(recipe, span, document)}: {ids}; divide the document, or take another tokenizer "
                "(tokenizer.kind byte_bpe cuts between words)"
            )
        if isinstance(ids, str):
            raise UsageError(
                f"{_place(recipe, span, document)}: the vocabulary cannot spell it ({ids}); take a tokenizer "
                "that knows every character, or set clean: {}, which leaves such documents out"
            )
        yield Encoded(document.position, xxhash.xxh3_128_intdigest(document.raw), ids, len(document.raw))


class _IdStream:
    """Documents in rows of ids: each ends at an EOS id, or at the end of the row or the stream."""

    def __init__(self, vocabulary: Vocabulary, where: str, pad_id: int | None) -> None:
        self._vocabulary, self._where, self._pad_id = vocabulary, where, pad_id
        self._rest: list[npt.NDArray[np.uint32]] = []
        self._begin = 0

    def split(self, document: Document) -> Iterator[Encoded]:
        """Yield the documents that end in this row. A stream's last one is held back, as it may continue."""
        ids = np.frombuffer(document.raw, dtype="<u4")
        if self._pad_id is not None and not document.is_stream:
            own = np.flatnonzero(ids != self._pad_id)
            ids = ids[: own[-1] + 1 if len(own) else 0]
        largest = int(ids.max(initial=0))
        if largest >= self._vocabulary.vocab_size:
            raise UsageError(
                f"{self._where}, row {document.position}: token id {largest} is outside the vocabulary of "
                f"{self._vocabulary.vocab_size}; correct tokenizer.vocab_size or the input"
            )
        begin = 0
        for end in np.flatnonzero(ids == self._vocabulary.eos_id).tolist():
            position = document.position + (begin if document.is_stream else 0)
            yield from self._close(ids[begin:end], position)
            begin = end + 1
        if not document.is_stream:
            yield from self._close(ids[begin:], document.position)
        elif begin < len(ids):
            if not self._rest:
                self._begin = document.position + begin
            self._rest.append(ids[begin:])

    def close(self) -> Iterator[Encoded]:
        """Yield what was held back."""
        yield from self._close(np.empty(0, dtype="<u4"), self._begin)

    def _close(self, ids: npt.NDArray[np.uint32], position: int) -> Iterator[Encoded]:
        if self._rest:
            ids, position = np.concatenate([*self._rest, ids]), self._begin
            self._rest = []
        if len(ids):
            raw = ids.tobytes()
            yield Encoded(position, xxhash.xxh3_128_intdigest(raw), ids, len(raw))


def _text(recipe: Recipe, span: SourceSpan, document: Document) -> str | bytes | None:
    """Return the text, or the bytes of a long one, which is encoded in pieces. None if it is left out."""
    if len(document.raw) > PIECE_BYTES and is_utf8(document.raw):
        return document.raw
    source = recipe.sources[span.source]
    try:
        return document.raw.decode("utf-8", "replace" if source.on_invalid_utf8 == "replace" else "strict")
    except UnicodeDecodeError as error:
        if source.on_invalid_utf8 == "skip":
            return None
        path = recipe.input_path(span.source, span.path)
        raise UsageError(
            f"{path}, document at {document.position}: not UTF-8 ({error.reason} at byte {error.start}); "
            f"set on_invalid_utf8: skip or replace for source {source.name}"
        ) from None


def _encode_traces(
    recipe: Recipe, span: SourceSpan, encoder: Encoder, count: SourceCount
) -> Iterator[Encoded]:
    """Yield the valid traces; count or raise the others, as the source says."""
    source = recipe.sources[span.source]
    for batch in batched(read_span(recipe, span), lambda document: len(document.raw)):
        # Prompt and completion separately, so that the prompt's ids are those a sampler will see.
        texts = []
        for document in batch:
            if not document.fault:
                raw, end = document.raw, document.prompt_bytes
                texts += [raw[:end].decode(), raw[end:].decode()]
        ids = iter(encoder.encode_known(texts))
        for document in batch:
            found = document.fault or _join(document, next(ids), next(ids), encoder.eos_id)
            if isinstance(found, Encoded):
                yield found
            elif source.on_invalid == "skip":
                count.leave_out(NO_TRACE)
            else:
                _refuse_line(recipe, span, document.position, found)


def _refuse_line(recipe: Recipe, span: SourceSpan, position: int, fault: str) -> NoReturn:
    path = recipe.input_path(span.source, span.path)
    number = line_number(path, position)
    if path.is_symlink():  # a run's recipe links to the files of data.traces
        raise UsageError(f"{path.resolve()}:{number}: {fault}; correct the line, or leave it out")
    name = recipe.sources[span.source].name
    raise UsageError(f"{path}:{number}: {fault}; correct the line, or set on_invalid: skip for source {name}")


def _join(document: Document, prompt: _Ids, completion: _Ids, eos_id: int) -> Encoded | str:
    """Return one document of a prompt and a completion, or a fault."""
    if isinstance(prompt, str) or isinstance(completion, str):
        name, why = ("prompt", prompt) if isinstance(prompt, str) else ("completion", completion)
        return f"the vocabulary cannot spell the {name} ({why})"
    if not len(prompt) or not len(completion):
        return "the prompt or the completion gives no tokens"
    if eos_id in completion:
        return "the completion holds the EOS token, which the build appends itself"
    joined = np.concatenate([prompt, completion])
    number = xxhash.xxh3_128_intdigest(document.raw)
    return Encoded(document.position, number, joined, len(document.raw), num_prompt_tokens=len(prompt))
