"""Which stages a recipe has, which units each of them, and in which order.

    vocabulary, tokenizer, parts = run_stages(recipe, spans, work, workers=4)
    plan_stages(recipe, spans)          # {"clean": 12, "dedup": 1, ...}: how many units, before any is done

A stage's keys follow from those of the stage before, so a change of one setting redoes only what depends on
it.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from r1hpc.base.errors import UsageError
from r1hpc.data.clean import CleanTask, IndexTask
from r1hpc.data.dedup import DedupTask
from r1hpc.data.encode import Vocabulary
from r1hpc.data.manifest import file_digest
from r1hpc.data.recipe import Recipe
from r1hpc.data.sources import Span
from r1hpc.data.tokenise import SpansTask, TextsTask, TokenizerTask
from r1hpc.data.units import Unit, records, run_units, unit_key
from r1hpc.data.vocabulary import existing_files
from r1hpc.data.work import Work

Report = Callable[[str], None]


def divide(spans: Sequence[Span], part_bytes: int, *, by_source: bool = False) -> list[list[Span]]:
    """Consecutive spans in parts of at least `part_bytes` input bytes (the last may have less).

    Args:
        by_source: no part holds two sources, so that each source is one run of tokens.
    """
    parts: list[list[Span]] = [[]]
    size = 0
    for span in spans:
        new_source = by_source and bool(parts[-1]) and parts[-1][-1].source != span.source
        if size >= part_bytes or new_source:
            parts.append([])
            size = 0
        parts[-1].append(span)
        size += span.num_bytes
    return parts


def parts_of(recipe: Recipe, spans: Sequence[Span]) -> list[list[Span]]:
    """The inputs in parts, as this recipe asks for."""
    return divide(spans, recipe.part_bytes, by_source=recipe.is_prepared or recipe.mix is not None)


def plan_stages(recipe: Recipe, spans: Sequence[Span]) -> dict[str, int]:
    """Units of each stage."""
    count = len(parts_of(recipe, spans))
    found = {"tokenizer": 1} if recipe.tokenizer.kind != "ids" else {}
    if recipe.is_prepared:
        found = (
            ({"evaluation": 1} if recipe.decontaminate else {})
            | {"clean": count}
            | ({"dedup": 1} if recipe.dedup else {})
            | found
        )
    return found | {"tokens": count}


def run_stages(
    recipe: Recipe, spans: Sequence[Span], work: Work, workers: int, report: Report | None = None
) -> tuple[Vocabulary, Path | None, list[Path]]:
    """All stages: the vocabulary, the tokenizer's folder (None for ids), and the folder of every part."""
    return _Stages(recipe, spans, work, workers, report).run()


