"""What child processes run: a module of its own, so that a spawned child imports little."""

from typing import Any

import numpy as np

from r1hpc.data.read.reader import TokenDataset


def read_sums(dataset: TokenDataset, seed: int, results: Any) -> None:
    """Put (seed, sums of 200 random windows of 50 tokens) into a queue."""
    starts = np.random.default_rng(seed).integers(0, dataset.num_tokens - 50, 200).tolist()
    results.put((seed, [int(dataset.read(start, 50).sum(dtype=np.int64)) for start in starts]))
