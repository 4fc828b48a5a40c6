"""The audit of a plain recipe counts empty records as such, and the dataset's id is as it ever was."""

import json
from pathlib import Path
from typing import Any

import h5py
import pyarrow
import pyarrow.parquet
import pytest

from r1hpc.corpus.build.build import build_dataset
from r1hpc.corpus.inspect.describe import audit
from r1hpc.corpus.inspect.verify import unlisted_files
from r1hpc.data.format.manifest import LEFT_OUT, read_manifest
from tests.corpus.corpus import write_recipe

ROWS: list[Any] = [None, "", "  ", [], "ok"]


def lines(folder: Path) -> dict[str, Any]:
    rows = [json.dumps({"text": row}).encode() for row in ROWS]
    (folder / "in").write_bytes(b"\n".join([*rows, b'{"text": "\xff"}']))
    return {"kind": "jsonl", "on_invalid_utf8": "skip"}


def table(folder: Path) -> dict[str, Any]:
    pyarrow.parquet.write_table(pyarrow.table({"text": [None, "", "  ", None, "ok"]}), folder / "in")
    return {"kind": "parquet"}


def hdf5(folder: Path) -> dict[str, Any]:
    with h5py.File(folder / "in", "w") as file:
        file.create_dataset("text", data=["", "", "  ", "", "ok"], dtype=h5py.string_dtype())
    return {"kind": "hdf5"}


@pytest.mark.parametrize(("write", "others"), [(lines, {"not_utf8": 1}), (table, {}), (hdf5, {})])
def test_empty_records_are_counted_apart(tmp_path: Path, write: Any, others: dict[str, int]) -> None:
    keys = {"name": "a", "root": ".", "glob": "in"} | write(tmp_path)
    path = build_dataset(write_recipe(tmp_path, sources=[keys]), tmp_path / "out").path
    found = audit(path)
    documents = {"in": 5 + len(others), "kept": 2, "dropped": {"empty": 3} | others}
    assert found["documents"] == found["sources"][0]["documents"] == documents
    manifest = read_manifest(path)
    assert unlisted_files(manifest) == []
    assert (path / LEFT_OUT).stat().st_mode & 0o444 == 0o444  # a colleague's audit reads it
    # What the manifest counts is as old as its ids: lines of null, and texts that are no UTF-8.
    skipped = 3 if write is lines else 0
    assert manifest.content["sources"][0]["num_skipped"] == skipped
    (path / LEFT_OUT).unlink()  # a dataset of before
    assert audit(path)["documents"]["dropped"] == ({"not_utf8": skipped} if skipped else {})
