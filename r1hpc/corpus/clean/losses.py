"""Count the records that each source keeps and loses, and refuse a source that loses too many.

totals = add_up(recipe, counts_of_parts)    # {"web": SourceCount(...), ...}
check_losses(recipe, totals)                # DataError names source, share, reasons and setting
describe_counts(read_counts(manifest))      # of a dataset: over all and by source
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from r1hpc.base.files import read_json
from r1hpc.base.units import format_counts
from r1hpc.corpus.clean.decisions import NO_TRACE, NOT_UTF8
from r1hpc.corpus.recipe import Recipe
from r1hpc.data.format.documents import has_roles
from r1hpc.data.format.errors import DataError
from r1hpc.data.format.manifest import LEFT_OUT, DatasetManifest

_NUMBERS = ("num_documents", "num_tokens", "num_bytes", "num_skipped")


@dataclass
class SourceCount:
    """Counts of one source."""

    num_documents: int = 0
    num_tokens: int = 0
    num_bytes: int = 0
    num_skipped: int = 0
    """Documents left out as the recipe says: not UTF-8, or no trace; also null values in a line of JSON."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Records left out by rule: those above, every other empty record, and what stages dropped."""
    edits: dict[str, int] = field(default_factory=dict)

    def leave_out(self, rule: str, is_skipped: bool = True) -> None:
        add_counts(self.dropped, {rule: 1})
        self.num_skipped += is_skipped

    def add(self, other: "SourceCount") -> None:
        for name in _NUMBERS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        add_counts(self.dropped, other.dropped)
        add_counts(self.edits, other.edits)

    @property
    def numbers(self) -> dict[str, int]:
        """Return the counts of what is kept, as in the manifest."""
        return {name: getattr(self, name) for name in _NUMBERS}

    @property
    def records(self) -> dict[str, Any]:
        """Return the records kept and dropped, as in the manifest's preparation."""
        num_records = self.num_documents + sum(self.dropped.values())
        documents = {"in": num_records, "kept": self.num_documents, "dropped": self.dropped}
        return {"documents": documents, "edits": self.edits}


def add_counts(total: dict[str, int], counts: Mapping[str, int]) -> None:
    """Add named counts to a total."""
    for name, count in counts.items():
        total[name] = total.get(name, 0) + count


def add_up(recipe: Recipe, counts: Iterable[tuple[int, SourceCount]]) -> dict[str, SourceCount]:
    """Return the counts of each source by name, from those of parts by the source's number."""
    totals = {source.name: SourceCount() for source in recipe.sources}
    for source, count in counts:
        totals[recipe.sources[source].name].add(count)
    return totals


def describe_counts(totals: Mapping[str, SourceCount]) -> dict[str, Any]:
    """Return the records over all sources, and those of each."""
    overall = SourceCount()
    for count in totals.values():
        overall.add(count)
    return overall.records | {"sources": [{"name": name} | count.records for name, count in totals.items()]}


def read_counts(manifest: DatasetManifest) -> dict[str, SourceCount]:
    """Return a dataset's counts by source; a plain recipe drops only empty ones, non-text and non-traces."""
    totals = {}
    if preparation := manifest.content.get("preparation"):
        for source in preparation["sources"]:
            kept, dropped = source["documents"]["kept"], source["documents"]["dropped"]
            totals[source["name"]] = SourceCount(kept, dropped=dropped, edits=source["edits"])
        return totals
    rule = NO_TRACE if has_roles(manifest) else NOT_UTF8
    record = manifest.path / LEFT_OUT
    # Datasets from before that file existed count everything under one rule.
    left_out = read_json(record) if record.is_file() else {}
    for source in manifest.content["sources"]:
        skipped = {rule: source["num_skipped"]} if source["num_skipped"] else {}
        dropped = left_out.get(source["name"], skipped)
        totals[source["name"]] = SourceCount(source["num_documents"], dropped=dropped)
    return totals


def check_losses(recipe: Recipe, totals: Mapping[str, SourceCount], *, may_be_emptied: bool = False) -> None:
    """Raise DataError for a source that loses a greater share of its records than max_dropped, or all.

    The counts may be those of the first stages alone: later stages only drop more. `may_be_emptied`: a source
    without max_dropped may lose all, as in datasets of earlier versions.
    """
    faults = []
    mend = "correct its records" + recipe.is_prepared * ", loosen the stages for it (sources[].clean)"
    for source in recipe.sources:
        count = totals[source.name]
        lost = sum(count.dropped.values())
        num_records = count.num_documents + lost
        reasons = format_counts(count.dropped)
        what = f"source {source.name}: {lost:,} of {num_records:,} records are dropped ({reasons})"
        share = lost / max(1, num_records)  # not a product: .29 * 100 is less than 29
        if lost and not count.num_documents and not may_be_emptied:
            faults.append(f"{what}, and none is left; {mend}, or leave the source out")
        elif share > source.max_dropped:
            faults.append(
                f"{what}, a share of {share:.6g} and more than its max_dropped {source.max_dropped} allows; "
                f"{mend}, or raise sources[].max_dropped"
            )
    if faults:
        raise DataError("\n".join(faults))
