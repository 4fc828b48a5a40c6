"""Store documents that a teacher wrote: the output of a unit of stage `generate`, and each document's origin.

    written(span, unit)                          # the span as the next stage reads it
    origin_of(manifest, info)                    # prompt, seed, settings, verdict and teacher of a document

    documents.jsonl     kept documents: a text a line, or a prompt and its completion
    origins.parquet     every completion, kept or left out, in the order of the prompts:

    prompt, item, sample    the prompt, its number in its file, the completion's number from 0
    position                of its line in documents.jsonl; null if left out
    rule, value             why it is left out (empty: kept), and the number that decided
    num_tokens              of the completion
    correct, reward, pass_rate      the verifier's result, if the prompts have answers

The unit's task belongs to package train, which is not imported here: a build receives it as an argument
(Teach).
"""

import io
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from r1hpc.corpus.engine.units import UnitTask
from r1hpc.corpus.engine.work_dir import unit_record
from r1hpc.corpus.recipe.recipe import Recipe
from r1hpc.corpus.sources.read import SourceSpan
from r1hpc.data.format.documents import DocumentInfo
from r1hpc.data.format.manifest import GENERATED, DatasetManifest

DOCUMENTS = "documents.jsonl"
ORIGINS = "origins.parquet"


class TeachTask(UnitTask, Protocol):
    """Writes the documents of a span."""

    @property
    def made_by(self) -> dict[str, str]:
        """Return the code and libraries that decide what is written, besides settings and teacher."""


Teach = Callable[[Recipe, SourceSpan], TeachTask]


def origin_schema() -> Any:
    """Return the Arrow schema of a file of origins."""
    import pyarrow as pa

    return pa.schema(
        [
            ("prompt", pa.large_string()),
            ("item", pa.uint64()),
            ("sample", pa.uint32()),
            ("position", pa.uint64()),
            ("rule", pa.string()),
            ("value", pa.float64()),
            ("num_tokens", pa.uint32()),
            ("correct", pa.bool_()),
            ("reward", pa.float64()),
            ("pass_rate", pa.float64()),
        ]
    )


def written(span: SourceSpan, unit: Path) -> SourceSpan:
    """Return the span once its unit is done: a file of documents like any other, with its size."""
    path = unit / DOCUMENTS
    size = path.stat().st_size
    return replace(span, written=path, start=0, stop=size, num_bytes=size)


def origin_file(source: str, name: str) -> str:
    """Return the path of a span's origins in the dataset."""
    return f"{GENERATED}/{source}/{Path(name).stem}.parquet"


def origin_of(manifest: DatasetManifest, info: DocumentInfo) -> dict[str, Any] | None:
    """Return the origin of a document that a teacher wrote; None for any other.

    Raises:
        ShardCorruptError: the file is damaged.
    """
    import pyarrow.parquet

    teacher = manifest.content.get("teachers", {}).get(info.source)
    if teacher is None:
        return None
    raw = manifest.read_file(origin_file(info.source, info.path))
    table = pyarrow.parquet.read_table(io.BytesIO(raw), filters=[("position", "=", info.position)])
    row: dict[str, Any] = table.to_pylist()[0]
    (source,) = (each for each in manifest.content["recipe"]["sources"] if each["name"] == info.source)
    asked = {name: row[name] for name in ("prompt", "item", "sample", "num_tokens")}
    judged = {name: row[name] for name in ("correct", "reward", "pass_rate")}
    return {"teacher": teacher} | asked | judged | {"settings": source["generate"]}


def left_out(generated: Mapping[tuple[int, str], Path]) -> dict[int, dict[str, int]]:
    """Count the completions that stage generate left out, by source and rule.

    Args:
        generated: units by source number and file; a unit of an earlier recipe does not know its number.
    """
    found: dict[int, dict[str, int]] = {}
    for (source, _), path in generated.items():
        mine = found.setdefault(source, {})
        for rule, count in unit_record(path)["dropped"].items():
            mine[rule] = mine.get(rule, 0) + count
    return found
