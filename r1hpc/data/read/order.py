"""Order a dataset's windows or documents as a pure function of the plan and the sample number.

    plan = SamplePlan(dataset.id, dataset.num_tokens, seq_len=2048, seed=0)
    starts = plan.window_starts(np.arange(step * gbs, (step + 1) * gbs))

A run's state is one integer, the number of samples consumed. Sample k is window permute(k mod n, n,
epoch_key(seed, k div n)) of n: each epoch visits every window once, in its own order. Nothing is
materialised, so seeking costs the same anywhere. RankShare gives each rank its samples of a global batch.

The permutation is a balanced Feistel network over the smallest even number of bits that holds n, repeated
until it falls into [0, n) (cycle walking; Black & Rogaway, "Ciphers with arbitrary finite domains", CT-RSA
2002). The domain is less than 4n, so a walk takes fewer than 4 steps on average.
"""

import hashlib
import struct
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from r1hpc.base.errors import UsageError
from r1hpc.data.format.manifest import digest

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
ORDER_VERSION = "feistel-8/1"
MAX_DOMAIN = 2**62
_ROUNDS = 8


@dataclass(frozen=True)
class SamplePlan:
    """Selects and orders the windows of a dataset.

    A window is seq_len + 1 tokens (inputs and targets overlap by seq_len). Windows begin every seq_len
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
        check_seed(self.seed)

    @property
    def num_windows(self) -> int:
        """Return the samples per epoch."""
        return (self.num_tokens - 1) // self.seq_len

    @cached_property
    def plan_hash(self) -> str:
        """Return a hash of everything the order depends on. Runs with the same hash see the same samples."""
        return digest({"order": ORDER_VERSION, **asdict(self)})

    def window_starts(self, sample_ids: Ints) -> Ints:
        """Return the first token of each sample's window, in the shape of `sample_ids`, which are >= 0."""
        return visit(sample_ids, self.num_windows, self.seed) * self.seq_len


@dataclass(frozen=True)
class DocumentPlan:
    """Complete documents, each once per epoch, in a new order every epoch."""

    dataset_id: str
    num_documents: int
    seed: int

    def __post_init__(self) -> None:
        check_seed(self.seed)

    @cached_property
    def plan_hash(self) -> str:
        """Return a hash of the order. Runs with the same hash see the same documents."""
        return digest({"order": f"documents/{ORDER_VERSION}", **asdict(self)})

    def documents(self, sample_ids: Ints) -> Ints:
        """Return the document of each sample, in the shape of `sample_ids`, which are >= 0."""
        return visit(sample_ids, self.num_documents, self.seed)


@dataclass(frozen=True)
class RankShare:
    """The samples of a global batch that one rank takes."""

    global_batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        gbs, micro = self.global_batch_size, self.micro_batch_size
        if not 0 <= self.rank < self.world_size:
            raise UsageError(f"rank {self.rank} is outside a world of {self.world_size}")
        if micro < 1 or gbs < 1 or gbs % (micro * self.world_size):
            raise UsageError(
                f"global_batch_size {gbs} is not a multiple of micro_batch_size {micro} x "
                f"{self.world_size} ranks; change one of the three"
            )

    @property
    def gradient_accumulation_steps(self) -> int:
        return self.global_batch_size // (self.micro_batch_size * self.world_size)

    def sample_ids(self, global_step: int) -> Ints:
        """Return the sample ids of this rank, shape (gradient_accumulation_steps, micro_batch_size).

        Micro step a of rank r holds the ids step * GBS + a * micro * world + r * micro + j.
        """
        shape = (self.gradient_accumulation_steps, self.world_size, self.micro_batch_size)
        ids = np.arange(self.global_batch_size, dtype=np.int64).reshape(shape)[:, self.rank]
        return ids + global_step * self.global_batch_size


def visit(sample_ids: Ints, size: int, seed: int) -> Ints:
    """Return the item of [0, size) of each sample of the endless stream: every item once per epoch."""
    ids = np.asarray(sample_ids, dtype=np.int64)
    if ids.size and int(ids.min()) < 0:
        raise ValueError("a sample id is negative")
    items = np.zeros_like(ids)
    if size == 1:  # each sample would be an epoch of its own
        return items
    epochs, positions = np.divmod(ids, size)
    for epoch in np.unique(epochs).tolist():  # a batch touches one epoch, or two at its edge
        chosen = epochs == epoch
        items[chosen] = permute(positions[chosen], size, epoch_key(seed, epoch))
    return items


def check_seed(seed: int) -> None:
    """Raise UsageError unless the seed fits the key of an epoch."""
    if not 0 <= seed < 2**63:
        raise UsageError(f"data.seed must lie between 0 and 2^63 - 1, not {seed}")


def epoch_key(seed: int, epoch: int) -> bytes:
    number = struct.pack("<qq", seed, epoch)
    return hashlib.blake2b(number, digest_size=8 * _ROUNDS, person=b"r1hpc-order").digest()


def permute(positions: Ints, size: int, key: bytes) -> Ints:
    """Apply the keyed permutation of [0, size) to each of `positions`; O(1) memory and time each.

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


def _feistel(values: Words, half: np.uint64, keys: Words) -> Words:
    """Apply a bijection of [0, 2^(2 half))."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ (splitmix64(right + key) >> (np.uint64(64) - half))
    return (left << half) | right


def splitmix64(values: Words) -> Words:
    """Apply the output function of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
