"""Mix several sources in given shares, exact in every batch, as a pure function of the sample number.

    mixture = Mixture(sizes=(70, 9_000), weights=(0.3, 0.7), batch=256, seed=0)
    sources, items = mixture.locate(np.arange(step * 256, (step + 1) * 256))

A batch of G samples holds each source's share, rounded down or up so that the sum over batches follows the
shares. The numbers of a batch come from a table of some 65,536 samples that repeats; a keyed permutation
assigns samples to sources. The k-th sample of a source is item k of its own endless stream, which visits each
item once per epoch (see order.py): a small source of large weight begins its next epoch sooner.

A source that would exceed max_epochs is left out from that batch on, and the others keep their shares among
themselves: a segment of the plan. A change of weights also begins a segment, at the edge of a batch. Rounding
debts of each source carry over, so the sum follows the weights however often they change (data.mix.schedule).
The plan's hash covers all of this, and nothing depends on ranks, progress or the past.
"""

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from r1hpc.base.errors import UsageError
from r1hpc.data.read.order import ORDER_VERSION, Ints, check_seed, visit

_TABLE_SAMPLES = 65_536
_BATCHES = -1  # in place of a source's number, where the key is that of the batches
_ROUNDING = 1e-9
_RESOLUTION = 10**12


@dataclass(frozen=True)
class Change:
    """New weights from a sample on, which begins a batch. A source of weight 0 pauses."""

    first_sample: int
    weights: tuple[float, ...]


@dataclass(frozen=True)
class _Segment:
    """Batches with the same weights. Tables are by batch of the period, then by source."""

    first_batch: int
    before: Ints
    """Samples of each source in all earlier segments."""
    counts: Ints
    """Samples of each source in each batch of the period, or until the weights change, if that is sooner."""
    shares: npt.NDArray[np.float64]
    """Samples of each source in a batch, unrounded."""
    lag: npt.NDArray[np.float64]
    """Samples each source is owed (or ahead, if negative) when the segment begins."""

    @cached_property
    def until(self) -> Ints:
        """Samples of each source before each batch of the period, and at its end."""
        zero = np.zeros((1, self.counts.shape[1]), np.int64)
        return np.concatenate([zero, np.cumsum(self.counts, axis=0)])

    @property
    def period(self) -> int:
        return len(self.counts)

    def taken(self, batches: Any) -> Ints:
        """Return the samples of each source in the first `batches` batches of the segment."""
        rounds, rest = np.divmod(batches, self.period)
        return np.asarray(rounds)[..., None] * self.until[-1] + self.until[rest]  # type: ignore[no-any-return]

    def lag_after(self, batches: int) -> npt.NDArray[np.float64]:
        """Return what each source is owed after `batches` > 0 batches, counted from the period's start."""
        rows = (batches - 1) % self.period + 1
        owed: npt.NDArray[np.float64] = self.lag + self.shares * rows - self.until[rows]
        return owed

    def batches_within(self, source: int, limit: int) -> float:
        """Return the most batches in which a source has no more than `limit` samples."""
        column = self.until[:, source]
        if not column[-1]:
            return math.inf
        rounds, rest = divmod(limit, int(column[-1]))
        return rounds * self.period + int(np.searchsorted(column, rest, side="right")) - 1


