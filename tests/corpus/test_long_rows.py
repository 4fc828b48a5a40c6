"""Rows of tables are read a few at a time where they are long: memory does not grow with them."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from r1hpc.corpus.recipe import parse_recipe
from r1hpc.corpus.sources.read import list_spans, read_span

ROWS, LENGTH = 800, 100_000


def row(number: int) -> str:
    return f"{number:010d}" * (LENGTH // 10)


def table() -> Any:
    return pyarrow.table({"text": [row(number) for number in range(ROWS)]})


def write_parquet(path: Path) -> None:
    pyarrow.parquet.write_table(table(), path)


def write_arrow(path: Path) -> None:
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table().schema) as out:
        out.write_table(table())


def write_strings(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("text", data=[row(number) for number in range(ROWS)], dtype=h5py.string_dtype())


def write_ids(path: Path) -> None:
    """Of two bytes each, packed in chunks of three rows."""
    ids = np.arange(ROWS, dtype="u2")[:, None].repeat(LENGTH // 2, axis=1)
    with h5py.File(path, "w") as file:
        file.create_dataset("text", data=ids, compression="lzf", chunks=(3, LENGTH // 2))


@pytest.mark.parametrize(
    ("kind", "write"),
    [("parquet", write_parquet), ("arrow", write_arrow), ("hdf5", write_strings), ("hdf5", write_ids)],
)
def test_memory_does_not_grow_with_the_rows(tmp_path: Path, kind: str, write: Callable[[Path], None]) -> None:
    write(tmp_path / "in")
    source = {"name": "a", "kind": kind, "root": ".", "glob": "in"}
    ids = {"kind": "ids", "vocab_size": ROWS, "eos_id": 0}
    recipe = parse_recipe({"name": "a", "tokenizer": ids, "sources": [source]}, tmp_path)
    tracemalloc.start()
    positions, firsts = [], []
    for span in list_spans(recipe):
        for document in read_span(recipe, span):
            first = np.frombuffer(document.raw, "<u4")[0] if document.is_ids else int(document.raw[:10])
            positions.append(document.position)
            firsts.append(int(first))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert positions == firsts == list(range(ROWS))
    assert peak < ROWS * LENGTH / 2
