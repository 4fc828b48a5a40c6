"""Put random numbers of data loading where they were: loaders read ahead of the training.

    fetches = Fetches({"collator": collator, "data": dataset})
    fetches.watch(loader)                        # at the begin of each pass
    saved = fetches.position()                   # with a checkpoint
    fetches.go_on(saved, skipped, then=restore)  # in the next attempt, before the pass that goes on

Accelerate's loader holds one batch that the training has not used. A resume reads that batch again, so the
states from before it are kept; `then` puts the later ones back. Worker processes draw by themselves.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data._utils import fetch

from r1hpc.client.held.holdings import Holdings
from r1hpc.client.held.streams import glance, packed, set_streams

_watching: list["Fetches"] = []


class Fetches:
    """The reads of one training's data set in this process."""

    def __init__(self, roots: dict[str, Any]) -> None:
        self.holdings = Holdings(roots)
        """The generators and numbers of the objects that read the data."""
        self._dataset: Any = None
        self._count = 0
        """Batches read in this pass."""
        self._before: tuple[Any, dict[Any, Any]] | None = None
        """States before the newest one was read."""
        self._until = 0
        self._saved: dict[str, Any] | None = None
        self._then: Callable[[], None] = lambda: None
        self.opened = {"training": 0, "other": 0}
        """Iterators with persistent workers that were opened. Each draws a seed once, over all attempts."""
        self._drawn = 0
        """The number of others whose seed an earlier attempt drew."""
        if not _watching:
            _patch()
        _watching[:] = [self]

    def watch(self, loader: Any) -> None:
        """Begin a pass over the loader's data."""
        self._dataset = loader.dataset
        self._count, self._before = 0, None
        self.holdings.look()

    def position(self) -> dict[str, Any]:
        """Return the states before the newest batch was read, for `go_on`."""
        before = self._before
        states = None if before is None else (packed(before[0]), before[1])
        return {"count": self._count, "before": states}

    def go_on(self, saved: dict[str, Any], skipped: int, then: Callable[[], None]) -> None:
        """Set the saved states before that batch is read again, and call `then` after it. This pass leaves
        out `skipped` batches without reading them."""
        self._count = skipped
        if saved["before"] is not None:
            self._saved, self._then, self._until = saved, then, saved["count"]

    def drew(self, opened: dict[str, int]) -> None:
        """Take over how many iterators earlier attempts opened."""
        self.opened["training"], self._drawn = opened["training"], opened["other"]

    def read(self, original: Any, fetcher: Any, index: Any) -> Any:
        if fetcher.dataset is not self._dataset or get_worker_info() is not None:
            return original(fetcher, index)
        self._count += 1
        is_again = self._saved is not None and self._count == self._until
        if self._saved is not None and is_again:
            set_streams(self._saved["before"][0])
            self.holdings.restore(self._saved["before"][1])
        self._before = (glance(), self.holdings.glance())
        batch = original(fetcher, index)
        if is_again:
            self._saved = None
            self._then()
        return batch

    def open(self, original: Any, loader: Any) -> Any:
        """Open an iterator; one that was open in an earlier attempt draws no seed again."""
        if not loader.persistent_workers:
            return original(loader)
        kind = "training" if loader.dataset is self._dataset else "other"
        is_first = self.opened[kind] == 0
        self.opened[kind] += 1
        draws = is_first if kind == "training" else self.opened[kind] > self._drawn
        if draws:
            return original(loader)
        own = loader.generator or torch.default_generator
        state = own.get_state()
        iterator = original(loader)
        own.set_state(state)
        return iterator


def _patch() -> None:
    for owner, name, method in (
        (fetch._MapDatasetFetcher, "fetch", "read"),
        (fetch._IterableDatasetFetcher, "fetch", "read"),
        (DataLoader, "_get_iterator", "open"),
    ):
        setattr(owner, name, _through(getattr(owner, name), method))


def _through(original: Any, method: str) -> Any:
    @functools.wraps(original)
    def call(self: Any, *args: Any) -> Any:
        return getattr(_watching[0], method)(original, self, *args)

    return call
