"""Run stage `dedup`: keep the first of equal or nearly equal documents, over all parts and sources.

    record = DedupTask(recipe, cleaned).write(folder)       # `cleaned`: the folders of stage clean, in order

    folder/<part>.parquet       row, rule, value, note of each dropped document of that part

Exact: equal xxh3-128 of the cleaned text. Near: MinHash (see minhash.py); signatures lie band by band in an
unlinked temporary file. Memory: some 250 bytes per document (measured on 3.2 million).
"""

import itertools
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from r1hpc.corpus.clean import decisions
from r1hpc.corpus.clean.clean import DOCUMENTS
from r1hpc.corpus.clean.minhash import near_duplicates
from r1hpc.corpus.engine.work_dir import unit_record
from r1hpc.corpus.recipe import Recipe


@dataclass(frozen=True)
class _Drop:
    """A document dropped in favour of another, both by their number over all parts."""

    document: int
    other: int
    rule: str
    value: float


@dataclass(frozen=True)
class DedupTask:
    """Handles all parts at once, as the stage's only unit."""

    recipe: Recipe
    cleaned: Sequence[Path]

    def write(self, folder: Path) -> dict[str, Any]:
        with _Table(self.recipe, self.cleaned, folder) as table:
            drops = self._find(table)
        dropped: list[dict[str, int]] = [{} for _ in self.cleaned]
        for part, in_part in itertools.groupby(drops, lambda drop: table.part(drop.document)):  # sorted
            chosen = list(in_part)
            table.write(folder, part, chosen)
            dropped[part] = decisions.dropped_by_rule([drop.rule for drop in chosen])
        return {"dropped": dropped}

    def _find(self, table: "_Table") -> list[_Drop]:
        block = self.recipe.dedup
        assert block is not None, "the stage is only planned for recipes with dedup"
        exact = _exact(table.hashes) if block.exact else np.arange(len(table.hashes))
        found = {
            i: _Drop(i, int(first), decisions.EXACT, 1.0)
            for i, first in enumerate(exact.tolist())
            if first != i
        }
        if block.minhash is not None:
            # Among the remaining documents, so that a copy is an exact duplicate and nothing else.
            left = np.flatnonzero(exact == np.arange(len(exact)))
            groups = near_duplicates(lambda band: table.band(band)[left], len(left), block.minhash)
            for place in np.flatnonzero(groups.original != np.arange(len(left))).tolist():
                document, other = int(left[place]), int(left[groups.nearest[place]])
                found[document] = _Drop(document, other, decisions.NEAR, float(groups.similarity[place]))
        return [found[document] for document in sorted(found)]


class _Table:
    """The hashes and places of all documents; their signatures while it is open."""

    def __init__(self, recipe: Recipe, cleaned: Sequence[Path], folder: Path) -> None:
        """`folder` is on a file system with room for the signatures."""
        import pyarrow.parquet

        self._recipe = recipe
        self._records = [unit_record(path) for path in cleaned]
        self._minhash = recipe.dedup.minhash if recipe.dedup is not None else None
        counts = [pyarrow.parquet.read_metadata(path / DOCUMENTS).num_rows for path in cleaned]
        self._first = np.concatenate([[0], np.cumsum(counts)])
        self._places: list[tuple[npt.NDArray[Any], npt.NDArray[Any]]] = []
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by __exit__
        firsts = self._first[:-1].tolist()
        hashes = [self._read(path / DOCUMENTS, first) for path, first in zip(cleaned, firsts, strict=True)]
        self.hashes = np.concatenate([np.empty((0, 2), np.uint64), *hashes])

    def __enter__(self) -> "_Table":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _read(self, path: Path, first: int) -> npt.NDArray[np.uint64]:
        """Return a part's hashes, the first of document `first`; write its signatures to the file."""
        import pyarrow.parquet

        names = ["input", "position", "text_hash", *(["signature"] if self._minhash else [])]
        # Not with an open ParquetFile per part: each caches what was read, in total all the signatures.
        table = pyarrow.parquet.read_table(path, columns=names)
        self._places.append((table["input"].to_numpy(), table["position"].to_numpy()))
        if self._minhash is not None:
            bands, rows = self._minhash.bands, self._minhash.rows
            signatures = _fixed(table["signature"], bands * rows * 4, "<u4")
            for band in range(bands):
                self._file.seek((band * int(self._first[-1]) + first) * rows * 4)
                self._file.write(signatures[:, band * rows : (band + 1) * rows].tobytes())
        return _fixed(table["text_hash"], 16, "<u8")

    def band(self, number: int) -> npt.NDArray[np.uint32]:
        """Return one band of the signatures of all documents, (documents, rows)."""
        assert self._minhash is not None, "asked for where there are signatures"
        values = int(self._first[-1]) * self._minhash.rows
        self._file.seek(number * values * 4)
        return np.frombuffer(self._file.read(values * 4), "<u4").reshape(-1, self._minhash.rows)

    def part(self, document: int) -> int:
        return int(np.searchsorted(self._first, document, side="right")) - 1

    def name(self, document: int) -> str:
        """Return where a document came from, for people and for a trace."""
        part = self.part(document)
        inputs, positions = self._places[part]
        row = document - int(self._first[part])
        record = self._records[part]
        source = self._recipe.sources[record["source"]].name
        return json.dumps([source, record["inputs"][inputs[row]], int(positions[row])], ensure_ascii=False)

    def write(self, folder: Path, part: int, drops: Sequence[_Drop]) -> None:
        import pyarrow as pa
        import pyarrow.parquet

        columns = {
            "row": pa.array([drop.document - int(self._first[part]) for drop in drops], pa.uint32()),
            "rule": pa.array([drop.rule for drop in drops], pa.string()),
            "value": pa.array([drop.value for drop in drops], pa.float64()),
            "note": pa.array([f"of {self.name(drop.other)}" for drop in drops], pa.string()),
        }
        pyarrow.parquet.write_table(pa.table(columns), folder / f"{part}.parquet")


def _fixed(column: Any, width: int, dtype: str) -> npt.NDArray[Any]:
    """Return a column of binary values of one width as an array of a row each."""
    values = column.combine_chunks()
    raw = np.frombuffer(values.buffers()[1] or b"", np.uint8)
    raw = raw[values.offset * width :][: len(values) * width]
    return raw.view(dtype).reshape(-1, width // np.dtype(dtype).itemsize)


def _exact(hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Return for each document the first with the same hash."""
    _, first, group = np.unique(hashes.view("V16").ravel(), return_index=True, return_inverse=True)
    return first[group]
