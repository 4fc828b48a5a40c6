"""Build a dataset from a recipe and publish it.

    report = build_dataset(find_recipe("stdlib"), Path("data/stdlib"), workers=2)

The inputs are divided into parts. Stages run in order (see stages.py): evaluation -> clean -> dedup ->
tokenizer -> tokens; a plain recipe has the last two alone. Stages clean and tokens have a unit of work for
each part, the others one. At the end the parts are gathered, the manifest is written, and one rename makes
the dataset visible. The same recipe over the same inputs gives the same bytes with any number of workers,
however often it was killed.
"""

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1hpc.base.errors import StateError, UsageError
from r1hpc.base.failpoints import failpoint
from r1hpc.base.files import read_json, write_json
from r1hpc.corpus.build.encode import Vocabulary
from r1hpc.corpus.build.stages import How, Made, Share, run_share, run_stages
from r1hpc.corpus.build.tokenize import PART
from r1hpc.corpus.build.vocabulary import existing_files
from r1hpc.corpus.build.writer import PartResult
from r1hpc.corpus.clean.losses import SourceCount, add_up, check_losses, describe_counts, read_counts
from r1hpc.corpus.engine import work_dir
from r1hpc.corpus.engine.work_dir import Report, Work
from r1hpc.corpus.recipe import Recipe, load_recipe
from r1hpc.corpus.sources.fields import SourceSpan, template_digest
from r1hpc.corpus.sources.read import list_spans
from r1hpc.data.format.documents import Role
from r1hpc.data.format.errors import ClearedError, DataError, DatasetMissingError
from r1hpc.data.format.manifest import (
    FORMAT,
    INPUT_STATES,
    LEFT_OUT,
    MADE_WITH,
    MANIFEST,
    PARTS,
    TOKENIZER,
    DatasetManifest,
    census,
    digest,
    file_digest,
    part_name,
    read_manifest,
    write_manifest,
)


@dataclass(frozen=True)
class BuildReport:
    """The result of a build. `built` is False if the dataset existed already."""

    id: str
    path: Path
    built: bool
    num_tokens: int
    num_documents: int
    vocab_size: int
    note: str = ""


def build_dataset(
    recipe_path: Path,
    out: Path,
    *,
    workers: int = 1,
    report: Report | None = None,
    after_others: bool = False,
    check_inputs: bool = False,
) -> BuildReport:
    """Build the dataset of a recipe file at `out`, unless it exists.

    Raise UsageError for a recipe or an input that cannot be used, or if `out` holds something else. Raise
    ShardCorruptError if `out` holds a damaged dataset.

    Args:
        workers: writer processes; changes how long it takes and nothing else.
        report: called with a progress line now and then.
        after_others: other jobs made all units; a missing one is a DataError.
        check_inputs: record digests of the inputs; compare them if the dataset exists.
    """
    if workers < 1:
        raise UsageError(f"--workers must be at least 1, not {workers}")
    recipe = load_recipe(recipe_path)
    out = work_dir.destination_of(out)
    existing = _find_existing(recipe, out, check_inputs)
    if existing:
        work_dir.remove_leftover(out)
        return existing
    spans = list_spans(recipe, is_new=not work_dir.work_folder(out).exists())
    try:
        return _build(recipe, spans, out, How(workers, report, after_others), check_inputs)
    except (FileNotFoundError, ClearedError):
        if not (out / MANIFEST).is_file():
            raise
        # Without locks another build can finish first and remove the work folder.
        return _lost_race(recipe, out)


def find_dataset(recipe_path: Path, out: Path, check_inputs: bool = False) -> BuildReport | None:
    """Return this recipe's dataset at `out`; None if nothing is there, UsageError if something else is."""
    return _find_existing(load_recipe(recipe_path), work_dir.destination_of(out), check_inputs)


def build_share(
    recipe_path: Path,
    out: Path,
    share: Share,
    *,
    workers: int = 1,
    report: Report | None = None,
    after_others: bool = False,
) -> None:
    """Make one share of a dataset's units, for one of several jobs; `build_dataset` gathers them.

    With `after_others` other jobs made the earlier stages; a missing unit of those is a DataError. Raise
    UsageError if the recipe or an input cannot be used, or the recipe does not have the stage.
    """
    recipe, out = load_recipe(recipe_path), work_dir.destination_of(out)
    if _find_existing(recipe, out) is None:
        with work_dir.join_work(out, report) as work:
            run_share(recipe, list_spans(recipe), work, share, How(workers, report, after_others))


