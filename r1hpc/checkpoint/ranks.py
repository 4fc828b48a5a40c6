"""The ranks that choose a checkpoint together, as far as that needs them: no torch here.

`train.distributed.Group` is one. A process by itself is ALONE.
"""

from collections.abc import Callable
from typing import Any, Protocol


class Ranks(Protocol):
    """One rank's place among all, and the two collectives that agreeing takes."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, in rank order, on all ranks."""

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value` on all ranks."""

    @property
    def beat(self) -> Callable[[], None]:
        """A sign of life, while files are read."""


class _Alone:
    rank = 0
    world_size = 1

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def broadcast(self, value: Any) -> Any:
        return value

    def beat(self) -> None:
        pass


ALONE: Ranks = _Alone()
