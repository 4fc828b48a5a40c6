"""Run the stages of a recipe, unit by unit and in order.

    made = run_stages(recipe, spans, work, How(workers=4))      # made.vocabulary, made.parts, ...
    plan_stages(recipe, spans)          # {"clean": 12, "dedup": 1, ...}: numbers of units, before any is done
    run_share(recipe, spans, work, Share("clean", 2, 8), How())     # one of eight jobs that clean together

A stage's keys follow from those of the previous stage, so a changed setting redoes only what depends on it.
"""

import contextlib
import functools
import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from r1hpc.base.errors import UsageError
from r1hpc.base.units import format_bytes
from r1hpc.corpus.build.encode import Vocabulary
from r1hpc.corpus.build.tokenize import SpansTask, TextsTask, TokenizerTask
from r1hpc.corpus.build.vocabulary import existing_files
from r1hpc.corpus.clean import text
from r1hpc.corpus.clean.clean import CleanTask, IndexTask
from r1hpc.corpus.clean.dedup import DedupTask
from r1hpc.corpus.clean.losses import SourceCount, add_up, check_losses
from r1hpc.corpus.engine.units import Unit, run_units, unit_key
from r1hpc.corpus.engine.work_dir import Report, Work, find_unit, unit_record
from r1hpc.corpus.recipe import Recipe
from r1hpc.corpus.sources.fields import SourceSpan, template_digest
from r1hpc.data.format.errors import DataError
from r1hpc.data.format.manifest import file_digest


@dataclass(frozen=True)
class Share:
    """Every `count`-th unit of a stage, from number `index` on: the work of one of `count` jobs."""

    stage: str
    index: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise UsageError(f"share {self.index}/{self.count}: the number lies from 0 to {self.count - 1}")


@dataclass(frozen=True)
class How:
    """Settings for making the units; none changes their content."""

    workers: int = 1
    report: Report | None = None
    """Called with a progress line now and then."""
    after_others: bool = False
    """Other jobs made the stages before a share, or all without one; none of their units is made here."""


@dataclass(frozen=True)
class Made:
    """The output of the stages."""

    vocabulary: Vocabulary
    tokenizer: Path | None
    """The tokenizer's folder; None for ids."""
    parts: list[Path]
    """The folder of every part."""


class _ShareMade(Exception):  # noqa: N818  # no error
    """Ends the run: the stage of the share is reached and its units exist."""


def divide(
    spans: Sequence[SourceSpan], part_bytes: int, *, by_source: bool = False
) -> list[list[SourceSpan]]:
    """Divide spans in order into parts of at least `part_bytes` input bytes (the last may have less).

    `by_source`: no part holds two sources, so each source is one run of tokens.
    """
    parts: list[list[SourceSpan]] = [[]]
    size = 0
    for span in spans:
        new_source = by_source and bool(parts[-1]) and parts[-1][-1].source != span.source
        if size >= part_bytes or new_source:
            parts.append([])
            size = 0
        parts[-1].append(span)
        size += span.num_bytes
    return parts


def parts_of(recipe: Recipe, spans: Sequence[SourceSpan]) -> list[list[SourceSpan]]:
    """Return the inputs divided into this recipe's parts."""
    return divide(spans, recipe.part_bytes, by_source=recipe.is_prepared or recipe.mix is not None)


def check_references(recipe: Recipe) -> None:
    """Raise UsageError for what a build would meet late: missing files and languages, mistyped weights."""
    if recipe.mix is not None:
        recipe.mix.check_sum()
    if codes := [code for clean in recipe.cleans for code in clean.lang]:
        text.check_codes(codes)
    if recipe.tokenizer.kind == "path" and recipe.tokenizer.path is not None:
        existing_files(recipe.resolve(recipe.tokenizer.path))
    for path in map(recipe.resolve, recipe.decontaminate.against if recipe.decontaminate else ()):
        if not path.is_file():
            what = "is a folder: name its files" if path.is_dir() else "is not there"
            raise UsageError(f"decontaminate.against: {path} {what}")


def plan_stages(recipe: Recipe, spans: Sequence[SourceSpan]) -> dict[str, int]:
    """Return the number of units of each stage; raises as check_references."""
    check_references(recipe)
    count = len(parts_of(recipe, spans))
    is_needed = {
        "evaluation": recipe.decontaminate is not None,
        "clean": recipe.is_prepared,
        "dedup": recipe.dedup is not None,
        "tokenizer": recipe.tokenizer.kind != "ids",
        "tokens": True,
    }
    return {stage: count if stage in ("clean", "tokens") else 1 for stage, yes in is_needed.items() if yes}


def run_stages(recipe: Recipe, spans: Sequence[SourceSpan], work: Work, how: How) -> Made:
    """Run all stages, making each missing unit; raises as check_references."""
    return _Stages(recipe, spans, work, how).run()


