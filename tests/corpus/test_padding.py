"""Rows of ids that are filled up to one length: what fills them is no document."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from r1hpc.corpus.build.build import build_dataset, build_share
from r1hpc.corpus.build.stages import Share
from r1hpc.data.read.reader import open_dataset
from tests.corpus.corpus import write_recipe


@pytest.mark.parametrize(
    ("pad_id", "expected"), [(3, [5, 3, 6, 0, 8, 0]), (0, [5, 3, 6, 3, 3, 0, 8, 0, 3, 3, 3, 0])]
)
def test_padding_at_the_end_of_rows_is_no_document(tmp_path: Path, pad_id: int, expected: list[int]) -> None:
    with h5py.File(tmp_path / "in.h5", "w") as file:
        file["ids"] = np.array([[5, 3, 6, 3, 3], [8, 0, 3, 3, 3], [pad_id] * 5])
    tokenizer = {"kind": "ids", "vocab_size": 9, "eos_id": 0, "pad_id": pad_id}
    source = {"name": "a", "root": ".", "kind": "hdf5", "glob": "*.h5", "field": "ids"}
    recipe = write_recipe(tmp_path, sources=[source], tokenizer=tokenizer)
    dataset = open_dataset(build_dataset(recipe, tmp_path / "out").path)
    assert dataset.read(0, dataset.num_tokens).tolist() == expected


def test_a_build_that_goes_on_with_other_padding_makes_its_rows_anew(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "ids.h5", "w") as file:
        file["ids"] = np.array([[5, 3, 6, 3, 3], [8, 0, 3, 3, 3]])
    plain = {"kind": "ids", "vocab_size": 9, "eos_id": 0}
    source = {"name": "a", "root": ".", "kind": "hdf5", "glob": "*.h5", "field": "ids"}
    out = tmp_path / "out"
    build_share(write_recipe(tmp_path, tokenizer=plain, sources=[source]), out, Share("tokens", 0, 1))
    recipe = write_recipe(tmp_path, tokenizer={**plain, "pad_id": 3}, sources=[source])
    build_dataset(recipe, out)
    assert open_dataset(out).read(0, 6).tolist() == [5, 3, 6, 0, 8, 0]
