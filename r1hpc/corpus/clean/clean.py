"""Run stage `clean`: filter and repair a part of the inputs, with a decision about every record.

Stage `evaluation` before it (IndexTask) indexes the files that `decontaminate` names.

    record = CleanTask(recipe, spans, evaluation=None).write(folder)

    folder/documents.parquet    documents kept so far: text, place, hashes, MinHash signature
    folder/decisions.parquet    every record: kept so far, or dropped by which rule

Order of the steps: read, decode, repair, language, rules in the order of corpus/recipe.py, personal data,
contamination, signature. A record dropped by one step does not reach the next.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from r1hpc.base.errors import UsageError
from r1hpc.base.failpoints import failpoint
from r1hpc.corpus.clean import decisions, rules
from r1hpc.corpus.clean.batch import TextBatch
from r1hpc.corpus.clean.contamination import NgramIndex, build_index
from r1hpc.corpus.clean.decisions import RecordDecision, dropped_by_rule
from r1hpc.corpus.clean.losses import add_counts
from r1hpc.corpus.clean.minhash import sign
from r1hpc.corpus.clean.rules import Verdicts
from r1hpc.corpus.clean.text import identify, mask, repair
from r1hpc.corpus.recipe import CleanRecipe, Recipe, SourceRecipe
from r1hpc.corpus.sources.fields import Document, SourceSpan, batched, template_of
from r1hpc.corpus.sources.read import read_span
from r1hpc.data.format.manifest import DECISIONS

DOCUMENTS = "documents.parquet"
INDEX = "ngrams.npz"
MAX_TEXT_CHARS = 2**24
"""Limit for texts whose words are examined: rules, MinHash and contamination take some 60 bytes for each
byte, a gigabyte for ASCII, three for CJK."""
_MAX_EXAMPLES = 3
_LOW = 2**64 - 1


@dataclass
class _Item:
    """A record between the steps."""

    decision: RecordDecision
    document: Document
    text: str = ""


@dataclass(frozen=True)
class IndexTask:
    """Stage `evaluation`: indexes the n-grams of the files that `decontaminate` names."""

    recipe: Recipe

    def write(self, folder: Path) -> dict[str, Any]:
        block = self.recipe.decontaminate
        assert block is not None, "the stage is only planned for recipes with decontaminate"
        index = build_index([self.recipe.resolve(path) for path in block.against], block)
        arrays: dict[str, Any] = {f"k{size}": keys for size, (keys, _) in index.tables.items()}
        arrays |= {f"f{size}": files for size, (_, files) in index.tables.items()}
        np.savez(folder / INDEX, **arrays)
        return {"ngrams": {str(size): len(keys) for size, (keys, _) in index.tables.items()}}


@functools.lru_cache(maxsize=1)
def _load_index(path: Path) -> NgramIndex:
    with np.load(path) as arrays:
        sizes = sorted((int(name[1:]) for name in arrays if name[0] == "k"), reverse=True)
        return NgramIndex({size: (arrays[f"k{size}"], arrays[f"f{size}"]) for size in sizes})


@dataclass(frozen=True)
class CleanTask:
    """Cleans one part of the inputs, all of one source."""

    recipe: Recipe
    spans: Sequence[SourceSpan]
    evaluation: Path | None
    """Folder of the finished stage `evaluation`."""

    def write(self, folder: Path) -> dict[str, Any]:
        inputs = sorted({span.path for span in self.spans})
        place = {path: number for number, path in enumerate(inputs)}
        with _Output(folder, self.recipe) as output:
            for span in self.spans:
                failpoint("data.build.span")
                at, found = place[span.path], read_span(self.recipe, span)
                items = (_Item(RecordDecision(at, each.position, each.size), each) for each in found)
                for batch in batched(items, lambda item: len(item.document.raw)):
                    self._decide(batch, inputs)
                    output.append(batch)
        return {"inputs": inputs, "source": self.spans[0].source} | output.record

    @property
    def _source(self) -> SourceRecipe:
        return self.recipe.sources[self.spans[0].source]

    @property
    def _clean(self) -> CleanRecipe | None:
        return self._source.clean or self.recipe.clean

    def _decide(self, batch: list[_Item], inputs: Sequence[str]) -> None:
        """Set text and decision of every record of the batch, step by step."""
        for item in batch:
            self._decode(item, inputs)
        clean = self._clean
        if clean is not None:
            if clean.repair:
                has_chats = any(item.document.is_chat for item in batch)
                special = template_of(self.recipe, self._source).special if has_chats else ()
                _repair(_kept(batch), special)
            _drop_empty(batch)
            if clean.lang:
                self._identify(_kept(batch))
            if clean.single_rules:
                _drop_too_long(_kept(batch))
            _apply_rules(clean.single_rules, batch, bool(clean.lang))
            if clean.pii != "keep":
                _hide_personal_data(_kept(batch), clean.pii)
        _drop_empty(batch)
        dedup = self.recipe.dedup
        if self.evaluation is not None or (dedup is not None and dedup.minhash is not None):
            _drop_too_long(_kept(batch))  # they have arrays with numbers for each byte of a text
        if self.evaluation is not None:
            self._decontaminate(_kept(batch), self.evaluation)

    def _decode(self, item: _Item, inputs: Sequence[str]) -> None:
        document = item.document
        path = self.recipe.input_path(self.spans[0].source, inputs[item.decision.input])
        where = f"{path} at {document.position}"
        if document.fault:
            self._set_aside(item, where, document.fault)
            return
        if len(document.raw) > 4 * MAX_TEXT_CHARS:  # each stage would copy it
            item.decision.drop(decisions.OVER_64_MIB, float(len(document.raw)), "in bytes; divide it")
            return
        if document.is_ids:
            raise UsageError(f"{where}: token ids, which cannot be cleaned or compared; take the texts")
        policy = self._source.on_invalid_utf8
        try:
            item.text = document.raw.decode("utf-8", "replace" if policy == "replace" else "strict")
        except UnicodeDecodeError as error:
            what = f"not UTF-8 ({error.reason} at byte {error.start})"
            if policy == "skip":
                item.decision.drop(decisions.NOT_UTF8, note=what)
            else:
                self._set_aside(item, where, f"{what}; set on_invalid_utf8: skip or replace")

    def _set_aside(self, item: _Item, where: str, what: str) -> None:
        if not self.recipe.max_unreadable:
            raise UsageError(
                f"{where}: {what}; correct it, or set max_unreadable to the share of the records that may be "
                "put aside"
            )
        item.decision.drop(decisions.UNREADABLE, note=what)

    def _identify(self, kept: list[_Item]) -> None:
        clean = self._clean
        assert clean is not None, "the caller has seen it"
        for item, (code, score) in zip(kept, identify([i.text for i in kept]), strict=True):
            item.decision.language, item.decision.score = code, score
            if code not in clean.lang or score < clean.min_lang_score:
                item.decision.drop(decisions.LANGUAGE, score, code)

    def _decontaminate(self, kept: list[_Item], evaluation: Path) -> None:
        block = self.recipe.decontaminate
        assert block is not None, "planned only with decontaminate"
        if not kept:
            return
        index = _load_index(evaluation / INDEX)
        found = index.find(TextBatch([item.text for item in kept], normal=True))
        for item, number in zip(kept, found.tolist(), strict=True):
            if number >= 0:
                item.decision.drop(decisions.CONTAMINATED, float(block.ngram), block.against[number])


def _kept(batch: list[_Item]) -> list[_Item]:
    return [item for item in batch if not item.decision.rule]


def _drop_empty(batch: list[_Item]) -> None:
    for item in _kept(batch):
        if not item.text.strip():
            item.decision.drop(decisions.EMPTY)


def _drop_too_long(kept: list[_Item]) -> None:
    for item in kept:
        if len(item.text) > MAX_TEXT_CHARS:
            item.decision.drop(decisions.TOO_LONG, float(len(item.text)), "divide it, or take the stage out")


def _repair(kept: list[_Item], special: Sequence[str]) -> None:
    """Repair texts; one that would then spell other special tokens stays as it is."""
    for item in kept:
        repaired = repair(item.text)
        if item.document.is_chat and any(repaired.count(t) != item.text.count(t) for t in special):
            continue
        item.decision.repaired = repaired != item.text
        item.text = repaired


def _hide_personal_data(kept: list[_Item], how: str) -> None:
    for item in kept:
        masked, count = mask(item.text)
        item.decision.masked = count
        if count and how == "drop":
            item.decision.drop(decisions.PII, float(count))
        else:
            item.text = masked


def _apply_rules(names: Sequence[str], batch: list[_Item], knows_language: bool) -> None:
    """Apply the rules. Gopher's share arrays; C4 removes lines, so FineWeb's are others."""
    for group in (("gopher_quality", "gopher_repetition"), ("c4",), ("fineweb",)):
        kept, chosen = _kept(batch), [rule for rule in group if rule in names]
        if kept and chosen:
            arrays = TextBatch([item.text for item in kept])
            for rule in chosen:
                _drop(kept, _judge(rule, kept, arrays, knows_language))


def _judge(rule: str, kept: list[_Item], arrays: TextBatch, knows_language: bool) -> Verdicts:
    texts = [item.text for item in kept]
    if rule == "gopher_quality":
        return rules.quality(texts, arrays, [i.decision.language for i in kept] if knows_language else None)
    if rule == "gopher_repetition":
        return rules.repetition(arrays)
    return _judge_c4(kept) if rule == "c4" else rules.judge_fineweb(texts, arrays)


def _drop(kept: list[_Item], verdicts: Verdicts) -> None:
    for item, name, value in zip(kept, verdicts.rule, verdicts.value.tolist(), strict=True):
        if name and not item.decision.rule:
            item.decision.drop(name, value)


def _judge_c4(kept: list[_Item]) -> Verdicts:
    """Return C4's verdicts, and remove from the texts the lines that C4 drops.

    Chats stay unchanged: removing lines without a full stop would remove the marks of turns.
    """
    verdicts, changed = rules.judge_c4([item.text for item in kept])
    for number, (item, text) in enumerate(zip(kept, changed, strict=True)):
        if item.document.is_chat:
            verdicts.rule[number] = ""
        elif not verdicts.rule[number]:
            item.decision.lines_removed = len(item.text.splitlines()) - len(text.splitlines())
            item.text = text
    return verdicts


class _Output:
    """The two files of a part, written batch by batch, and their totals."""

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        import pyarrow as pa
        import pyarrow.parquet

        self._minhash = recipe.dedup.minhash if recipe.dedup is not None else None
        fields = [
            ("input", pa.uint32()),
            ("position", pa.uint64()),
            ("num_bytes", pa.uint64()),
            ("raw_high", pa.uint64()),
            ("raw_low", pa.uint64()),
            ("text_hash", pa.binary(16)),
            ("is_chat", pa.bool_()),
            ("text", pa.large_string()),
        ]
        if self._minhash:
            fields.append(("signature", pa.binary(self._minhash.bands * self._minhash.rows * 4)))
        self._schema = pa.schema(fields)
        self._documents = pyarrow.parquet.ParquetWriter(folder / DOCUMENTS, self._schema, compression="zstd")
        self._decisions = pyarrow.parquet.ParquetWriter(
            folder / DECISIONS, decisions.schema(), compression="zstd"
        )
        self.record: dict[str, Any] = {
            "in": 0, "kept": 0, "text_bytes": 0, "repaired": 0, "masked": 0, "lines_removed": 0,
            "lost_bytes": 0, "dropped": {}, "unreadable": [],
        }  # fmt: skip

    def __enter__(self) -> "_Output":
        return self

    def __exit__(self, *_: object) -> None:
        self._documents.close()
        self._decisions.close()

    def append(self, batch: list[_Item]) -> None:
        self._decisions.write_batch(decisions.to_batch([item.decision for item in batch]))
        kept = _kept(batch)
        if kept:
            self._documents.write_batch(self._to_batch(kept))
        record = self.record
        record["in"] += len(batch)
        record["kept"] += len(kept)
        record["text_bytes"] += sum(len(item.text) for item in kept)
        for name in ("repaired", "masked", "lines_removed"):
            record[name] += sum(getattr(item.decision, name) for item in kept)
        add_counts(record["dropped"], dropped_by_rule([item.decision.rule for item in batch]))
        record["lost_bytes"] += sum(item.document.lost_bytes for item in batch)
        aside = [item.decision for item in batch if item.decision.rule == decisions.UNREADABLE]
        for decision in aside[: _MAX_EXAMPLES - len(record["unreadable"])]:
            record["unreadable"].append([decision.input, decision.position, decision.note])

    def _to_batch(self, kept: list[_Item]) -> Any:
        import pyarrow as pa

        raws = [xxhash.xxh3_128_intdigest(item.document.raw) for item in kept]
        texts = [xxhash.xxh3_128_digest(item.text.encode("utf-8", "replace")) for item in kept]
        columns = {
            "input": [item.decision.input for item in kept],
            "position": [item.decision.position for item in kept],
            "num_bytes": [len(item.document.raw) for item in kept],
            "raw_high": [raw >> 64 for raw in raws],
            "raw_low": [raw & _LOW for raw in raws],
            "text_hash": texts,
            "is_chat": [item.document.is_chat for item in kept],
            "text": [item.text.encode("utf-8", "replace").decode() for item in kept],
        }
        if self._minhash:
            signatures = sign(TextBatch(columns["text"], normal=True), self._minhash)  # type: ignore[arg-type]
            columns["signature"] = [row.tobytes() for row in signatures]
        return pa.RecordBatch.from_pydict(columns, self._schema)