@dataclass(frozen=True)
class Mixture:
    """Maps every sample to a source and an item of it."""

    sizes: tuple[int, ...]
    """Items of each source: windows or documents."""
    weights: tuple[float, ...]
    """Share of each source in the samples; need not sum to 1."""
    batch: int
    """Samples of a global batch."""
    seed: int
    max_epochs: float | None = None
    changes: tuple[Change, ...] = ()
    names: tuple[str, ...] = ()
    """Names of the sources, for messages; not part of the order."""

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.batch < 1:
            raise UsageError(f"a batch of a mixture has at least 1 sample, not {self.batch}")
        for weights in (self.weights, *(change.weights for change in self.changes)):
            if len(weights) != len(self.sizes):
                raise UsageError(f"{len(weights)} weights for {len(self.sizes)} sources")
            if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
                raise UsageError(
                    "weights of a mixture must be positive numbers, or 0 for some of them, not "
                    f"{list(weights)}"
                )
        for number, size in enumerate(self.sizes):
            if size < 1:
                name = self.names[number] if self.names else number
                raise UsageError(
                    f"source {name} has nothing to sample: no documents, or too few tokens for one window; "
                    "leave it out of the mixture, or lower data.seq_len"
                )
        firsts = [0, *(change.first_sample for change in self.changes)]
        if any(b <= a or b % self.batch for a, b in pairwise(firsts)):
            raise UsageError(
                f"weights can change at ever later multiples of the global batch size {self.batch}, "
                f"not at samples {firsts[1:]}"
            )

    def locate(self, sample_ids: Ints) -> tuple[Ints, Ints]:
        """Return source and item of each sample, in the shape of `sample_ids`, which are >= 0.

        Raise UsageError beyond the end, which a mixture with max_epochs has.
        """
        ids = np.asarray(sample_ids, dtype=np.int64)
        self.check_reaches(int(ids.max()) + 1 if ids.size else 0)
        batches = ids // self.batch
        places = visit(ids, self.batch, _seed(self.seed, _BATCHES))
        sources, items = np.empty_like(ids), np.empty_like(ids)
        segments = self._segments[0]
        numbers = np.searchsorted([item.first_batch for item in segments], batches, side="right") - 1
        for number in np.unique(numbers).tolist():
            chosen, segment = numbers == number, segments[number]
            relative, place = batches[chosen] - segment.first_batch, places[chosen]
            counts = segment.counts[relative % segment.period]
            edges = np.cumsum(counts, axis=-1)
            source = (place[:, None] >= edges).sum(axis=-1)
            before = segment.before + segment.taken(relative) - (edges - counts)  # of each source
            sources[chosen], items[chosen] = source, before[np.arange(len(source)), source] + place
        for number, size in enumerate(self.sizes):
            chosen = sources == number
            items[chosen] = visit(items[chosen], size, _seed(self.seed, number))
        return sources, items

    def check_reaches(self, num_samples: int) -> None:
        """Raise UsageError unless the first `num_samples` samples exist."""
        if num_samples > self.num_samples:
            raise UsageError(
                f"the mixture ends after {self.num_samples:,.0f} samples, when every source with a weight "
                f"was seen max_epochs ({self.max_epochs:g}) times, but {num_samples:,} are wanted; raise "
                "mix.max_epochs or train less"
            )

    @property
    def num_samples(self) -> float:
        """Return how many samples there are; infinite without max_epochs."""
        return self._segments[1] * self.batch

    @property
    def epoch_samples(self) -> int:
        """Return the samples until the share of each source reaches its size, or max_epochs ends all."""
        total = math.fsum(self.weights)
        shares = [(size, weight / total) for size, weight in zip(self.sizes, self.weights, strict=True)]
        longest = max(math.ceil(size / share - _ROUNDING) for size, share in shares if share)
        return int(min(longest, self.num_samples))

    def weights_of(self, batch: int) -> tuple[float, ...]:
        """Return the shares in force in a batch, summing to 1; those of an ended source too."""
        begun = [change.weights for change in self.changes if change.first_sample <= batch * self.batch]
        weights = (self.weights, *begun)[-1]
        return tuple(weight / math.fsum(weights) for weight in weights)

    @cached_property
    def described(self) -> dict[str, Any]:
        """Return everything the order depends on, except the dataset."""
        return {
            "order": f"mixture/2/{ORDER_VERSION}",
            "sizes": self.sizes,
            "weights": divide(_RESOLUTION, self.weights),
            "batch": self.batch,
            "seed": self.seed,
            "max_epochs": self.max_epochs,
            "changes": [[item.first_sample, divide(_RESOLUTION, item.weights)] for item in self.changes],
        }

    @cached_property
    def _segments(self) -> tuple[list[_Segment], float]:
        """Return the segments in order, and the batch at which the mixture ends."""
        limits = [math.inf if self.max_epochs is None else int(self.max_epochs * size) for size in self.sizes]
        changes = list(self.changes)
        weights, alive = np.array(self.weights), np.ones(len(self.sizes), dtype=bool)
        found: list[_Segment] = []
        first, before = 0, np.zeros(len(self.sizes), np.int64)
        lag = np.zeros(len(self.sizes))
        while (alive & (weights > 0)).any():
            change = changes[0].first_sample // self.batch - first if changes else math.inf
            shares = np.where(alive, weights, 0.0)
            shares = shares / shares.sum() * self.batch
            rows = int(min(-(-_TABLE_SAMPLES // self.batch), max(1, change)))  # those needed of a period
            counts = _table(tuple(shares.tolist()), self.batch, tuple(lag.tolist()), rows)
            segment = _Segment(first, before, counts, shares, lag)
            lasts = [
                segment.batches_within(number, int(limit - before[number])) if limit < math.inf else math.inf
                for number, limit in enumerate(limits)
            ]
            length = min(*lasts, change)
            if length:
                found.append(segment)
            if length == math.inf:
                return found, math.inf
            alive &= ~(np.array(lasts) == length)
            lag = np.zeros_like(lag)
            if length == change:
                weights = np.array(changes.pop(0).weights)
                lag = segment.lag_after(int(length)) if length else segment.lag
            before = before + segment.taken(int(length))
            first += int(length)
        return found, first


def divide(total: int, weights: Sequence[float]) -> tuple[int, ...]:
    """Divide `total` into integer shares nearest to the weights, by largest remainder; ties go to the first.

    >>> divide(10, [0.3, 0.4, 0.3])
    (3, 4, 3)
    """
    exact = [total * weight / math.fsum(weights) for weight in weights]
    found = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda number: found[number] - exact[number])
    for number in by_remainder[: total - sum(found)]:
        found[number] += 1
    return tuple(found)


@lru_cache(maxsize=1024)  # appending a change keeps the earlier segments
def _table(exact: tuple[float, ...], batch: int, owed: tuple[float, ...], rows: int) -> Ints:
    """Return the samples of each source in each batch of a period: shares rounded so that the sum follows.

    Places left by rounding down go to the sources furthest behind their share so far (the quota method of
    Balinski & Young 1975, batch by batch), among those whose share is not an integer. `owed` counts the
    samples each source is behind at the start.
    """
    shares, lag = np.array(exact), np.array(owed)
    least = np.floor(shares + _ROUNDING).astype(np.int64)
    left = batch - int(least.sum())
    counts = np.tile(least, (rows, 1))
    if not left:
        return counts[:1]
    part = np.maximum(shares - least, 0.0)
    is_whole = part <= _ROUNDING
    for row in counts:
        lag += part
        chosen = np.argsort(np.where(is_whole, np.inf, -lag), kind="stable")[:left]
        row[chosen] += 1
        lag[chosen] -= 1
    return counts


def _seed(seed: int, number: int) -> int:
    raw = hashlib.blake2b(struct.pack("<qq", seed, number), digest_size=8, person=b"r1hpc-mix").digest()
    return int.from_bytes(raw, "little") >> 1