def _build(recipe: Recipe, spans: list[SourceSpan], out: Path, how: How, check_inputs: bool) -> BuildReport:
    with work_dir.open_work(out, how.report) as work:
        existing = _find_existing(recipe, out)  # made while this build waited for the work folder
        if existing:
            return existing
        states = _input_states(recipe, spans, lambda _: check_inputs)
        made = run_stages(recipe, spans, work, how)
        content = _gather(work, made)
        results = [PartResult.from_record(work_dir.unit_record(path)) for path in made.parts]
        totals = add_up(recipe, (item for result in results for item in result.sources.items()))
        _check_content(recipe, totals)
        manifest = _manifest(recipe, spans, content, made.vocabulary, results, totals)
        left_out = {name: dict(sorted(c.dropped.items())) for name, c in totals.items() if c.dropped}
        if recipe.is_prepared:
            manifest["preparation"] = describe_counts(totals)
        elif left_out:
            write_json(content / LEFT_OUT, left_out, mode=0o644)
        write_manifest(content, manifest)
        write_json(content / INPUT_STATES, states, mode=0o644)
        if beside := _files_beside(recipe):
            write_json(content / MADE_WITH, beside, mode=0o644)
        failpoint("data.build.publish")
        published = work_dir.publish(content, work.destination)
        failpoint("data.build.published")
    if not published:
        return _lost_race(recipe, out)
    return _report(read_manifest(out), built=True)


def _gather(work: Work, made: Made) -> Path:
    """Gather the dataset's content in a separate folder; the units stay until it has its name."""
    import zarr

    content = work_dir.new_folder(work.folder)
    zarr.create_group(content)
    zarr.create_group(content / PARTS)
    if made.tokenizer is not None:
        work_dir.link_tree(made.tokenizer, content / TOKENIZER)
        (content / TOKENIZER / work_dir.DONE).unlink()
    for number, path in enumerate(made.parts):
        work_dir.link_tree(path / PART, content / PARTS / part_name(number))
    return content


def _manifest(
    recipe: Recipe,
    spans: list[SourceSpan],
    root: Path,
    vocabulary: Vocabulary,
    results: list[PartResult],
    totals: dict[str, SourceCount],
) -> dict[str, Any]:
    files = {f"{PARTS}/zarr.json": file_digest(root / PARTS / "zarr.json")}
    files |= {"zarr.json": file_digest(root / "zarr.json")}
    files |= {f"{TOKENIZER}/{name}": entry for name, entry in census(root / TOKENIZER).items()}
    for number, result in enumerate(results):
        files |= {f"{PARTS}/{part_name(number)}/{name}": entry for name, entry in result.files.items()}
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
            {"name": source.name, "kind": source.kind, "license": source.license}
            | totals[source.name].numbers
            for source in recipe.sources
        ],
        "parts": [
            {"name": part_name(i), "num_tokens": part.num_tokens, "num_documents": part.num_documents}
            for i, part in enumerate(results)
        ],
        "files": files,
    }


def _check_content(recipe: Recipe, totals: dict[str, SourceCount]) -> None:
    """Refuse a dataset without tokens, or with a source that lost too much or that a mixture cannot use."""
    check_losses(recipe, totals)
    empty = [name for name, count in totals.items() if not count.num_tokens]
    if len(empty) == len(totals):
        raise UsageError("the inputs are empty: every document has no text")
    if recipe.mix is not None and empty:  # here, before a run meets it
        raise UsageError(f"mix: source {empty[0]} has no document; leave it out")


def _inputs_hash(spans: list[SourceSpan]) -> str:
    """Return a hash of the inputs' names and sizes, to notice cheaply that they changed since a build."""
    return digest([[span.source, span.path, span.start, span.stop, span.num_bytes] for span in spans])


