"""A dataset is opened by one rank for all: same tokens, same refusal; each node is asked for its files."""

from pathlib import Path

import numpy as np
import pytest

from r1hpc.data.format.errors import DatasetMissingError, ShardMissingError
from r1hpc.data.read.reader import TokenDataset, open_dataset
from r1hpc.train.parallel.distributed import Group
from r1hpc.train.supervised.supervised import open_once
from tests.corpus.corpus import build
from tests.train.two_ranks import run_on_two_ranks


def open_once_on(group: Group, folder: Path) -> None:
    dataset = open_once(group, lambda: opened_by(group, folder / "dataset"))
    windows = [dataset.read(start, 50) for start in range(0, dataset.num_tokens - 50, 50)]
    assert np.array_equal(np.concatenate(windows), np.concatenate(group.gather(windows)[0]))


def opened_by(group: Group, path: Path) -> TokenDataset:
    assert group.rank == 0, "another rank asked the file system"
    return open_dataset(path)


def refuse_on_both(group: Group, folder: Path) -> None:
    with pytest.raises(DatasetMissingError, match=r"r1hpc\.shard build"):
        open_once(group, lambda: open_dataset(folder / "nothing"))


def miss_a_file_on_another_node(group: Group, folder: Path) -> None:
    group = Group(group.rank, 0, group.world_size, group.device)  # each rank the first of its node
    if group.rank == 0:
        open_once(group, lambda: open_and_hide(folder / "dataset"))
    else:
        with pytest.raises(ShardMissingError, match="c/0 is missing"):
            open_once(group, lambda: open_dataset(folder / "dataset"))


def open_and_hide(path: Path) -> TokenDataset:
    """What rank 0 saw, and rank 1 on a node without one file does not."""
    dataset = open_dataset(path)
    next(path.glob("parts/*/tokens/c/0")).unlink()
    return dataset


def test_one_rank_opens_for_all(tmp_path: Path) -> None:
    build(tmp_path)
    run_on_two_ranks(open_once_on, tmp_path)


def test_both_ranks_refuse_alike(tmp_path: Path) -> None:
    run_on_two_ranks(refuse_on_both, tmp_path)


def test_a_node_that_does_not_see_a_file_names_it(tmp_path: Path) -> None:
    build(tmp_path)
    run_on_two_ranks(miss_a_file_on_another_node, tmp_path)
