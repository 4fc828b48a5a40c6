"""Every trace once per epoch, the same global batches on any number of ranks, and only completions learnt."""

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1hpc.base.errors import UsageError
from r1hpc.data.format.errors import ShardCorruptError
from r1hpc.data.read import sft_documents as traces_module
from r1hpc.data.read.order import DocumentPlan
from r1hpc.data.read.sft_documents import TraceDataset, open_traces
from r1hpc.data.read.sft_loader import TraceBatch, TraceLoader
from tests.corpus.tracefiles import build_traces, expected_ids, pairs, write_traces

GBS, SEQ_LEN, PAD = 24, 64, 300
TRACES = [*pairs(49), ("the longest", "of them all, " * 3)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TraceDataset:
    """Two parts."""
    folder = tmp_path_factory.mktemp("traces")
    write_traces(folder / "b.jsonl", TRACES[30:])
    return open_traces(build_traces(folder, TRACES[:30], part_bytes=1).path)


def loader(dataset: TraceDataset, **changes: Any) -> TraceLoader:
    chosen: dict[str, Any] = {"global_batch_size": GBS, "micro_batch_size": 2, "rank": 0, "world_size": 1}
    return TraceLoader(dataset, **(chosen | {"seed": 5, "pad_id": PAD, "seq_len": SEQ_LEN} | changes))


def column(batch: TraceBatch, name: str) -> Any:
    """Ids of samples or documents by micro batch and row; tokens and masks by position too."""
    if name.endswith("_ids"):
        return getattr(batch, name).reshape(len(batch.micro_batches), -1)
    return np.stack([getattr(rows, name) for rows in batch.micro_batches])


def test_rows_are_documents_and_the_mask_their_completions(dataset: TraceDataset) -> None:
    batch = loader(dataset, rank=1, world_size=3, micro_batch_size=4).batch(7)
    tokens, loss_mask = column(batch, "tokens"), column(batch, "loss_mask")
    samples, documents = column(batch, "sample_ids"), column(batch, "document_ids")
    assert tokens.shape == loss_mask.shape == (2, 4, batch.attended)
    assert batch.num_positions == GBS * batch.attended
    assert tokens.dtype == np.int64
    assert loss_mask.dtype == np.bool_
    checksum = 0
    for a in range(2):
        for j in range(4):
            sample = 7 * GBS + a * 4 * 3 + 1 * 4 + j
            ids, num_prompt_tokens = expected_ids(TRACES[documents[a, j]])
            padding = batch.attended - len(ids)
            assert samples[a, j] == sample
            assert tokens[a, j].tolist() == ids + [PAD] * padding
            mask = [False] * num_prompt_tokens + [True] * (len(ids) - num_prompt_tokens)
            assert loss_mask[a, j].tolist() == mask + [False] * padding
            checksum += google_crc32c.value(np.int64(sample).tobytes() + np.array(ids, "<u4").tobytes())
    assert batch.checksum == checksum


@pytest.mark.parametrize(("world_size", "micro"), [(1, 1), (1, 24), (2, 3), (3, 4), (4, 2), (4, 6), (12, 2)])
def test_global_batches_do_not_depend_on_the_world(
    dataset: TraceDataset, world_size: int, micro: int
) -> None:
    alone = loader(dataset, prefetch=False)
    ranks = [
        loader(dataset, rank=rank, world_size=world_size, micro_batch_size=micro)
        for rank in range(world_size)
    ]
    assert {rank.order_id(rank.plan) for rank in ranks} == {alone.order_id(alone.plan)}
    for step in (0, 1, 2, 37, 10**9):
        whole, batches = alone.batch(step), [rank.batch(step) for rank in ranks]
        for name in ("sample_ids", "document_ids", "tokens", "loss_mask"):
            joined = np.stack([column(batch, name) for batch in batches], axis=1)  # accumulation, rank, micro
            expected = column(whole, name)
            assert np.array_equal(joined.reshape(GBS, -1), expected.reshape(GBS, -1)), name
        assert sum(batch.checksum for batch in batches) == whole.checksum
        assert {batch.num_loss_tokens for batch in batches} == {int(column(whole, "loss_mask").sum())}


@settings(max_examples=60)
@given(
    num_documents=st.integers(1, 300),
    gbs=st.integers(1, 40),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 10**9),
)
def test_every_document_once_per_epoch(num_documents: int, gbs: int, seed: int, epoch: int) -> None:
    """Whatever the batch: the steps that touch an epoch hold each of its documents exactly once."""
    plan = DocumentPlan("0" * 64, num_documents, seed)
    first, stop = epoch * num_documents, (epoch + 1) * num_documents
    seen: list[int] = []
    for step in range(first // gbs, -(-stop // gbs)):
        samples = np.arange(step * gbs, (step + 1) * gbs)
        inside = (samples >= first) & (samples < stop)
        seen += plan.documents(samples)[inside].tolist()
    assert sorted(seen) == list(range(num_documents))


def test_epochs_of_the_loader(dataset: TraceDataset) -> None:
    reading = loader(dataset, global_batch_size=10, micro_batch_size=5)
    seen = [document for step in range(15) for document in reading.batch(step).document_ids.ravel().tolist()]
    assert [sorted(seen[n : n + 50]) for n in (0, 50, 100)] == [list(range(50))] * 3
    assert len({tuple(seen[n : n + 50]) for n in (0, 50, 100)}) == 3
    assert Counter(seen) == dict.fromkeys(range(50), 3)


def test_a_run_longer_than_the_mixture_is_refused_before_it_begins(tmp_path: Path) -> None:
    mixed = open_traces(build_traces(tmp_path, TRACES, mix={"max_epochs": 2}).path)
    assert loader(mixed, num_samples=2 * len(TRACES) // GBS * GBS).batch(0).num_tokens
    with pytest.raises(UsageError, match=r"the mixture ends after .* train less"):
        loader(mixed, num_samples=2 * len(TRACES) + GBS)


def test_any_order_of_steps_with_and_without_prefetch(dataset: TraceDataset) -> None:
    ahead, direct = loader(dataset), loader(dataset, prefetch=False)
    for step in [0, 1, 2, 2, 9, 10, 0, 1]:
        one, other = ahead.batch(step), direct.batch(step)
        assert (one.checksum, one.num_loss_tokens) == (other.checksum, other.num_loss_tokens)


def test_the_order_id_names_dataset_and_seed(dataset: TraceDataset, tmp_path: Path) -> None:
    other = open_traces(build_traces(tmp_path, TRACES).path)
    hashes = [loader(dataset), loader(dataset, seed=6), loader(other), loader(dataset, seq_len=99)]
    # seq_len is no part of it: it only refuses.
    assert len({item.order_id(item.plan) for item in hashes}) == 3


def test_length_is_that_of_the_global_batch(dataset: TraceDataset) -> None:
    for step in range(20):
        ranks = [loader(dataset, rank=rank, world_size=4, prefetch=False) for rank in range(4)]
        batches = [rank.batch(step) for rank in ranks]
        documents = np.concatenate([batch.document_ids.ravel() for batch in batches])
        longest = max(len(expected_ids(TRACES[n])[0]) for n in documents.tolist())
        assert {column(batch, "tokens").shape[-1] for batch in batches} == {
            min(-(-longest // 8) * 8, SEQ_LEN)
        }


def test_longest_document_fits_exactly_or_is_refused(dataset: TraceDataset) -> None:
    longest = max(range(50), key=lambda n: len(expected_ids(TRACES[n])[0]))
    num_tokens = len(expected_ids(TRACES[longest])[0])
    assert num_tokens % 8, "else the cap at seq_len shows nothing"
    batch = loader(dataset, seq_len=num_tokens, global_batch_size=50, micro_batch_size=50).batch(0)
    assert column(batch, "tokens").shape[-1] == num_tokens
    message = (
        rf"data\.seq_len is {num_tokens - 1}, but 1 of 50 traces .* document {longest}, has {num_tokens} "
    )
    with pytest.raises(UsageError, match=message):
        loader(dataset, seq_len=num_tokens - 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"micro_batch_size": 5}, "not a multiple"),
        ({"world_size": 5}, "not a multiple"),
        ({"rank": 1}, "outside a world"),
        ({"pad_id": -1}, "pad_id must be a token id"),
        ({"seed": -1}, r"data\.seed must lie"),
    ],
)
def test_impossible_batches_are_refused(dataset: TraceDataset, changes: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        loader(dataset, **changes)


@pytest.mark.parametrize("kept_bytes", [0, 10**6])
def test_damage_is_raised_and_never_trained_on(
    dataset: TraceDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept_bytes: int
) -> None:
    monkeypatch.setattr(traces_module, "KEPT_BYTES", kept_bytes)
    broken = open_traces(Path(shutil.copytree(dataset.path, tmp_path / "copy")))
    shard = broken.path / "parts/part-00000/tokens/c/0"
    raw = bytearray(shard.read_bytes())
    raw[0] ^= 1
    shard.write_bytes(raw)
    reading = loader(broken, global_batch_size=50, micro_batch_size=1)
    for step in (0, 1, 1):
        with pytest.raises(ShardCorruptError, match=str(shard)):
            reading.batch(step)


@pytest.mark.parametrize("verify", ["once", "every"])
def test_tokens_from_memory_are_those_from_disk(
    dataset: TraceDataset, monkeypatch: pytest.MonkeyPatch, verify: str
) -> None:
    monkeypatch.setattr(traces_module, "KEPT_BYTES", 0)
    other = open_traces(dataset.path, verify=verify)
    assert loader(other).batch(3).checksum == loader(dataset).batch(3).checksum


def test_loading_needs_neither_torch_nor_zarr(dataset: TraceDataset) -> None:
    code = (
        "import sys; from r1hpc.data.read.sft_documents import open_traces;"
        "from r1hpc.data.read.sft_loader import TraceBatch, TraceLoader;"
        f"TraceLoader(open_traces({str(dataset.path)!r}), global_batch_size=2, micro_batch_size=2, rank=0,"
        "world_size=1, seed=0, pad_id=0, seq_len=64).batch(0);"
        "print([m for m in ('zarr', 'torch', 'tokenizers', 'yaml') if m in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.stdout.strip() == "[]", done.stderr