def run_share(recipe: Recipe, spans: Sequence[SourceSpan], work: Work, share: Share, how: How) -> None:
    """Make the units of a share, and the missing ones of earlier stages.

    Raise UsageError if the recipe has no such stage; DataError if how.after_others and a unit is missing.
    """
    with contextlib.suppress(_ShareMade):
        _Stages(recipe, spans, work, how, share).run()


class _Stages:
    def __init__(
        self, recipe: Recipe, spans: Sequence[SourceSpan], work: Work, how: How, share: Share | None = None
    ) -> None:
        self._recipe, self._spans, self._work, self._how = recipe, spans, work, how
        self._share = share
        self._stages: dict[str, list[list[Any]]] = {
            name: [["", 0]] * count for name, count in plan_stages(recipe, spans).items()
        }
        if share is not None and share.stage not in self._stages:
            raise UsageError(f"{recipe.name} has no stage {share.stage}; it has {', '.join(self._stages)}")
        self._content = recipe.content
        self._parts = parts_of(recipe, spans)
        self._inputs = [self._inputs_key(part) for part in self._parts]
        """For each part, the facts that name its units, taken before they are made."""
        self._sizes = [sum(span.num_bytes for span in part) for part in self._parts]

    def run(self) -> Made:
        return self._prepared() if self._recipe.is_prepared else self._plain()

    def _plain(self) -> Made:
        keys = [unit_key("inputs", key) for key in self._inputs]
        vocabulary, tokenizer = self._tokenizer(keys, [])
        made_by = tokenizer.name if tokenizer else self._content["tokenizer"]
        units = []
        for key, part, size in zip(keys, self._parts, self._sizes, strict=True):
            task = SpansTask(self._recipe, part, vocabulary, tokenizer)
            units.append(Unit("tokens", unit_key("spans", self._layout(), key, made_by), task, size))
        return Made(vocabulary, tokenizer, self._run(units, read_inputs=True))

    def _prepared(self) -> Made:
        cleaned = self._clean()
        keys = [path.name for path in cleaned]
        dedup: Path | None = None
        if self._recipe.dedup is not None:
            key = unit_key("dedup", self._content["dedup"], keys)
            (dedup,) = self._run([Unit("dedup", key, DedupTask(self._recipe, cleaned))])
            keys.append(dedup.name)
            self._check_losses([unit_record(path) for path in cleaned], unit_record(dedup)["dropped"])
        vocabulary, tokenizer = self._tokenizer(keys, cleaned)
        assert tokenizer is not None, "the recipe refuses stages on ids"
        units = []
        for number, (path, size) in enumerate(zip(cleaned, self._sizes, strict=True)):
            drops = dedup / f"{number}.parquet" if dedup else None
            drops = drops if drops is not None and drops.is_file() else None
            gone = file_digest(drops) if drops else None
            key = unit_key("texts", self._layout(), path.name, gone, tokenizer.name)
            task = TextsTask(self._recipe, path, drops, vocabulary, tokenizer)
            units.append(Unit("tokens", key, task, size))
        return Made(vocabulary, tokenizer, self._run(units))

    def _run(self, units: list[Unit], *, read_inputs: bool = False) -> list[Path]:
        """Return the folders of a stage's units. With `read_inputs` the parts they read must not change."""
        stage = units[0].stage
        share = self._share if self._share is not None and self._share.stage == stage else None
        if self._how.after_others and share is None:
            self._refuse_missing(units)
        self._stages[stage] = [[unit.key, unit.num_bytes] for unit in units]
        self._work.write_stages(self._stages)
        mine = slice(share.index, None, share.count) if share is not None else slice(None)
        made = run_units(self._work, units[mine], self._how.workers, self._how.report)
        if read_inputs:
            self._check_inputs(mine)
        if share is not None:
            raise _ShareMade
        return made

    def _refuse_missing(self, units: list[Unit]) -> None:
        """Refuse missing units: every job of an array would make the complete stage itself."""
        stage = units[0].stage
        if stage == "dedup" and self._share is not None and self._share.stage == "tokenizer":
            return  # its only unit is made on the way
        missing = sum(find_unit(self._work.folder, stage, unit.key) is None for unit in units)
        if missing:
            raise DataError(
                f"{missing} of {len(units)} units of stage {stage}, which jobs before this one made, are not "
                "there: the inputs, the code or a library has changed since, or files were removed. Cancel "
                "the jobs of this build that wait, and submit it again: units that still hold are kept"
            )

    def _check_inputs(self, mine: slice) -> None:
        """Refuse inputs that changed: units are named by their files' state, and could hold a mix of both."""
        for part, before in zip(self._parts[mine], self._inputs[mine], strict=True):
            if self._inputs_key(part) != before:
                names = ", ".join(sorted({span.path for span in part})[:3])
                raise DataError(
                    f"inputs changed while they were read (among {names}): build again; parts before them "
                    "are kept, and those behind where sizes are the same"
                )

    def _clean(self) -> list[Path]:
        evaluation: Path | None = None
        if (block := self._recipe.decontaminate) is not None:
            files = [file_digest(self._recipe.resolve(path)) for path in block.against]
            unit = Unit("evaluation", unit_key("evaluation", asdict(block), files), IndexTask(self._recipe))
            (evaluation,) = self._run([unit])
        settings = {name: self._content.get(name) for name in ("clean", "max_unreadable")}
        settings["minhash"] = (self._content.get("dedup") or {}).get("minhash")
        units = []
        for part, inputs, size in zip(self._parts, self._inputs, self._sizes, strict=True):
            key = unit_key("clean", settings, inputs, evaluation.name if evaluation else None)
            units.append(Unit("clean", key, CleanTask(self._recipe, part, evaluation), size))
        paths = self._run(units, read_inputs=True)
        records = [unit_record(path) for path in paths]
        self._check_unreadable(records)
        self._check_losses(records, [{} for _ in records])
        return paths

    def _check_losses(self, records: list[dict[str, Any]], duplicates: list[dict[str, int]]) -> None:
        """Refuse a source that lost too much before time is spent on the next stage."""
        counts = []
        for record, more in zip(records, duplicates, strict=True):
            kept = record["kept"] - sum(more.values())
            counts.append((record["source"], SourceCount(kept, dropped=record["dropped"] | more)))
        check_losses(self._recipe, add_up(self._recipe, counts))

    def _check_unreadable(self, records: list[dict[str, Any]]) -> None:
        total = sum(record["in"] for record in records)
        count = sum(record["dropped"].get("unreadable", 0) for record in records)
        most = self._recipe.max_unreadable
        lost, size = sum(record["lost_bytes"] for record in records), sum(self._sizes)
        if count > most * total or lost > most * size:
            examples = [
                f"{record['inputs'][place]} at {position}: {what}"
                for record in records
                for place, position, what in record["unreadable"]
            ]
            behind = f", and {format_bytes(lost)} of {format_bytes(size)} with them" if lost else ""
            raise UsageError(
                f"{count:,} of {total:,} records cannot be read{behind}, more than max_unreadable {most} "
                "allows; the first: " + "; ".join(examples[:3])
            )

    def _tokenizer(self, keys: list[str], cleaned: list[Path]) -> tuple[Vocabulary, Path | None]:
        chosen = self._recipe.tokenizer
        if chosen.kind == "ids":
            assert chosen.vocab_size is not None, "the recipe requires both with kind ids"
            assert chosen.eos_id is not None, "the recipe requires both with kind ids"
            return Vocabulary(chosen.vocab_size, chosen.eos_id), None
        # Its inputs: the texts it is trained on, or the files it is copied from.
        made_of: Any = keys if chosen.kind == "byte_bpe" else None
        if chosen.path is not None:
            files = existing_files(self._recipe.resolve(chosen.path))
            made_of = {name: hashlib.sha256(raw).hexdigest() for name, raw in files.items()}
        key = unit_key("tokenizer", self._content["tokenizer"], self._recipe.is_traces, made_of)
        (path,) = self._run([Unit("tokenizer", key, TokenizerTask(self._recipe, self._spans, cleaned))])
        return Vocabulary(**unit_record(path)), path

    def _layout(self) -> dict[str, Any]:
        return {name: self._content[name] for name in ("profile", "chunk_tokens", "shard_tokens")}

    def _inputs_key(self, part: Sequence[SourceSpan]) -> list[Any]:
        """Return a part's spans, how its sources are read, and the state of its files."""
        sources = sorted({span.source for span in part})
        files = sorted({(span.source, span.path) for span in part})
        return [
            [[number, self._content["sources"][number]] for number in sources],
            [asdict(span) for span in part],
            [self._file_state(source, path) for source, path in files],
            [self._templates[number] for number in sources if number in self._templates],
        ]

    @functools.cached_property
    def _templates(self) -> dict[int, str]:
        """Return digests of the chat templates, for each source that can hold messages and has one."""
        found = {}
        for number, source in enumerate(self._recipe.sources):
            if source.kind in ("jsonl", "parquet", "arrow"):
                with contextlib.suppress(UsageError):  # without a template; a record of messages then raises
                    found[number] = template_digest(self._recipe, source)
        return found

    def _file_state(self, source: int, name: str) -> list[Any]:
        path = self._recipe.input_path(source, name)
        try:
            status = path.stat()
        except OSError:  # its span reports the fault
            return [str(path.absolute())]
        state = [str(path.absolute()), status.st_size, status.st_mtime_ns]
        return state if os.access(path, os.R_OK) else [*state, "unreadable"]


def describe(recipe: Recipe, spans: Sequence[SourceSpan]) -> dict[str, Any]:
    """Describe what a build will read and how it is divided, for `shard plan`."""
    sources = []
    for number, source in enumerate(recipe.sources):
        mine = [span for span in spans if span.source == number]
        size = sum(span.num_bytes for span in mine)
        files = len({span.path for span in mine})
        sources.append({"name": source.name, "kind": source.kind, "files": files, "bytes": size})
    return {"name": recipe.name, "sources": sources, "stages": plan_stages(recipe, spans)}
