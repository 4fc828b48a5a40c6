"""How many bytes of tensors live at once, on any device, meta included: what an allocator would be asked for.

with LiveBytes() as live: ...
live.peak                          # bytes of what was made inside and lived at the same time
"""

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts each storage once, from the operation that makes it until nobody holds it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watched: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        """By the storage's address; of storages that were there before, 0 bytes."""
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in _storages((args, kwargs)):
            self._watch(storage, 0)
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            self._watch(storage, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _watch(self, storage: torch.UntypedStorage, num_bytes: int) -> None:
        key = int(storage._cdata)
        if key in self._watched:
            return

        def gone(_: object) -> None:
            self.now -= self._watched.pop(key)[1]

        self._watched[key] = weakref.ref(storage, gone), num_bytes
        self.now += num_bytes


def _storages(value: Any) -> Iterator[torch.UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))
