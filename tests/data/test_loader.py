"""Global batches are the same on any number of ranks, and an error comes at the step it belongs to."""

import multiprocessing
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest

from r1hpc.base.errors import UsageError
from r1hpc.data.format.errors import ShardCorruptError
from r1hpc.data.read.loader import BatchLoader, window_checksum
from r1hpc.data.read.order import SamplePlan
from r1hpc.data.read.reader import TokenDataset, open_dataset
from tests.corpus.corpus import build

SEQ_LEN, GBS = 16, 24
CHUNK = 64  # tokens, see corpus.write_recipe


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    return open_dataset(build(tmp_path_factory.mktemp("loader"), part_bytes=1800).path)


@pytest.fixture(scope="module")
def plan(dataset: TokenDataset) -> SamplePlan:
    return SamplePlan(dataset.id, dataset.num_tokens, SEQ_LEN, seed=5)


def loader(dataset: TokenDataset, plan: SamplePlan, **changes: Any) -> BatchLoader:
    sizes: dict[str, Any] = {"global_batch_size": GBS, "micro_batch_size": 2, "rank": 0, "world_size": 1}
    return BatchLoader(dataset, plan, **(sizes | changes))


@pytest.mark.parametrize(("world_size", "micro"), [(1, 1), (1, 24), (2, 3), (3, 4), (4, 2), (6, 4), (12, 2)])
def test_global_batches_do_not_depend_on_the_world(
    dataset: TokenDataset, plan: SamplePlan, world_size: int, micro: int
) -> None:
    alone = loader(dataset, plan, prefetch=False)
    ranks = [
        loader(dataset, plan, rank=rank, world_size=world_size, micro_batch_size=micro)
        for rank in range(world_size)
    ]
    for step in (0, 1, 2, 37, 10**9):
        whole, batches = alone.batch(step), [rank.batch(step) for rank in ranks]
        ids = np.stack([batch.sample_ids for batch in batches], axis=1)  # accumulation, rank, micro
        assert ids.ravel().tolist() == list(range(step * GBS, (step + 1) * GBS))
        tokens = np.stack([batch.tokens for batch in batches], axis=1).reshape(GBS, SEQ_LEN + 1)
        assert np.array_equal(tokens, whole.tokens.reshape(GBS, SEQ_LEN + 1))
        assert sum(batch.checksum for batch in batches) == whole.checksum


def test_shapes_and_formula(dataset: TokenDataset, plan: SamplePlan) -> None:
    rank = loader(dataset, plan, rank=2, world_size=3, micro_batch_size=4)
    batch = rank.batch(7)
    assert batch.tokens.shape == (2, 4, SEQ_LEN + 1)
    assert batch.tokens.dtype == np.int64
    for a in range(2):
        for j in range(4):
            sample = 7 * GBS + a * 4 * 3 + 2 * 4 + j
            assert batch.sample_ids[a, j] == sample
            start = int(plan.window_starts(np.array([sample]))[0])
            assert np.array_equal(batch.tokens[a, j], dataset.read(start, SEQ_LEN + 1))


def test_an_epoch_reads_every_window_once(dataset: TokenDataset, plan: SamplePlan) -> None:
    size = plan.num_windows
    one = loader(dataset, plan, global_batch_size=size, micro_batch_size=1)
    for epoch in range(3):
        windows = {tuple(row) for row in one.batch(epoch).tokens.reshape(size, -1).tolist()}
        expected = (dataset.read(i * SEQ_LEN, SEQ_LEN + 1).tolist() for i in range(size))
        assert windows == {tuple(row) for row in expected}


def test_checksum_is_of_id_and_tokens(dataset: TokenDataset, plan: SamplePlan) -> None:
    batch = loader(dataset, plan, global_batch_size=1, micro_batch_size=1).batch(3)
    raw = np.int64(3).tobytes() + batch.tokens[0, 0].astype(np.uint32).tobytes()
    assert batch.checksum == google_crc32c.value(raw)
    assert window_checksum(3, batch.tokens[0, 0]) != window_checksum(4, batch.tokens[0, 0])


def test_prefetch_changes_nothing(dataset: TokenDataset, plan: SamplePlan) -> None:
    ahead, direct = loader(dataset, plan), loader(dataset, plan, prefetch=False)
    for step in [0, 1, 2, 2, 9, 10, 0, 1]:  # forwards, again, and jumping as a resume does
        assert ahead.batch(step).checksum == direct.batch(step).checksum


def test_error_is_raised_at_its_own_step(dataset: TokenDataset, plan: SamplePlan, tmp_path: Path) -> None:
    one = loader(dataset, plan, global_batch_size=2, micro_batch_size=2)
    first, second = (plan.window_starts(one.share.sample_ids(step)).ravel().tolist() for step in (0, 1))
    broken = open_dataset(Path(shutil.copytree(dataset.path, tmp_path / "copy")))
    shard = next(s for s in reversed(broken._shards) if s.first <= second[0])
    chunk = (second[0] - shard.first) // CHUNK
    begin = shard.first + chunk * CHUNK
    assert not any(begin - SEQ_LEN <= start < begin + CHUNK for start in first), "step 0 reads other chunks"
    raw = bytearray(shard.path.read_bytes())
    raw[chunk * (CHUNK * 2 + 4)] ^= 1
    shard.path.write_bytes(raw)
    reading = loader(broken, plan, global_batch_size=2, micro_batch_size=2)
    reading.batch(0)
    for _ in range(2):  # from the thread, then asked again
        with pytest.raises(ShardCorruptError, match=str(shard.path)):
            reading.batch(1)
    assert reading.batch(0).checksum == one.batch(0).checksum


class _Recording(TokenDataset):
    """Notes which signals its reading thread does not take."""

    seen: set[int] | None = None

    def read(self, start: int, length: int) -> Any:
        if threading.current_thread() is not threading.main_thread():
            self.seen = set(signal.pthread_sigmask(signal.SIG_BLOCK, []))
        return super().read(start, length)


def test_reading_thread_takes_no_signals(dataset: TokenDataset, plan: SamplePlan) -> None:
    recording = _Recording(dataset.manifest, dataset.arrays)
    reading = loader(recording, plan)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    reading.batch(0)
    reading.batch(1)
    assert recording.seen is not None
    assert {signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT} <= recording.seen
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def _batch_in_child(reading: BatchLoader, results: Any) -> None:
    results.put(reading.batch(1).checksum)


def test_fork_does_not_wait_for_the_parents_thread(dataset: TokenDataset, plan: SamplePlan) -> None:
    reading = loader(dataset, plan)
    reading.batch(0)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=_batch_in_child, args=(reading, results))
    child.start()
    assert results.get(timeout=30) == reading.batch(1).checksum
    child.join(30)
    assert child.exitcode == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"micro_batch_size": 5}, "not a multiple"),
        ({"world_size": 5}, "not a multiple"),
        ({"micro_batch_size": 0}, "not a multiple"),
        ({"global_batch_size": 0}, "not a multiple"),
        ({"rank": 1}, "outside a world"),
        ({"rank": -1}, "outside a world"),
    ],
)
def test_impossible_batches_are_refused(
    dataset: TokenDataset, plan: SamplePlan, changes: dict[str, int], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        loader(dataset, plan, **changes)


def test_plan_of_another_dataset_is_refused(dataset: TokenDataset) -> None:
    with pytest.raises(UsageError, match="the plan is for dataset other"):
        loader(dataset, SamplePlan("other", dataset.num_tokens, SEQ_LEN, 0))
