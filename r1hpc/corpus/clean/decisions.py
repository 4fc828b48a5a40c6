"""Record the decision about every record of the inputs: kept or dropped, by which rule, at which value.

Stage clean writes the first decisions, stage tokens the final ones; `shard trace` shows them. A dataset
without stage clean has none. parts/part-00000/decisions.parquet has one row for each record of the
part, in the order of the inputs:

    input, position, size   which file of inputs.json, where in it, how many bytes (0 for rows of a table)
    rule, value, note       the rule that dropped it (empty: kept), the number that decided, an explanation
    language, score         if it was identified
    repaired, masked, lines_removed     what was changed in the text
    document                number of the document in its part; null when dropped
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from r1hpc.data.format.manifest import DECISIONS, PARTS, DatasetManifest

UNREADABLE = "unreadable"
NOT_UTF8 = "not_utf8"
NO_TRACE = "no_trace"
EMPTY = "empty"
TOO_LONG = "too_long"
OVER_64_MIB = "over_64_mib"
LANGUAGE = "language"
PII = "pii"
CONTAMINATED = "contaminated"
EXACT = "exact_duplicate"
NEAR = "near_duplicate"
TOKENIZER = "tokenizer"


@dataclass
class RecordDecision:
    """The decision about one record, which is dropped once `rule` is set."""

    input: int
    position: int
    size: int
    rule: str = ""
    value: float | None = None
    note: str = ""
    language: str = ""
    score: float | None = None
    repaired: bool = False
    masked: int = 0
    lines_removed: int = 0

    def drop(self, rule: str, value: float | None = None, note: str = "") -> None:
        self.rule, self.value, self.note = rule, value, note


def schema() -> Any:
    """Return the Arrow schema of a file of decisions, before documents have numbers."""
    import pyarrow as pa

    return pa.schema(
        [
            ("input", pa.uint32()),
            ("position", pa.uint64()),
            ("size", pa.uint64()),
            ("rule", pa.string()),
            ("value", pa.float64()),
            ("note", pa.string()),
            ("language", pa.string()),
            ("score", pa.float32()),
            ("repaired", pa.bool_()),
            ("masked", pa.uint32()),
            ("lines_removed", pa.uint32()),
        ]
    )


def to_batch(decisions: Sequence[RecordDecision]) -> Any:
    import pyarrow as pa

    return pa.RecordBatch.from_pylist([vars(item) for item in decisions], schema())


def dropped_by_rule(rules: Sequence[str]) -> dict[str, int]:
    """Return how many records each rule dropped."""
    return dict(sorted((rule, count) for rule, count in Counter(rules).items() if rule))


def of_document(manifest: DatasetManifest, part: int, row: int) -> dict[str, Any] | None:
    """Return the decision about document `row` of a part, verified; None if the dataset has none."""
    import io

    import pyarrow.parquet

    name = f"{PARTS}/{manifest.parts[part].name}/{DECISIONS}"
    if name not in manifest.content["files"]:
        return None
    table = pyarrow.parquet.read_table(io.BytesIO(manifest.read_file(name)), filters=[("document", "=", row)])
    found: dict[str, Any] = table.to_pylist()[0]
    return found