def _input_states(
    recipe: Recipe, spans: list[SourceSpan], is_digested: Callable[[str], bool]
) -> dict[str, dict[str, Any]]:
    """Return size, time and, if requested, sha256 of the inputs, by source and name."""
    found: dict[str, dict[str, Any]] = {}
    for number, name in sorted({(span.source, span.path) for span in spans}):
        path, key = recipe.input_path(number, name), f"{recipe.sources[number].name}/{name}"
        with contextlib.suppress(OSError):  # unreadable ones were put aside
            status = path.stat()
            found[key] = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
            found[key] |= file_digest(path) if is_digested(key) else {}
    return found


def _find_existing(recipe: Recipe, out: Path, check_inputs: bool = False) -> BuildReport | None:
    """Return the dataset at `out` if it is this recipe's; None if nothing is there; else raise an error."""
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
    check_losses(recipe, read_counts(manifest), may_be_emptied=True)
    return _report(manifest, built=False, note=_staleness(recipe, manifest, check_inputs))


def _staleness(recipe: Recipe, manifest: DatasetManifest, check_inputs: bool) -> str:
    """Return a note about files that have changed since the build."""
    # Missing inputs do not harm an existing dataset.
    with contextlib.suppress(UsageError, StateError, OSError):
        spans = list_spans(recipe)
        is_same = _inputs_hash(spans) == manifest.content["inputs_hash"]
        beside = _files_beside(recipe)
        record = manifest.path / MADE_WITH
        was = read_json(record) if record.is_file() else beside  # older versions kept none
        if is_same and was == beside and _has_tokenizer_of(recipe, manifest):
            return _edited(recipe, spans, manifest.path / INPUT_STATES, check_inputs)
    return "the inputs have changed since; build into a new folder to use them"


def _edited(recipe: Recipe, spans: list[SourceSpan], record: Path, check_inputs: bool) -> str:
    """Return a note about inputs of the same names and sizes that have changed; a digest decides if known."""
    if not record.is_file():
        return "an earlier version built it: only the names and sizes of inputs could be compared"
    was, now = read_json(record), _input_states(recipe, spans, lambda _: False)
    touched = {name for name, state in now.items() if state["mtime_ns"] != was.get(name, {}).get("mtime_ns")}
    asked = touched | (set(was) if check_inputs else set())
    known = {name: was[name]["sha256"] for name in asked if "sha256" in was.get(name, {})}
    found = _input_states(recipe, spans, known.__contains__) if known else {}
    if changed := sorted(name for name in known if found.get(name, {}).get("sha256") != known[name]):
        return f"inputs have changed since ({_few(changed)}); build into a new folder to use them"
    if unsure := sorted(touched - set(known)):
        return (
            f"inputs were written again since ({_few(unsure)}), with the same sizes: if their content has "
            "changed, build into a new folder (with --check-inputs, which tells next time)"
        )
    if check_inputs and len(known) < len(was):
        return "it was built without --check-inputs: there are no digests to compare with"
    return ""


def _files_beside(recipe: Recipe) -> dict[str, str]:
    """Return digests of the files beside the inputs that decide what is kept and how it is written, by their
    names in the recipe. The tokenizer's are in the dataset."""
    against = recipe.decontaminate.against if recipe.decontaminate else ()
    found = {name: str(file_digest(recipe.resolve(name))["sha256"]) for name in against}
    named = {source.chat_template: source for source in recipe.sources if source.chat_template}
    return found | {name: template_digest(recipe, source) for name, source in named.items()}


def _has_tokenizer_of(recipe: Recipe, manifest: DatasetManifest) -> bool:
    if recipe.tokenizer.kind != "path" or recipe.tokenizer.path is None:
        return True
    files = existing_files(recipe.resolve(recipe.tokenizer.path))
    now = {f"{TOKENIZER}/{name}": hashlib.sha256(raw).hexdigest() for name, raw in files.items()}
    then = {name: entry["sha256"] for name, entry in manifest.files.items()}
    return now == {name: sha256 for name, sha256 in then.items() if name.startswith(f"{TOKENIZER}/")}


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _lost_race(recipe: Recipe, out: Path) -> BuildReport:
    existing = _find_existing(recipe, out)
    if existing is None:
        raise DataError(f"{out} appeared and vanished while it was being built; try again")
    return existing


def _report(manifest: DatasetManifest, *, built: bool, note: str = "") -> BuildReport:
    counts = {name: manifest.content[name] for name in ("num_tokens", "num_documents", "vocab_size")}
    return BuildReport(manifest.id, manifest.path, built, **counts, note=note)
