"""Run stages `tokenizer` and `tokens`: turn inputs or cleaned texts into the parts of a dataset.

Each task is one unit (see engine/units.py): its folder holds tokenizer.json and companions, or PART/ with the
arrays.
"""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from r1hpc.base.failpoints import failpoint
from r1hpc.corpus.build.encode import Encoded, Vocabulary, encode_span
from r1hpc.corpus.build.vocabulary import (
    PIECE_BYTES,
    TOKENIZER_FILE,
    Encoder,
    existing_files,
    is_utf8,
    tokenizer_files,
)
from r1hpc.corpus.build.writer import Placed, write_part
from r1hpc.corpus.clean import decisions
from r1hpc.corpus.clean.clean import DOCUMENTS
from r1hpc.corpus.clean.losses import SourceCount
from r1hpc.corpus.engine.work_dir import unit_record
from r1hpc.corpus.recipe import Recipe
from r1hpc.corpus.sources.fields import SourceSpan, batched, rows_at_once
from r1hpc.corpus.sources.read import read_span
from r1hpc.data.format.manifest import DECISIONS, file_digest

PART = "part"
_Drop = tuple[str, float | None, str]
"""Rule, value and note of a document that is dropped after stage clean."""
_SAMPLED_SPANS = 512
"""Spans of a source read for a tokenizer: each is a file to open."""
_loaded: dict[tuple[Any, ...], Encoder] = {}
"""The last tokenizer of this process, by content: stage tokenizer leaves it for stage tokens."""


@dataclass(frozen=True)
class TokenizerTask:
    """Makes a dataset's tokenizer from a sample of the spans or of the cleaned texts."""

    recipe: Recipe
    spans: Sequence[SourceSpan]
    cleaned: Sequence[Path] = ()

    def write(self, folder: Path) -> dict[str, Any]:
        chosen = self.recipe.tokenizer
        path = self.recipe.resolve(chosen.path) if chosen.path else None
        size = chosen.sample_bytes
        texts: Iterator[str | bytes] = (
            _sample_cleaned(self.cleaned, size)
            if self.cleaned
            else sample_texts(self.recipe, self.spans, size)
        )
        for name, raw in tokenizer_files(chosen, path, texts).items():
            (folder / name).write_bytes(raw)
        encoder = _encoder(folder, self.recipe)
        return asdict(Vocabulary(encoder.vocab_size, encoder.eos_id))


@dataclass(frozen=True)
class SpansTask:
    """Makes a part straight from the inputs."""

    recipe: Recipe
    spans: Sequence[SourceSpan]
    vocabulary: Vocabulary
    tokenizer: Path | None

    def write(self, folder: Path) -> dict[str, Any]:
        inputs = sorted({(span.source, span.path) for span in self.spans})
        counts = {source: SourceCount() for source, _ in inputs}
        items = self._items(inputs, counts)
        return asdict(write_part(self.recipe, items, inputs, folder / PART, self.vocabulary, counts))

    def _items(self, inputs: Sequence[tuple[int, str]], counts: dict[int, SourceCount]) -> Iterator[Placed]:
        encoder = _encoder(self.tokenizer, self.recipe) if self.tokenizer else None
        place = {each: number for number, each in enumerate(inputs)}
        for span in self.spans:
            failpoint("data.build.span")
            for item in encode_span(self.recipe, span, self.vocabulary, encoder, counts[span.source]):
                yield span.source, place[span.source, span.path], item


@dataclass(frozen=True)
class TextsTask:
    """Makes a part from the texts of stage clean that stage dedup kept."""

    recipe: Recipe
    cleaned: Path
    dedup: Path | None
    """The file of this part's duplicates, if stage dedup wrote one."""
    vocabulary: Vocabulary
    tokenizer: Path

    def write(self, folder: Path) -> dict[str, Any]:
        import pyarrow.parquet

        record = unit_record(self.cleaned)
        source = record["source"]
        inputs = [(source, path) for path in record["inputs"]]
        rows = pyarrow.parquet.read_table(self.dedup).to_pylist() if self.dedup else []
        dropped = {row["row"]: (row["rule"], row["value"], row["note"]) for row in rows}
        count = SourceCount(edits={name: record[name] for name in ("repaired", "masked", "lines_removed")})
        items = self._items(source, dropped)
        result = write_part(self.recipe, items, inputs, folder / PART, self.vocabulary, {source: count})
        count.dropped = _write_decisions(self.cleaned / DECISIONS, folder / PART / DECISIONS, dropped)
        result.files[DECISIONS] = file_digest(folder / PART / DECISIONS)
        return asdict(result)

    def _items(self, source: int, dropped: dict[int, _Drop]) -> Iterator[Placed]:
        """Yield the documents that are not dropped; add those that the tokenizer drops."""
        encoder = _encoder(self.tokenizer, self.recipe)
        for rows in _text_batches(self.cleaned):
            failpoint("data.build.texts")
            chosen = [row for row in rows if row["row"] not in dropped]
            ids = encoder.encode_known([row["text"] for row in chosen], [row["is_chat"] for row in chosen])
            for row, found in zip(chosen, ids, strict=True):
                if isinstance(found, str) or not len(found):
                    note = found if isinstance(found, str) else "no tokens"
                    dropped[row["row"]] = (decisions.TOKENIZER, None, note)
                    continue
                raw_hash = row["raw_high"] << 64 | row["raw_low"]
                yield source, row["input"], Encoded(row["position"], raw_hash, found, row["num_bytes"])


