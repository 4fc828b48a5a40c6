"""Shares are exact in every block, and each source is visited document by document, epoch by epoch."""

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1hpc.base.errors import UsageError
from r1hpc.data.build import build_dataset
from r1hpc.data.mixture import BLOCK, MixturePlan, divide
from r1hpc.data.trace_loader import TraceLoader
from r1hpc.data.traces import open_traces
from tests.data.corpus import write_recipe
from tests.data.tracefiles import pairs, trace_source, write_traces

SOURCES, WEIGHTS = (70, 10_000, 300), (0.3, 0.4, 0.3)


def plan(**changes: Any) -> MixturePlan:
    chosen: dict[str, Any] = {"dataset_id": "x", "source_documents": SOURCES, "weights": WEIGHTS, "seed": 3}
    return MixturePlan(**(chosen | changes))


def sources_of(documents: npt.NDArray[np.int64]) -> list[int]:
    return [int(source) for source in np.searchsorted(np.cumsum(SOURCES), documents, side="right")]


@pytest.mark.parametrize("block", [0, 1, 10**12])
def test_every_block_holds_each_source_exactly_so_often(block: int) -> None:
    found = sources_of(plan().documents(np.arange(block * BLOCK, (block + 1) * BLOCK)))
    assert Counter(found) == {0: 300, 1: 400, 2: 300}
    runs = 1 + sum(a != b for a, b in pairwise(found))
    assert runs > BLOCK // 2, "sources lie mixed, not one after the other"


def test_each_source_visits_every_document_equally_often() -> None:
    """In 7 blocks source 0 has 2,100 samples: 30 epochs of 70; source 2 has 7 epochs of 300."""
    documents = plan().documents(np.arange(7 * BLOCK))
    counts = Counter(documents.tolist())
    assert {counts[n] for n in range(70)} == {30}
    assert {counts[n] for n in range(10_070, 10_370)} == {7}
    assert max(counts[n] for n in range(70, 10_070)) == 1
    assert sum(counts.values()) == 7 * BLOCK


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 10**15), min_size=1, max_size=30), st.integers(0, 2**63 - 1))
def test_a_sample_does_not_depend_on_its_batch(ids: list[int], seed: int) -> None:
    mixed = plan(seed=seed)
    together = mixed.documents(np.array(ids)).tolist()
    assert together == [int(mixed.documents(np.array([sample]))[0]) for sample in ids]
    assert all(0 <= document < sum(SOURCES) for document in together)


@settings(deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=9), st.integers(1, 2000))
def test_divide(weights: list[float], total: int) -> None:
    shares = divide(total, weights)
    assert sum(shares) == total
    exact = [total * weight / sum(weights) for weight in weights]
    assert all(abs(share - wanted) < 1 for share, wanted in zip(shares, exact, strict=True))


def test_hash_names_weights_and_seed() -> None:
    plans = [plan(), plan(seed=4), plan(weights=(0.3, 0.3, 0.4)), plan(weights=(3.0, 4.0, 3.0))]
    assert len({item.plan_hash for item in plans}) == 3  # 3:4:3 are the same shares


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": (1.0, 1.0)}, "2 weights for 3 sources"),
        ({"weights": (1.0, 1.0, -1.0)}, "must be positive"),
        ({"weights": (1.0, 1.0, float("nan"))}, "must be positive"),
        ({"weights": (1.0, 1.0, 1e-4)}, "source 2 of the traces has less than 1 of 1,000"),
        ({"source_documents": (5, 0, 5)}, "source 1 of the traces has no documents"),
        ({"seed": -1}, "seed"),
    ],
)
def test_impossible_mixtures(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan(**changes)


def test_loader_mixes_sources_the_same_on_any_number_of_ranks(tmp_path: Path) -> None:
    for n, count in enumerate((5, 40)):
        write_traces(tmp_path / f"{n}.jsonl", pairs(count, 100 * n))
    sources = [trace_source(name=f"s{n}", glob=f"{n}.jsonl") for n in range(2)]
    dataset = open_traces(build_dataset(write_recipe(tmp_path, sources=sources), tmp_path / "out").path)
    assert dataset.source_documents == (5, 40)

    def loader(rank: int, world_size: int) -> TraceLoader:
        return TraceLoader(
            dataset, global_batch_size=BLOCK, micro_batch_size=250, rank=rank, world_size=world_size,
            seed=0, pad_id=0, seq_len=64, weights=(3, 1),
        )  # fmt: skip

    whole = loader(0, 1).batch(2)
    assert int((whole.document_ids < 5).sum()) == 750
    assert sum(loader(rank, 4).batch(2).checksum for rank in range(4)) == whole.checksum
