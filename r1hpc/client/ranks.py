"""Gather, broadcast and sum over a script's ranks by torch.distributed. run.py needs it for several ranks."""

import datetime
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from r1hpc.base.errors import UsageError

_TIMEOUT = datetime.timedelta(hours=24)
"""A rank may verify, or evaluate, for long; the run's own watchdog ends a hang."""


class TorchRanks:
    """A gloo group beside the script's own, so that agreeing never waits for a GPU."""

    def __init__(self, world_size: int) -> None:
        if not dist.is_initialized():
            raise UsageError(
                f"this job has {world_size} ranks: call init_process_group() of torch.distributed first"
            )
        if dist.get_world_size() != world_size:
            raise UsageError(
                f"this job has {world_size} ranks, and torch.distributed has {dist.get_world_size()}: "
                "initialise it by env://, whose variables are set"
            )
        self.rank, self.world_size = dist.get_rank(), world_size
        self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT)

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, in rank order. Pickles: for small messages."""
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value, group=self._group)
        return found

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def sum(self, values: list[float]) -> Any:
        """Begin to sum over the ranks, in another thread; return `is_done()` and `result()`, which waits."""
        summed = torch.tensor(values, dtype=torch.float64)
        work = dist.all_reduce(summed, group=self._group, async_op=True)

        def result() -> list[float]:
            work.wait()
            found: list[float] = summed.tolist()
            return found

        return SimpleNamespace(is_done=work.is_completed, result=result)

    def beat(self) -> None:
        """Do nothing: the rank sees by its script's files that it lives."""
