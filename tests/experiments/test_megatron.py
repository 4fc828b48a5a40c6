"""Megatron's indexed datasets as Parquet, and a dataset made of that."""

from pathlib import Path

import pyarrow.parquet
import pytest

from experiments.megatron import convert, count_documents, main
from r1hpc.base.errors import UsageError
from r1hpc.corpus.build.build import build_dataset
from r1hpc.data.read.reader import open_dataset
from tests.corpus.corpus import write_recipe
from tests.experiments.megatron_files import write_megatron

pytestmark = pytest.mark.slow
DOCUMENTS = [[5, 6, 7], [], [8], [65_535, 9]]


def test_a_dataset_has_the_ids_of_the_files(tmp_path: Path) -> None:
    write_megatron(tmp_path / "a", DOCUMENTS)
    assert (tmp_path / "a.idx").read_bytes()[:9] == b"MMIDIDX\x00\x00"
    assert main([str(tmp_path / "a.idx"), "--out", str(tmp_path / "in")]) == 0
    source = {"name": "m", "kind": "parquet", "root": "in", "glob": "*.parquet", "field": "input_ids"}
    ids = {"kind": "ids", "vocab_size": 65_536, "eos_id": 0}
    built = build_dataset(write_recipe(tmp_path, sources=[source], tokenizer=ids), tmp_path / "out")
    dataset = open_dataset(built.path)
    assert dataset.read(0, dataset.num_tokens).tolist() == [5, 6, 7, 0, 8, 0, 65_535, 9, 0]


@pytest.mark.parametrize("documents", [[], [[]], [[], []]])
def test_files_of_no_ids_become_empty_rows(tmp_path: Path, documents: list[list[int]]) -> None:
    write_megatron(tmp_path / "a", documents)
    rows = pyarrow.parquet.read_table(convert(tmp_path / "a.idx", tmp_path))["input_ids"].to_pylist()
    assert rows == documents


@pytest.mark.parametrize("damage", ["magic", "short", "bin"])
def test_damaged_files_are_named(tmp_path: Path, damage: str) -> None:
    write_megatron(tmp_path / "d", DOCUMENTS)
    raw = (tmp_path / "d.idx").read_bytes()
    if damage == "bin":
        (tmp_path / "d.bin").write_bytes(b"")
    else:
        (tmp_path / "d.idx").write_bytes(b"x" + raw[1:] if damage == "magic" else raw[:60])
    with pytest.raises(UsageError, match=r"d\.(idx|bin)"):
        convert(tmp_path / "d.idx", tmp_path)


def test_a_large_file_that_is_no_index_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "in.bin").open("wb") as file:
        file.truncate(2**36)  # a hole: to read it all would take the memory
    with pytest.raises(UsageError, match=r"is not a Megatron index; give the \.idx"):
        count_documents(tmp_path / "in.bin")


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    names = [str(tmp_path / folder / "a.idx") for folder in "bc"]
    with pytest.raises(UsageError, match="two files have the same name"):
        main([*names, "--out", str(tmp_path / "out")])
