"""A training script reads verified windows: by step over its ranks, or as a torch Dataset."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from r1hpc.base.errors import UsageError
from r1hpc.data.read.mixture import Mixture
from r1hpc.data.read.open_plan import open_plan
from r1hpc.data.read.order import SamplePlan
from r1hpc.data.read.reader import open_dataset
from r1hpc.data.torch import Batches, Windows
from tests.corpus.corpus import build

SEQ_LEN, SIZE = 16, 8


class Rank:
    """What a script's `attempt()` is to the data."""

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rank, self.world_size = rank, world_size
        self.read: list[tuple[int, int, int]] = []

    def used(self, num_samples: int, sample_sum: int, checksum: int) -> None:
        self.read.append((num_samples, sample_sum, checksum))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("torch"), part_bytes=1800).path


def test_ranks_share_the_windows_of_a_step_and_say_what_they_read(path: Path) -> None:
    alone, ranks = Rank(), [Rank(rank, 2) for rank in range(2)]
    whole = Batches(alone, path, seq_len=SEQ_LEN, batch_size=SIZE)
    parts = [Batches(rank, path, seq_len=SEQ_LEN, batch_size=SIZE) for rank in ranks]
    assert whole.vocab_size > whole[1].max()
    alone.read.clear()
    for step in (1, 2, 50):
        assert whole[step].shape == (SIZE, SEQ_LEN + 1)
        rows = np.concatenate([part[step] for part in parts])
        assert sorted(map(tuple, rows)) == sorted(map(tuple, whole[step]))
    counts = [sum(rank.read[at][0] for rank in ranks) for at in range(3)]
    assert counts == [SIZE] * 3
    sums = [sum(rank.read[at][1] for rank in ranks) for at in range(3)]
    assert sums == [alone.read[2 * at][1] for at in range(3)]
    with pytest.raises(UsageError, match="batch_size=8 cannot be shared by 3 ranks"):
        Batches(Rank(0, 3), path, seq_len=SEQ_LEN, batch_size=SIZE)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_of_a_torch_dataset_has_each_window_once(path: Path, num_workers: int) -> None:
    windows = Windows(path, seq_len=SEQ_LEN, seed=3)
    assert len(windows) == (open_dataset(path).num_tokens - 1) // SEQ_LEN
    loader = torch.utils.data.DataLoader(windows, batch_size=4, num_workers=num_workers)
    rows = torch.cat([batch["input_ids"] for batch in loader])
    assert rows.shape == (len(windows), SEQ_LEN)
    dataset = open_dataset(path)
    tokens = np.concatenate(
        [dataset.read(start, SEQ_LEN) for start in range(0, SEQ_LEN * len(windows), SEQ_LEN)]
    )
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, tokens.reshape(-1, SEQ_LEN).tolist()))
    assert torch.equal(windows[5]["input_ids"], windows[5]["labels"])


def test_an_epoch_ends_and_a_batch_is_what_its_items_are(path: Path) -> None:
    windows: Any = Windows(path, seq_len=SEQ_LEN, seed=3)  # torch's stubs know no iteration
    assert sum(1 for _ in windows) == len(windows)
    batch = windows.__getitems__([5, 0, 5])
    for item, index in zip(batch, (5, 0, 5), strict=True):
        assert torch.equal(item["input_ids"], windows[index]["input_ids"])
    for outside in (-1, len(windows)):
        with pytest.raises(IndexError, match=f"window {outside} is outside 0 to"):
            windows[outside]


@pytest.mark.parametrize(("max_epochs", "expected"), [(None, 900), (1.0, 97)])
def test_an_epoch_of_a_mixture_follows_its_shares(max_epochs: float | None, expected: int) -> None:
    mixture = Mixture((7, 90), (0.9, 0.1), 1, 0, max_epochs)
    assert mixture.epoch_samples == expected
    sources, items = mixture.locate(np.arange(expected))
    assert len(np.unique(items[sources == 1])) == 90


@pytest.mark.parametrize("block", [2**18, 64])
def test_starts_that_are_kept_are_those_of_the_plan(
    path: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("r1hpc.data.torch._BLOCK", block)
    monkeypatch.setattr("r1hpc.data.torch._PIECE", 24)
    windows, dataset = Windows(path, seq_len=SEQ_LEN, seed=3), open_dataset(path)
    plan = open_plan(dataset, SEQ_LEN, 3, 1)
    assert len(windows) > 2 * 64
    in_order, shuffled = np.arange(len(windows)), np.random.default_rng(0).permutation(len(windows))
    for order in (in_order, shuffled, in_order[::-1]):
        for batch in np.array_split(order, len(order) // 9):
            starts = plan.window_starts(batch)
            items = windows.__getitems__(batch.tolist())
            for item, start in zip(items, starts.tolist(), strict=True):
                assert item["input_ids"].tolist() == dataset.read(start, SEQ_LEN).tolist()
    assert windows.__getitems__([]) == []


def test_a_shuffled_epoch_computes_its_order_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = Windows(path, seq_len=SEQ_LEN)
    computed: list[int] = []
    window_starts = SamplePlan.window_starts

    def counted(plan: SamplePlan, ids: Any) -> Any:
        computed.append(len(ids))
        return window_starts(plan, ids)

    monkeypatch.setattr(SamplePlan, "window_starts", counted)
    loader = torch.utils.data.DataLoader(windows, batch_size=4, shuffle=True)
    for _ in range(2):
        assert sum(len(batch["labels"]) for batch in loader) == len(windows)
    assert sum(computed) == len(windows)
