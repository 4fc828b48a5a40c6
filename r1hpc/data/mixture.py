"""Several sources in fixed shares, as a pure function of the sample number.

    plan = MixturePlan(dataset.id, dataset.source_documents, weights=(0.3, 0.4, 0.3), seed=0)
    plan.documents(np.arange(step * gbs, (step + 1) * gbs))

The stream is cut into blocks of 1,000 samples. Weights become whole slots of a block (rounded by largest
remainder), so every block holds each source exactly so often; which sample gets which slot is a keyed
permutation of its own for each block. The k-th slot of a source is item k of that source's own endless
stream, which visits each of its documents once per epoch (see order): a source of few documents and much
weight begins its next epoch sooner. Near the end of a source's epoch the last block may already hold
documents of the next.

Only `TraceLoader(weights=…)` makes such a plan so far; no key of a recipe or of a run sets it.
"""

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from r1hpc.base.errors import UsageError
from r1hpc.data.manifest import digest
from r1hpc.data.order import ORDER_VERSION, check_seed, visit

BLOCK = 1_000
_BLOCKS = -1  # in place of a source's number, where the key is that of the blocks


@dataclass(frozen=True)
class MixturePlan:
    """Whole documents of several sources. Source j is the j-th run of documents of the dataset."""

    dataset_id: str
    source_documents: tuple[int, ...]
    """How many documents each source has."""
    weights: tuple[float, ...]
    """Share of each source in the samples; need not sum to 1."""
    seed: int

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if len(self.weights) != len(self.source_documents):
            raise UsageError(
                f"{len(self.weights)} weights for {len(self.source_documents)} sources of traces"
            )
        if not all(0 < weight < math.inf for weight in self.weights):
            raise UsageError(f"weights of traces must be positive numbers, not {list(self.weights)}")
        for number, (size, slots) in enumerate(zip(self.source_documents, self.slots, strict=True)):
            if not size or not slots:
                what = "has no documents" if not size else f"has less than 1 of {BLOCK:,} samples"
                raise UsageError(f"source {number} of the traces {what}: leave it out or change its weight")

    @cached_property
    def slots(self) -> tuple[int, ...]:
        """Samples of each source in a block; they sum to BLOCK."""
        return divide(BLOCK, self.weights)

    @cached_property
    def plan_hash(self) -> str:
        """Names everything the order depends on."""
        return digest(
            {
                "order": f"mixture/1/{ORDER_VERSION}",
                "dataset_id": self.dataset_id,
                "source_documents": self.source_documents,
                "slots": self.slots,
                "seed": self.seed,
            }
        )

    def documents(self, sample_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The document of each sample; the same shape as `sample_ids`, which are >= 0."""
        ids = np.asarray(sample_ids, dtype=np.int64)
        slots = visit(ids, BLOCK, _seed(self.seed, _BLOCKS))
        edges = [0, *accumulate(self.slots)]
        sources = np.searchsorted(edges[1:], slots, side="right")
        found = np.empty_like(ids)
        first = 0
        for number, size in enumerate(self.source_documents):
            chosen = sources == number
            items = ids[chosen] // BLOCK * self.slots[number] + slots[chosen] - edges[number]
            found[chosen] = first + visit(items, size, _seed(self.seed, number))
            first += size
        return found


def divide(total: int, weights: Sequence[float]) -> tuple[int, ...]:
    """`total` in whole shares nearest to the weights, by largest remainder; ties go to the first.

    >>> divide(10, [0.3, 0.4, 0.3])
    (3, 4, 3)
    """
    exact = [total * weight / math.fsum(weights) for weight in weights]
    shares = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda number: shares[number] - exact[number])
    for number in by_remainder[: total - sum(shares)]:
        shares[number] += 1
    return tuple(shares)


def _seed(seed: int, number: int) -> int:
    """A seed of its own for each source and for the blocks."""
    raw = hashlib.blake2b(struct.pack("<qq", seed, number), digest_size=8, person=b"r1hpc-mix").digest()
    return int.from_bytes(raw, "little") >> 1
