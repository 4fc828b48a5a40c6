"""Documents that are held out of the training, to see the loss on what it does not see.

    part = hold_out(dataset, num=200, seed=0)
    part.held_out                   # (200,): numbers of documents, of each source its share
    part.siblings                   # documents of the same prompts: neither held out nor trained on
    part.training(items)            # items of [0, part.sizes of all sources) to documents

Which they are follows from the dataset and the seed alone, so every rank and every attempt agrees.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from r1hpc.base.errors import UsageError
from r1hpc.data.mixture import divide
from r1hpc.data.order import visit
from r1hpc.data.traces import TraceDataset

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Parting:
    """Each source's documents in an order of their own, of which the last are held out."""

    all_sizes: tuple[int, ...]
    num_held: tuple[int, ...]
    seed: int
    siblings: tuple[int, ...] = ()
    """Documents with the prompt of one that is held out, in order: other answers to the same question, of any
    source. Trained on, they would tell what the loss on the held-out ones is to find out."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Documents of each source that are trained on."""
        left_out = map(len, self._siblings_of)
        return tuple(
            size - held - out for size, held, out in zip(self.all_sizes, self.num_held, left_out, strict=True)
        )

    def to_json(self) -> dict[str, Any]:
        """What names it; without siblings, as it was named when there were none."""
        found = asdict(self)
        return found if self.siblings else {k: v for k, v in found.items() if k != "siblings"}

    @cached_property
    def _siblings_of(self) -> list[Ints]:
        """Of each source, the places of its siblings in its order, ascending."""
        found, first, out = [], 0, np.array(self.siblings, np.int64)
        for source, size in enumerate(self.all_sizes):
            mine = out[(out >= first) & (out < first + size)]
            order = self._document(source, np.arange(size if mine.size else 0, dtype=np.int64))
            found.append(np.flatnonzero(np.isin(order, mine)))
            first += size
        return found

    @property
    def held_out(self) -> Ints:
        parts = [
            self._document(source, np.arange(size - held, size, dtype=np.int64))
            for source, (size, held) in enumerate(zip(self.all_sizes, self.num_held, strict=True))
        ]
        return np.concatenate(parts)

    def training(self, items: Ints) -> Ints:
        """Documents by their place among those that are trained on, source after source."""
        firsts = np.array([0, *accumulate(self.sizes)], np.int64)
        sources = np.searchsorted(firsts, items, side="right") - 1
        found = np.empty_like(items)
        for source in np.unique(sources).tolist():
            chosen = sources == source
            # The k-th place that is no sibling's: before it lie as many siblings as have at most k others
            # before them.
            out = self._siblings_of[source]
            places = items[chosen] - firsts[source]
            places = places + np.searchsorted(out - np.arange(len(out)), places, side="right")
            found[chosen] = self._document(source, places)
        return found

    def _document(self, source: int, places: Ints) -> Ints:
        first = sum(self.all_sizes[:source])
        return first + visit(places, self.all_sizes[source], self.seed)


def hold_out(
    dataset: TraceDataset,
    num: int,
    seed: int,
    is_of_before: Callable[[Parting], bool] = lambda parting: False,
) -> Parting:
    """`num` documents of the dataset, of each source its share. All its tokens are read, to find siblings.

    Args:
        is_of_before: whether the run began with a parting without siblings, when nobody looked for them. It
            goes on with that one.

    Raises:
        UsageError: a source would have none left to train on.
        ShardCorruptError: names the file and chunk that cannot be trusted.
    """
    sizes = dataset.source_documents
    found = Parting(sizes, divide(num, sizes), seed)
    if _leaves_some(found):
        if is_of_before(found):
            return found
        prompts, ours = dataset.prompt_keys(), np.zeros(dataset.num_documents, np.bool_)
        ours[found.held_out] = True
        siblings = np.isin(prompts, prompts[ours]) & ~ours
        found = replace(found, siblings=tuple(np.flatnonzero(siblings).tolist()))
        if _leaves_some(found):
            return found
    raise UsageError(
        f"data.validation_documents is {num}, but {dataset.path} has {dataset.num_documents} documents, "
        f"{len(found.siblings)} more of which share a prompt with those held out, and some of every source "
        "must be left to train on: lower it"
    )


def _leaves_some(parting: Parting) -> bool:
    return all(left > 0 for left, size in zip(parting.sizes, parting.all_sizes, strict=True) if size)
