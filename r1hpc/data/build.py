"""From a recipe to a published dataset.

    report = build_dataset(find_recipe("stdlib"), Path("data/stdlib"), workers=2)

plan (list the inputs, divide them into parts) -> tokenizer -> parts (any number of processes, each
part written by one) -> manifest -> fsync -> one rename. Nothing is visible under the destination's name
before the rename. The same recipe over the same inputs gives the same bytes with any number of workers.
"""

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from r1hpc.base.errors import UsageError
from r1hpc.base.failpoints import failpoint
from r1hpc.data.encode import SourceCount, Vocabulary
from r1hpc.data.errors import DataError, DatasetMissingError
from r1hpc.data.layout import PARTS, TOKENIZER, part_name
from r1hpc.data.manifest import (
    FORMAT,
    MANIFEST,
    Manifest,
    census,
    digest,
    file_digest,
    read_manifest,
    write_manifest,
)
from r1hpc.data.recipe import Recipe, load_recipe
from r1hpc.data.segments import Role
from r1hpc.data.sources import Span, list_spans, read_span
from r1hpc.data.staging import Stage, publish, remove_abandoned, staging
from r1hpc.data.vocabulary import TOKENIZER_FILE, Encoder, tokenizer_files
from r1hpc.data.writer import PartResult, write_part


@dataclass(frozen=True)
class BuildReport:
    """What a build did. `built` is False when the dataset was there already."""

    id: str
    path: Path
    built: bool
    num_tokens: int
    num_documents: int
    vocab_size: int
    note: str = ""


@dataclass(frozen=True)
class _Job:
    """Everything a writer process needs for its part."""

    recipe: Recipe
    spans: list[Span]
    folder: Path
    vocabulary: Vocabulary
    tokenizer: Path | None


def build_dataset(recipe_path: Path, out: Path, *, workers: int = 1) -> BuildReport:
    """Build the dataset of a recipe file at `out`, unless it is there.

    Args:
        workers: writer processes; changes how long it takes and nothing else.

    Raises:
        UsageError: a recipe or an input that cannot be used; `out` holds something else.
        ShardCorruptError: `out` holds a damaged dataset.
    """
    if workers < 1:
        raise UsageError(f"--workers must be at least 1, not {workers}")
    recipe = load_recipe(recipe_path)
    out = out.absolute()
    existing = _find_existing(recipe, out)
    if existing:
        return existing
    spans = list_spans(recipe)
    remove_abandoned(out.parent)
    with staging(out) as stage:
        dataset_id = _write(recipe, spans, stage, workers)
        failpoint("data.build.publish")
        published = publish(stage)
    if not published:
        return _lost_race(recipe, out)
    return _report(read_manifest(out), dataset_id, built=True)


def divide(spans: Sequence[Span], part_bytes: int) -> list[list[Span]]:
    """Consecutive spans in parts of at least `part_bytes` input bytes (the last may have less)."""
    parts: list[list[Span]] = [[]]
    size = 0
    for span in spans:
        if size >= part_bytes:
            parts.append([])
            size = 0
        parts[-1].append(span)
        size += span.num_bytes
    return parts


def sample_texts(recipe: Recipe, spans: Sequence[Span], sample_bytes: int) -> Iterator[str]:
    """Text of about `sample_bytes`, from spans spread evenly over all inputs: the same on every call."""
    total = sum(span.num_bytes for span in spans)
    taken = seen = 0
    for span in spans:
        # Take this span when the running share of what was taken lags behind the share of what was seen.
        seen += span.num_bytes
        if taken * total > sample_bytes * (seen - span.num_bytes):
            continue
        for document in read_span(recipe, span):
            if document.raw and not document.is_ids:
                taken += len(document.raw)
                yield document.raw.decode("utf-8", "replace")


def _write(recipe: Recipe, spans: list[Span], stage: Stage, workers: int) -> str:
    import zarr

    root = stage.content
    zarr.create_group(root)
    zarr.create_group(root / PARTS)
    tokenizer = _write_tokenizer(recipe, spans, root)
    vocabulary = _vocabulary(recipe, tokenizer)
    jobs = [
        _Job(recipe, part, root / PARTS / part_name(i), vocabulary, tokenizer)
        for i, part in enumerate(divide(spans, recipe.part_bytes))
    ]
    results = _run(jobs, workers)
    if not sum(result.num_tokens for result in results):
        raise UsageError("the inputs are empty: every document has no text, or was left out")
    return write_manifest(root, _manifest(recipe, spans, root, vocabulary, results))


def _write_tokenizer(recipe: Recipe, spans: list[Span], root: Path) -> Path | None:
    chosen = recipe.tokenizer
    path = recipe.resolve(chosen.path) if chosen.path else None
    files = tokenizer_files(chosen, path, sample_texts(recipe, spans, chosen.sample_bytes))
    if not files:
        return None
    folder = root / TOKENIZER
    folder.mkdir()
    for name, raw in files.items():
        (folder / name).write_bytes(raw)
    return folder / TOKENIZER_FILE