def _write_decisions(source: Path, target: Path, dropped: dict[int, _Drop]) -> dict[str, int]:
    """Write the decisions of stage clean with later ones; return the records dropped by each rule."""
    import pyarrow as pa
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(source)
    rules, values, notes = (table[name].to_pylist() for name in ("rule", "value", "note"))
    documents: list[int | None] = [None] * len(rules)
    numbers = itertools.count()
    kept = [place for place, rule in enumerate(rules) if not rule]
    for row, place in enumerate(kept):
        if row in dropped:
            rules[place], values[place], notes[place] = dropped[row]
        else:
            documents[place] = next(numbers)
    columns = (("rule", rules, pa.string()), ("value", values, pa.float64()), ("note", notes, pa.string()))
    for name, column, kind in columns:
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(column, kind))
    table = table.append_column("document", pa.array(documents, pa.uint64()))
    pyarrow.parquet.write_table(table, target, compression="zstd", row_group_size=65_536)
    return decisions.dropped_by_rule(rules)


def sample_texts(recipe: Recipe, spans: Sequence[SourceSpan], sample_bytes: int) -> Iterator[str | bytes]:
    """Yield about `sample_bytes` of text, the same share from every source that has enough; deterministic.

    A long text is UTF-8 bytes.
    """
    sources = sorted({span.source for span in spans})
    for source in sources:
        mine = [span for span in spans if span.source == source]
        yield from _sample_spans(recipe, mine, sample_bytes // len(sources))


def _sample_spans(recipe: Recipe, spans: Sequence[SourceSpan], most: int) -> Iterator[str | bytes]:
    """Yield the beginnings of spans spread evenly over a source; all of it if it has at most `most` bytes."""
    size = sum(span.num_bytes for span in spans)
    if size > most:  # so few as hold it still, where they are small
        spans = spans[:: max(1, min(-(-len(spans) // _SAMPLED_SPANS), size // max(1, most)))]
    total = max(1, sum(span.num_bytes for span in spans))
    taken = seen = 0
    for span in spans:
        seen += span.num_bytes
        for document in read_span(recipe, span):
            if taken * total >= most * seen:
                break
            if document.raw and not document.is_ids:
                taken += len(document.raw)
                is_long = len(document.raw) > PIECE_BYTES and is_utf8(document.raw)
                yield document.raw if is_long else document.raw.decode("utf-8", "replace")


def _sample_cleaned(cleaned: Sequence[Path], sample_bytes: int) -> Iterator[str]:
    """Yield the same share of text from every source that has enough, spread over parts and documents."""
    records = [unit_record(path) for path in cleaned]
    sources = sorted({record["source"] for record in records})
    for source in sources:
        parts = [(p, r["text_bytes"]) for p, r in zip(cleaned, records, strict=True) if r["source"] == source]
        total = sum(size for _, size in parts)
        taken = seen = 0
        for row in (row for path, _ in parts for rows in _text_batches(path) for row in rows):
            if taken * total <= sample_bytes // len(sources) * seen:
                taken += len(row["text"])
                yield row["text"]
            seen += len(row["text"])


def _text_batches(cleaned: Path) -> Iterator[list[dict[str, Any]]]:
    """Yield the documents of a part in batches of about a megabyte, each with its row."""
    import pyarrow.parquet

    names = ["input", "position", "num_bytes", "raw_high", "raw_low", "is_chat", "text"]
    file = pyarrow.parquet.ParquetFile(cleaned / DOCUMENTS)
    groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    num_bytes = sum(group.total_byte_size for group in groups)
    read = file.iter_batches(rows_at_once(num_bytes, file.metadata.num_rows), columns=names)
    rows = (row for batch in read for row in batch.to_pylist())
    numbered = (row | {"row": number} for number, row in enumerate(rows))
    return batched(numbered, lambda row: len(row["text"]))


def _encoder(folder: Path, recipe: Recipe) -> Encoder:
    digests = [hashlib.sha256(raw).digest() for raw in existing_files(folder).values()]
    key = (*digests, recipe.tokenizer.eos, recipe.is_traces)
    if key not in _loaded:
        _loaded.clear()
        # Special tokens in traces are intended: a template made them. Other text cannot forge one.
        file = folder / TOKENIZER_FILE
        _loaded[key] = Encoder(file, recipe.tokenizer.eos, parse_special=recipe.is_traces)
    return _loaded[key]
