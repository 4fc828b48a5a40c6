"""Packed, a step has the same documents as padded, each whole and once, and hardly any padding."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1hpc.data.read.sft_documents import TraceDataset, open_traces
from r1hpc.data.read.sft_loader import Rows, TraceLoader, deal, pack, row_length
from tests.corpus.tracefiles import build_traces, expected_ids, pairs

GBS, SEQ_LEN, PAD = 24, 64, 300
TRACES = [*pairs(49), ("the longest", "of them all, " * 3)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TraceDataset:
    return open_traces(build_traces(tmp_path_factory.mktemp("traces"), TRACES).path)


def asked(**changes: Any) -> dict[str, Any]:
    chosen: dict[str, Any] = {"global_batch_size": GBS, "micro_batch_size": 2, "rank": 0, "world_size": 1}
    return chosen | {"seed": 5, "pad_id": PAD, "seq_len": SEQ_LEN} | changes


def documents_of(rows: Rows) -> list[tuple[list[int], list[bool]]]:
    """Ids and mask of what begins at each position 0, the padding at a row's end left out."""
    found = []
    for ids, mask, positions in zip(rows.tokens, rows.loss_mask, rows.positions, strict=True):
        begins = [*np.flatnonzero(positions == 0).tolist(), len(ids)]
        for begin, end in pairwise(begins):
            assert positions[begin:end].tolist() == list(range(end - begin))
            if ids[begin] != PAD:
                found.append((ids[begin:end].tolist(), mask[begin:end].tolist()))
    return found


@pytest.mark.parametrize(("world_size", "micro"), [(1, 1), (1, 24), (2, 3), (3, 4), (4, 2), (12, 2)])
def test_the_documents_of_a_step_are_those_of_the_padded_loader(
    dataset: TraceDataset, world_size: int, micro: int
) -> None:
    padded = TraceLoader(dataset, **asked())
    ranks = [
        TraceLoader(dataset, **asked(rank=rank, world_size=world_size, micro_batch_size=micro), packing=True)
        for rank in range(world_size)
    ]
    for step in (0, 1, 2, 37):
        whole, batches = padded.batch(step), [rank.batch(step) for rank in ranks]
        samples = np.concatenate([batch.sample_ids for batch in batches])
        assert sorted(samples.tolist()) == whole.sample_ids.ravel().tolist()
        by_sample = dict(zip(whole.sample_ids.flat, whole.document_ids.flat, strict=True))
        for batch in batches:
            assert batch.document_ids.tolist() == [by_sample[sample] for sample in batch.sample_ids]
            found = [document for rows in batch.micro_batches for document in documents_of(rows)]
            for (ids, mask), number in zip(found, batch.document_ids, strict=True):
                expected, num_prompt_tokens = expected_ids(TRACES[number])
                assert ids == expected
                assert mask == [at >= num_prompt_tokens for at in range(len(ids))]
        assert sum(batch.checksum for batch in batches) == whole.checksum
        assert {(b.num_loss_tokens, b.num_tokens) for b in batches} == {
            (whole.num_loss_tokens, whole.num_tokens)
        }
        assert {b.num_positions for b in batches} == {
            sum(rows.tokens.size for b in batches for rows in b.micro_batches)
        }
        shapes = [[len(rows.tokens) for rows in batch.micro_batches] for batch in batches]
        assert all(shape == shapes[0] and max(shape) <= micro for shape in shapes)


@given(
    lengths=st.lists(st.integers(2, 100), min_size=12, max_size=80),
    multiple=st.integers(1, 12),
    capacity=st.integers(100, 300),
)
def test_every_document_lies_in_one_row_that_holds_it(
    lengths: list[int], multiple: int, capacity: int
) -> None:
    array = np.array(lengths[: len(lengths) // multiple * multiple], np.int64)
    rows = pack(array, multiple, capacity)
    assert sorted(number for row in rows for number in row) == list(range(len(array)))
    fills = [int(array[row].sum()) for row in rows]
    assert fills == sorted(fills, reverse=True)
    assert fills[0] <= capacity
    assert len(rows) % multiple == 0
    assert min(map(len, rows)) >= 1


@pytest.mark.parametrize("sigma", [0.5, 0.7])
@pytest.mark.parametrize(("world_size", "micro"), [(1, 1), (2, 4), (4, 2), (8, 1)])
def test_at_least_95_of_100_positions_are_tokens(sigma: float, world_size: int, micro: int) -> None:
    """Log-normal lengths, batches of 64, rows as long as the longest document."""
    rng = np.random.default_rng(0)
    lengths = np.maximum(2, rng.lognormal(np.log(300), sigma, 20_000)).astype(np.int64)
    seq_len, tokens, positions, padded = int(lengths.max()), 0, 0, 0
    for batch in lengths[: 64 * 100].reshape(100, 64):
        rows = pack(batch, world_size, seq_len)
        for rank in range(world_size):
            for dealt in deal(rows, micro, rank, world_size):
                fullest = max(int(batch[row].sum()) for row in dealt)
                positions += len(dealt) * row_length(fullest, seq_len)
        tokens += int(batch.sum())
        padded += 64 * row_length(int(batch.max()), seq_len)
    assert tokens / padded < 0.45
    assert tokens / positions >= 0.95