def _vocabulary(recipe: Recipe, tokenizer: Path | None) -> Vocabulary:
    if tokenizer is None:
        assert recipe.tokenizer.vocab_size is not None, "the recipe requires both with kind ids"
        assert recipe.tokenizer.eos_id is not None, "the recipe requires both with kind ids"
        return Vocabulary(recipe.tokenizer.vocab_size, recipe.tokenizer.eos_id)
    encoder = _encoder(recipe, tokenizer)
    return Vocabulary(encoder.vocab_size, encoder.eos_id)


def _run(jobs: list[_Job], workers: int) -> list[PartResult]:
    workers = min(workers, len(jobs))
    if workers == 1:
        return [_write_one(job) for job in jobs]
    # spawn: the parent has used tokenizers' and zarr's threads by now, which a fork would not carry over.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_begin_worker) as pool:
        try:
            return list(pool.map(_write_one, jobs))
        except BrokenProcessPool:
            raise DataError(
                "a writer process died (out of memory?); try fewer --workers or a smaller part_bytes"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _write_one(job: _Job) -> PartResult:
    encoder = _encoder(job.recipe, job.tokenizer) if job.tokenizer else None
    return write_part(job.recipe, job.spans, job.folder, job.vocabulary, encoder)


def _encoder(recipe: Recipe, tokenizer: Path) -> Encoder:
    """Traces come from a template: special tokens they spell are meant. Other text cannot forge one."""
    return Encoder(tokenizer, recipe.tokenizer.eos, parse_special=recipe.is_traces)


def _begin_worker() -> None:
    """One thread per worker, and no worker outlives a killed parent."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None, "a pool worker has a parent"

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _manifest(
    recipe: Recipe, spans: list[Span], root: Path, vocabulary: Vocabulary, results: list[PartResult]
) -> dict[str, Any]:
    files = {f"{PARTS}/zarr.json": file_digest(root / PARTS / "zarr.json")}
    files |= {"zarr.json": file_digest(root / "zarr.json")}
    files |= {f"{TOKENIZER}/{name}": entry for name, entry in census(root / TOKENIZER).items()}
    for result in results:
        files |= {f"{PARTS}/{result.name}/{name}": entry for name, entry in result.files.items()}
    roles = {"roles": {role.name: role.value for role in Role}} if recipe.is_traces else {}
    return roles | {
        "format": FORMAT,
        "name": recipe.name,
        "recipe": recipe.content,
        "recipe_hash": recipe.hash,
        "inputs_hash": _inputs_hash(spans),
        "dtype": vocabulary.dtype.name,
        "vocab_size": vocabulary.vocab_size,
        "eos_id": vocabulary.eos_id,
        "invalid_id": vocabulary.invalid_id,
        "num_tokens": sum(result.num_tokens for result in results),
        "num_documents": sum(result.num_documents for result in results),
        "sources": [
            {"name": source.name, "kind": source.kind, "license": source.license} | asdict(count)
            for source, count in zip(recipe.sources, _totals(recipe, results), strict=True)
        ],
        "parts": [
            {"name": result.name, "num_tokens": result.num_tokens, "num_documents": result.num_documents}
            for result in results
        ],
        "files": files,
    }


def _totals(recipe: Recipe, results: list[PartResult]) -> list[SourceCount]:
    totals = [SourceCount() for _ in recipe.sources]
    for result in results:
        for index, count in result.sources.items():
            total = totals[index]
            total.num_documents += count.num_documents
            total.num_tokens += count.num_tokens
            total.num_bytes += count.num_bytes
            total.num_skipped += count.num_skipped
    return totals


def _inputs_hash(spans: list[Span]) -> str:
    """Names and sizes of the inputs, to notice cheaply that they have changed since a build."""
    return digest([[span.source, span.path, span.start, span.stop, span.num_bytes] for span in spans])


def _find_existing(recipe: Recipe, out: Path) -> BuildReport | None:
    """The dataset at `out` if it is this recipe's; None if there is nothing; an error for anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        manifest = read_manifest(out)
    except DatasetMissingError:
        raise UsageError(
            f"{out} exists and is no dataset ({MANIFEST} is missing); choose another --out"
        ) from None
    if manifest.content["recipe_hash"] != recipe.hash:
        raise UsageError(
            f"{out} holds dataset {manifest.content['name']!r} ({manifest.id[:12]}), built from another "
            "recipe; choose another --out or move it away"
        )
    manifest.check_census()
    return _report(manifest, manifest.id, built=False, note=_staleness(recipe, manifest))


def _staleness(recipe: Recipe, manifest: Manifest) -> str:
    with contextlib.suppress(UsageError):  # inputs that are gone do not harm a dataset that is there
        if _inputs_hash(list_spans(recipe)) == manifest.content["inputs_hash"]:
            return ""
    return "the inputs have changed since; build into a new folder to take them in"


def _lost_race(recipe: Recipe, out: Path) -> BuildReport:
    existing = _find_existing(recipe, out)
    if existing is None:
        raise DataError(f"{out} appeared and vanished while it was being built; try again")
    return existing


def _report(manifest: Manifest, dataset_id: str, *, built: bool, note: str = "") -> BuildReport:
    content = manifest.content
    return BuildReport(
        dataset_id,
        manifest.path,
        built,
        content["num_tokens"],
        content["num_documents"],
        content["vocab_size"],
        note,
    )
