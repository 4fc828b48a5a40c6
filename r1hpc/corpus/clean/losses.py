"""Count the records that each source keeps and loses, and refuse a source that loses too many.

sources = count_by_source(recipe, parts)    # [{"name": "web", "documents": {"in": 9, ...}, ...}, ...]
check_losses(recipe, sources)               # DataError names source, share, reasons and setting
read_counts(manifest)                       # of a dataset: over all and by source
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from r1hpc.base.files import read_json
from r1hpc.base.units import format_counts
from r1hpc.corpus.clean.decisions import NO_TRACE, NOT_UTF8
from r1hpc.corpus.recipe import Recipe
from r1hpc.data.format.documents import has_roles
from r1hpc.data.format.errors import DataError
from r1hpc.data.format.manifest import LEFT_OUT, DatasetManifest

Part = tuple[int, int, Mapping[str, int]]
"""Source, records, and dropped records by rule of a part of the inputs."""


def count_by_source(recipe: Recipe, parts: Iterable[Part]) -> list[dict[str, Any]]:
    """Return the counts of each source."""
    num_records: Counter[int] = Counter()
    dropped: list[Counter[str]] = [Counter() for _ in recipe.sources]
    for source, count, rules in parts:
        num_records[source] += count
        dropped[source].update(rules)
    names = [source.name for source in recipe.sources]
    return [_source_counts(name, num_records[i], dropped[i]) for i, name in enumerate(names)]


def _source_counts(name: str, num_records: int, dropped: Mapping[str, int]) -> dict[str, Any]:
    kept = num_records - sum(dropped.values())
    return {"name": name, "documents": {"in": num_records, "kept": kept, "dropped": dropped}, "edits": {}}


def sum_up(sources: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the counts over all sources, and those of each."""
    dropped, edits = Counter[str](), Counter[str]()
    for source in sources:
        dropped.update(source["documents"]["dropped"])
        edits.update(source["edits"])
    counts = {name: sum(source["documents"][name] for source in sources) for name in ("in", "kept")}
    return {"documents": counts | {"dropped": dropped}, "edits": edits, "sources": sources}


def read_counts(manifest: DatasetManifest) -> dict[str, Any]:
    """Return a dataset's counts; a plain recipe leaves out only empty records, non-text and non-traces."""
    if "preparation" in manifest.content:
        preparation: dict[str, Any] = manifest.content["preparation"]
        return preparation
    rule = NO_TRACE if has_roles(manifest) else NOT_UTF8
    record = manifest.path / LEFT_OUT
    # Datasets from before that file existed count everything under one rule.
    left_out = read_json(record) if record.is_file() else {}
    sources = []
    for source in manifest.content["sources"]:
        skipped = {rule: source["num_skipped"]} if source["num_skipped"] else {}
        dropped = left_out.get(source["name"], skipped)
        num_records = source["num_documents"] + sum(dropped.values())
        sources.append(_source_counts(source["name"], num_records, dropped))
    return sum_up(sources)


def check_losses(
    recipe: Recipe, sources: Sequence[Mapping[str, Any]], *, may_be_emptied: bool = False
) -> None:
    """Raise DataError for a source that loses a greater share of its records than max_dropped, or all.

    The counts may be those of the first stages alone: later stages only drop more. `may_be_emptied`: a source
    without max_dropped may lose all, as in datasets of earlier versions.
    """
    faults = []
    mend = "correct its records" + recipe.is_prepared * ", loosen the stages for it (sources[].clean)"
    for source, counts in zip(recipe.sources, sources, strict=True):
        num_records, kept = counts["documents"]["in"], counts["documents"]["kept"]
        lost = num_records - kept
        reasons = format_counts(counts["documents"]["dropped"])
        what = f"source {source.name}: {lost:,} of {num_records:,} records are dropped ({reasons})"
        share = lost / max(1, num_records)  # not a product: .29 * 100 is less than 29
        if lost and not kept and not may_be_emptied:
            faults.append(f"{what}, and none is left; {mend}, or leave the source out")
        elif share > source.max_dropped:
            faults.append(
                f"{what}, a share of {share:.6g} and more than its max_dropped {source.max_dropped} allows; "
                f"{mend}, or raise sources[].max_dropped"
            )
    if faults:
        raise DataError("\n".join(faults))
