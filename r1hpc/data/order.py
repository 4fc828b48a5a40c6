"""The order of samples: a pure function of the plan and a sample index.

    plan = SamplePlan(dataset.id, dataset.num_tokens, seq_len=2048, seed=0)
    starts = plan.window_starts(np.arange(step * gbs, (step + 1) * gbs))

The state of a run is one integer, the number of samples consumed. Sample k is window
permute(k mod n, n, key(seed, k div n)) of n: each epoch visits every window once, in its own order, and
nothing is materialised, so seeking costs the same anywhere.

The permutation is a balanced Feistel network over the smallest even number of bits that holds n, walked
until it falls back into [0, n) (cycle walking; Black & Rogaway, "Ciphers with arbitrary finite domains",
CT-RSA 2002). The domain is less than 4n, so a walk takes fewer than 4 steps on average.
"""

import hashlib
import struct
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from r1hpc.base.errors import UsageError
from r1hpc.data.manifest import digest

ORDER_VERSION = "feistel-8/1"
MAX_DOMAIN = 2**62
_ROUNDS = 8
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


@dataclass(frozen=True)
class SamplePlan:
    """Which windows of a dataset are read and in which order.

    A window is seq_len + 1 tokens (inputs and targets overlap by seq_len); windows begin every seq_len
    tokens, so each token is a target once per epoch.
    """

    dataset_id: str
    num_tokens: int
    seq_len: int
    seed: int

    def __post_init__(self) -> None:
        if self.seq_len < 1:
            raise UsageError(f"data.seq_len must be at least 1, not {self.seq_len}")
        if self.num_windows < 1:
            raise UsageError(
                f"a window of seq_len + 1 = {self.seq_len + 1} tokens does not fit a dataset of "
                f"{self.num_tokens} tokens; lower data.seq_len or take a larger dataset"
            )
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"data.seed must lie between 0 and 2^63 - 1, not {self.seed}")

    @property
    def num_windows(self) -> int:
        """Samples per epoch."""
        return (self.num_tokens - 1) // self.seq_len

    @cached_property
    def plan_hash(self) -> str:
        """Names everything the order depends on. Two runs with this hash see the same samples."""
        return digest(
            {
                "order": ORDER_VERSION,
                "dataset_id": self.dataset_id,
                "num_tokens": self.num_tokens,
                "seq_len": self.seq_len,
                "seed": self.seed,
            }
        )

    def window_starts(self, sample_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """First token of the window of each sample; the same shape as `sample_ids`, which are >= 0."""
        ids = np.asarray(sample_ids, dtype=np.int64)
        if ids.size and int(ids.min()) < 0:
            raise ValueError("a sample id is negative")
        epochs, positions = np.divmod(ids, self.num_windows)
        windows = np.empty_like(ids)
        for epoch in np.unique(epochs).tolist():  # a batch touches one epoch, or two at its edge
            chosen = epochs == epoch
            windows[chosen] = permute(positions[chosen], self.num_windows, epoch_key(self.seed, epoch))
        return windows * self.seq_len


def epoch_key(seed: int, epoch: int) -> bytes:
    """The permutation key of one epoch."""
    return hashlib.blake2b(
        struct.pack("<qq", seed, epoch), digest_size=8 * _ROUNDS, person=b"r1hpc-order"
    ).digest()


def permute(positions: npt.NDArray[np.int64], size: int, key: bytes) -> npt.NDArray[np.int64]:
    """The keyed permutation of [0, size), applied to each of `positions`; O(1) memory and time each.

    Args:
        positions: int64 values in [0, size).
        size: 1 to 2^62.
        key: 8 bytes for each of the 8 rounds.
    """
    if not 1 <= size <= MAX_DOMAIN:
        raise ValueError(f"a permutation of {size} elements is out of range")
    half = np.uint64(max(1, -(-(size - 1).bit_length() // 2)))
    keys = np.frombuffer(key, dtype="<u8")
    values = _feistel(np.asarray(positions).astype(np.uint64), half, keys)
    outside = np.flatnonzero(values >= size)
    while len(outside):
        values[outside] = _feistel(values[outside], half, keys)
        outside = outside[values[outside] >= size]
    return values.astype(np.int64)


def _feistel(
    values: npt.NDArray[np.uint64], half: np.uint64, keys: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint64]:
    """A bijection of [0, 2^(2 half))."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) >> (np.uint64(64) - half))
    return (left << half) | right


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The output function of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014); its high bits are used."""
    values = (values ^ (values >> np.uint64(30))) * _MULTIPLIERS[0]
    values = (values ^ (values >> np.uint64(27))) * _MULTIPLIERS[1]
    return values ^ (values >> np.uint64(31))