class _Stages:
    def __init__(
        self, recipe: Recipe, spans: Sequence[Span], work: Work, workers: int, report: Report | None
    ) -> None:
        self._recipe, self._work, self._workers, self._report = recipe, work, workers, report
        self._spans = spans
        self._parts = parts_of(recipe, spans)
        self._content = recipe.content
        self._sizes = [sum(span.num_bytes for span in part) for part in self._parts]
        self._stages: dict[str, list[list[Any]]] = {
            name: [["", 0]] * count for name, count in plan_stages(recipe, spans).items()
        }

    def run(self) -> tuple[Vocabulary, Path | None, list[Path]]:
        if not self._recipe.is_prepared:
            keys = [unit_key("inputs", self._inputs_key(part)) for part in self._parts]
            vocabulary, tokenizer = self._tokenizer(keys, [])
            return vocabulary, tokenizer, self._tokens_of_spans(keys, vocabulary, tokenizer)
        cleaned = self._clean()
        dedup = self._dedup(cleaned)
        keys = [path.name for path in (*cleaned, *([dedup] if dedup else []))]
        vocabulary, tokenizer = self._tokenizer(keys, cleaned)
        assert tokenizer is not None, "the recipe refuses stages on ids"
        return vocabulary, tokenizer, self._tokens_of_texts(cleaned, dedup, vocabulary, tokenizer)

    def _run(self, units: list[Unit]) -> list[Path]:
        self._stages[units[0].stage] = [[unit.key, unit.num_bytes] for unit in units]
        self._work.write_stages(self._stages)
        return run_units(self._work, units, self._workers, self._report)

    def _clean(self) -> list[Path]:
        evaluation = self._evaluation() if self._recipe.decontaminate else None
        settings = {name: self._content.get(name) for name in ("clean", "max_unreadable")}
        settings["minhash"] = (self._content.get("dedup") or {}).get("minhash")
        units = [
            Unit(
                "clean",
                unit_key("clean", settings, self._inputs_key(part), evaluation.name if evaluation else None),
                CleanTask(self._recipe, part, evaluation),
                size,
            )
            for part, size in zip(self._parts, self._sizes, strict=True)
        ]
        paths = self._run(units)
        self._check_unreadable(records(paths))
        return paths

    def _evaluation(self) -> Path:
        block = self._recipe.decontaminate
        assert block is not None, "the caller has seen it"
        files = [self._recipe.resolve(path) for path in block.against]
        for path in files:
            if not path.is_file():
                raise UsageError(f"decontaminate.against: {path} is not there")
        key = unit_key("evaluation", asdict(block), [file_digest(path) for path in files])
        return self._run([Unit("evaluation", key, IndexTask(self._recipe))])[0]

    def _check_unreadable(self, found: list[dict[str, Any]]) -> None:
        total = sum(record["in"] for record in found)
        count = sum(record["dropped"].get("unreadable", 0) for record in found)
        if count > self._recipe.max_unreadable * total:
            examples = [
                f"{record['inputs'][place]} at {position}: {what}"
                for record in found
                for place, position, what in record["unreadable"]
            ]
            raise UsageError(
                f"{count:,} of {total:,} records cannot be read, more than max_unreadable "
                f"{self._recipe.max_unreadable} allows; the first: " + "; ".join(examples[:3])
            )

    def _dedup(self, cleaned: list[Path]) -> Path | None:
        if self._recipe.dedup is None:
            return None
        key = unit_key("dedup", self._content["dedup"], [path.name for path in cleaned])
        return self._run([Unit("dedup", key, DedupTask(self._recipe, cleaned))])[0]

    def _tokenizer(self, keys: list[str], cleaned: list[Path]) -> tuple[Vocabulary, Path | None]:
        chosen = self._recipe.tokenizer
        if chosen.kind == "ids":
            assert chosen.vocab_size is not None, "the recipe requires both with kind ids"
            assert chosen.eos_id is not None, "the recipe requires both with kind ids"
            return Vocabulary(chosen.vocab_size, chosen.eos_id), None
        # What it is made of: the texts it is trained on, or the files it is copied from.
        made_of: Any = keys if chosen.kind == "byte_bpe" else None
        if chosen.path is not None:
            files = existing_files(self._recipe.resolve(chosen.path))
            made_of = {name: raw.decode("utf-8", "replace") for name, raw in files.items()}
        key = unit_key("tokenizer", self._content["tokenizer"], self._recipe.is_traces, made_of)
        (path,) = self._run([Unit("tokenizer", key, TokenizerTask(self._recipe, self._spans, cleaned))])
        return Vocabulary(**records([path])[0]), path

    def _tokens_of_spans(self, keys: list[str], vocabulary: Vocabulary, tokenizer: Path | None) -> list[Path]:
        made_by = tokenizer.name if tokenizer else asdict(vocabulary)
        units = [
            Unit(
                "tokens",
                unit_key("spans", self._layout(), key, made_by),
                SpansTask(self._recipe, part, vocabulary, tokenizer),
                size,
            )
            for key, part, size in zip(keys, self._parts, self._sizes, strict=True)
        ]
        return self._run(units)

    def _tokens_of_texts(
        self, cleaned: list[Path], dedup: Path | None, vocabulary: Vocabulary, tokenizer: Path
    ) -> list[Path]:
        units = []
        for number, (path, size) in enumerate(zip(cleaned, self._sizes, strict=True)):
            drops = dedup / f"{number}.parquet" if dedup else None
            drops = drops if drops is not None and drops.is_file() else None
            gone = file_digest(drops) if drops else None
            key = unit_key("texts", self._layout(), path.name, gone, tokenizer.name)
            task = TextsTask(self._recipe, path, drops, vocabulary, tokenizer)
            units.append(Unit("tokens", key, task, size))
        return self._run(units)

    def _layout(self) -> dict[str, Any]:
        return {name: self._content[name] for name in ("profile", "chunk_tokens", "shard_tokens")}

    def _inputs_key(self, part: Sequence[Span]) -> list[Any]:
        """A part's spans, how its sources are read, and the state of its files."""
        sources = sorted({span.source for span in part})
        files = sorted({(span.source, span.path) for span in part})
        return [
            [[number, self._content["sources"][number]] for number in sources],
            [asdict(span) for span in part],
            [self._file_state(source, path) for source, path in files],
        ]

    def _file_state(self, source: int, name: str) -> list[Any]:
        path = self._recipe.resolve(self._recipe.sources[source].root) / name
        status = path.stat()
        return [str(path.absolute()), status.st_size, status.st_mtime_ns]


def describe(recipe: Recipe, spans: Sequence[Span]) -> dict[str, Any]:
    """What a build will read and how it is divided: for `shard plan`."""
    sources = []
    for number, source in enumerate(recipe.sources):
        mine = [span for span in spans if span.source == number]
        size = sum(span.num_bytes for span in mine)
        files = len({span.path for span in mine})
        sources.append({"name": source.name, "kind": source.kind, "files": files, "bytes": size})
    return {"name": recipe.name, "sources": sources, "stages": plan_stages(recipe, spans)}
