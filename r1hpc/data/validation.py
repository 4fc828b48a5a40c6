"""Documents that are held out of the training, to see the loss on what it does not see.

    part = hold_out(dataset, num=200, seed=0)
    part.held_out                   # (200,): numbers of documents, of each source its share
    part.training(items)            # items of [0, part.sizes of all sources) to documents

Which they are follows from the dataset's sizes and the seed alone, so every rank and every attempt agrees.
"""

from dataclasses import dataclass
from itertools import accumulate

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

    @property
    def sizes(self) -> tuple[int, ...]:
        """Documents of each source that are trained on."""
        return tuple(size - held for size, held in zip(self.all_sizes, self.num_held, strict=True))

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
            found[chosen] = self._document(source, items[chosen] - firsts[source])
        return found

    def _document(self, source: int, places: Ints) -> Ints:
        first = sum(self.all_sizes[:source])
        return first + visit(places, self.all_sizes[source], self.seed)


def hold_out(dataset: TraceDataset, num: int, seed: int) -> Parting:
    """`num` documents of the dataset, of each source its share.

    Raises:
        UsageError: a source would have none left to train on.
    """
    sizes = dataset.source_documents
    held = divide(num, sizes)
    if any(0 < size <= part for size, part in zip(sizes, held, strict=True)):
        raise UsageError(
            f"data.validation_documents is {num}, but {dataset.path} has {dataset.num_documents} documents, "
            "and some of every source must be left to train on: lower it"
        )
    return Parting(sizes, held, seed)
