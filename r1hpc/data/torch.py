"""Windows of a verified Zarr dataset for a training script: a function of the step, so there is no state.

batches = Batches(run, "/scratch/fineweb", seq_len=2048, batch_size=512)
tokens = batches[step]                  # this rank's, int64, shape (batch_size / ranks, seq_len + 1)

dataset = Windows("/scratch/fineweb", seq_len=2048)       # for a DataLoader, Trainer or Lightning
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from r1hpc.base.errors import UsageError
from r1hpc.data.read.loader import BatchLoader
from r1hpc.data.read.open_plan import WindowMixture, open_plan
from r1hpc.data.read.reader import open_dataset

_BLOCK = 2**18
"""Windows whose starts are kept, 2 MiB."""
_PIECE = 2**12
"""Windows whose starts are computed at once: a mixture needs some arrays of this by its sources."""


class Run(Protocol):
    """The run of a script, which `attempt()` returns."""

    rank: int
    world_size: int

    def used(self, num_samples: int, sample_sum: int, checksum: int) -> None:
        """Record what this rank read for this step."""


class Batches:
    """This rank's windows of each step. What was read goes into the ledger, for `report --audit`."""

    def __init__(self, run: Run, path: Path | str, *, seq_len: int, batch_size: int, seed: int = 0) -> None:
        """`batch_size` is the windows of a step over all ranks.

        Raise UsageError if the ranks cannot share them evenly; DatasetMissingError and ShardCorruptError as
        `open_dataset` does.
        """
        world_size = run.world_size
        if batch_size % world_size:
            raise UsageError(
                f"batch_size={batch_size} cannot be shared by {world_size} ranks: take a multiple"
            )
        dataset = open_dataset(path)
        self._loader = BatchLoader(
            dataset,
            open_plan(dataset, seq_len, seed, batch_size),
            global_batch_size=batch_size,
            micro_batch_size=batch_size // world_size,
            rank=run.rank,
            world_size=world_size,
        )
        self._run = run
        self.vocab_size = dataset.vocab_size

    def __getitem__(self, step: int) -> npt.NDArray[np.int64]:
        """Return the windows of a step, from 1."""
        batch = self._loader.batch(step - 1)
        self._run.used(int(batch.sample_ids.size), int(batch.sample_ids.sum()), batch.checksum)
        tokens: npt.NDArray[np.int64] = batch.tokens[0]
        return tokens


class Windows(torch.utils.data.Dataset[dict[str, Any]]):
    """A map-style torch Dataset: item i is window i of the shuffled order, verified when it is read."""

    def __init__(self, path: Path | str, *, seq_len: int, seed: int = 0) -> None:
        self._dataset = open_dataset(path)
        self._plan = open_plan(self._dataset, seq_len, seed, 1)
        self._block = -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        """Return the windows of one epoch; of a mixture, until each source's share reaches its windows."""
        plan = self._plan
        if isinstance(plan, WindowMixture):
            return plan.mixture.epoch_samples
        return (self._dataset.num_tokens - 1) // plan.seq_len

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `input_ids` and `labels`, equal as for any causal language model."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Return the items of a batch; a DataLoader calls it, so the order is computed once a batch.

        Raise IndexError for an index outside the epoch.
        """
        length = len(self)
        for index in indices:
            if not 0 <= index < length:
                raise IndexError(f"window {index} is outside 0 to {length - 1}")
        starts = self._starts(np.asarray(indices, dtype=np.int64)).tolist()
        rows = np.empty((len(starts), self._plan.seq_len), dtype=np.int64)
        for row, start in enumerate(starts):
            rows[row] = self._dataset.read(start, self._plan.seq_len)
        tokens = torch.from_numpy(rows)
        pairs = zip(tokens.unbind(), tokens.clone().unbind(), strict=True)
        return [{"input_ids": window, "labels": labels} for window, labels in pairs]

    def _starts(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the first token of each window.

        They come from a block that is kept, if the dataset fits into one or the indices are consecutive.
        """
        is_near = len(self) <= _BLOCK or (len(indices) > 1 and bool((np.diff(indices) == 1).all()))
        blocks = np.unique(indices // _BLOCK)
        if not is_near or len(blocks) != 1:
            return self._plan.window_starts(indices)
        block = int(blocks[0])
        if self._block[0] != block:
            stop = min((block + 1) * _BLOCK, len(self))
            firsts = range(block * _BLOCK, stop, _PIECE)
            pieces = [np.arange(first, min(first + _PIECE, stop)) for first in firsts]
            self._block = block, np.concatenate([self._plan.window_starts(piece) for piece in pieces])
        return self._block[1][indices % _BLOCK]
