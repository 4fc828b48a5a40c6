"""The order is a permutation in each epoch, the same everywhere, and costs the same at any cursor."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1hpc.base.errors import UsageError
from r1hpc.data.read.order import MAX_DOMAIN, ORDER_VERSION, SamplePlan, epoch_key, permute


@given(st.integers(1, 3000), st.integers(0, 2**63 - 1), st.integers(0, 2**40))
def test_every_window_once_per_epoch(size: int, seed: int, epoch: int) -> None:
    image = permute(np.arange(size), size, epoch_key(seed, epoch))
    assert np.array_equal(np.sort(image), np.arange(size))


@given(st.integers(2**31, MAX_DOMAIN), st.integers(0, 2**63 - 1), st.data())
def test_large_domains_stay_inside_and_collide_nowhere(size: int, seed: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, size - 1000))
    image = permute(np.arange(start, start + 1000), size, epoch_key(seed, 0))
    assert image.min() >= 0
    assert image.max() < size
    assert len(np.unique(image)) == 1000


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=50))
def test_a_sample_does_not_depend_on_its_batch(ids: list[int]) -> None:
    plan = SamplePlan("d", 1_000_003, 7, seed=3)
    together = plan.window_starts(np.array(ids))
    alone = [int(plan.window_starts(np.array([sample]))[0]) for sample in ids]
    assert together.tolist() == alone


def _scalar_permute(position: int, size: int, key: bytes) -> int:
    """The same network in Python's unbounded integers, one value at a time."""
    half, low = max(1, -(-(size - 1).bit_length() // 2)), 2**64 - 1
    while True:
        left, right = position >> half, position & (2**half - 1)
        for (round_key,) in struct.iter_unpack("<Q", key):
            mixed = (right + round_key) & low
            mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & low
            mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & low
            left, right = right, left ^ ((mixed ^ (mixed >> 31)) >> (64 - half))
        position = (left << half) | right
        if position < size:
            return position


@given(st.integers(1, MAX_DOMAIN), st.integers(0, 2**63 - 1), st.data())
def test_vectorised_equals_scalar(size: int, seed: int, data: st.DataObject) -> None:
    positions = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=5))
    key = epoch_key(seed, 1)
    assert permute(np.array(positions), size, key).tolist() == [
        _scalar_permute(p, size, key) for p in positions
    ]


def test_each_epoch_has_its_own_order() -> None:
    plan = SamplePlan("d", 10_001, 10, seed=0)
    epochs = [tuple(plan.window_starts(np.arange(1000) + 1000 * epoch).tolist()) for epoch in range(5)]
    assert {tuple(sorted(epoch)) for epoch in epochs} == {tuple(range(0, 10_000, 10))}
    assert len(set(epochs)) == 5
    assert plan.window_starts(np.arange(4000, 5000)).tolist() == list(epochs[4])


def test_seeds_give_unlike_orders() -> None:
    orders = [SamplePlan("d", 1001, 1, seed=seed).window_starts(np.arange(1000)) for seed in range(20)]
    agreements = [int((a == b).sum()) for i, a in enumerate(orders) for b in orders[:i]]
    assert max(agreements) < 12  # of two random permutations: one on average, Poisson


@pytest.mark.parametrize("size", [2, 5, 64])
def test_each_position_meets_each_window_equally_often(size: int) -> None:
    trials = 2000
    images = np.stack([permute(np.arange(size), size, epoch_key(1, epoch)) for epoch in range(trials)])
    for position in (0, size // 2, size - 1):
        counts = np.bincount(images[:, position], minlength=size)
        chi_square = float(((counts - trials / size) ** 2 / (trials / size)).sum())
        assert chi_square < size - 1 + 6 * np.sqrt(2 * size)


def test_order_is_pinned() -> None:
    """A change here changes what every unfinished run reads next: then change ORDER_VERSION too."""
    plan = SamplePlan("d", 2_000_001, 2, seed=42)
    found = plan.window_starts(np.array([0, 1, 2, 999_999, 1_000_000, 10**15])).tolist()
    assert (ORDER_VERSION, found) == ("feistel-8/1", [831552, 243698, 1635384, 1885776, 643234, 1492276])


def test_plan_hash_covers_every_field() -> None:
    plans = [
        SamplePlan("d", 100, 7, 0),
        SamplePlan("e", 100, 7, 0),
        SamplePlan("d", 101, 7, 0),
        SamplePlan("d", 100, 8, 0),
        SamplePlan("d", 100, 7, 1),
    ]
    assert len({plan.plan_hash for plan in plans}) == len(plans)


@pytest.mark.parametrize(("tokens", "seq_len", "windows"), [(11, 10, 1), (20, 10, 1), (21, 10, 2), (2, 1, 1)])
def test_windows_fit_the_dataset(tokens: int, seq_len: int, windows: int) -> None:
    plan = SamplePlan("d", tokens, seq_len, 0)
    assert plan.num_windows == windows
    assert int(plan.window_starts(np.arange(windows)).max()) + seq_len + 1 <= tokens


@pytest.mark.parametrize(("tokens", "seq_len", "seed"), [(10, 10, 0), (10, 0, 0), (100, 10, -1), (0, 1, 0)])
def test_impossible_plans_are_refused(tokens: int, seq_len: int, seed: int) -> None:
    with pytest.raises(UsageError):
        SamplePlan("d", tokens, seq_len, seed)


def test_negative_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        SamplePlan("d", 100, 7, 0).window_starts(np.array([-1]))
