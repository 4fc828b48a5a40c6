"""Record how long each rank worked and waited for the others: metrics/ranks.jsonl.

RankTimes(run, attempt, node, group).step(step, step_time_s, own_s)     # on all ranks
"""

import torch

from r1hpc.base.run_dir import RunDir
from r1hpc.telemetry.records.ranks import RankTimeWriter
from r1hpc.train.parallel.distributed import Group

_TIMES_EVERY = 10
"""Steps between two records."""


class RankTimes:
    """Records working and waiting times of each rank every few steps, to find a straggler."""

    def __init__(self, run: RunDir, attempt: int, node: str, group: Group) -> None:
        """Collective."""
        self._group = group
        self._times: list[tuple[float, float]] = []
        self._writer: RankTimeWriter | None = None
        places: list[tuple[str, str | None]] = group.gather((node, _gpu_uuid(group)))
        if group.rank == 0:
            nodes, uuids = zip(*places, strict=True)
            self._writer = RankTimeWriter(run, attempt, nodes, uuids)

    def step(self, global_step: int, step_time_s: float, own_s: float) -> None:
        """Note a finished step. Collective, every _TIMES_EVERY steps.

        Args:
            own_s: part of it in this rank's own work: reading, sampling, its forward passes.
        """
        self._times.append((step_time_s, max(0.0, step_time_s - own_s)))
        if len(self._times) < _TIMES_EVERY:
            return
        means = [sum(column) / len(self._times) for column in zip(*self._times, strict=True)]
        gathered = self._group.gather(means)
        if self._writer is not None:
            times, waits = zip(*gathered, strict=True)
            self._writer.write(
                global_step=global_step, num_steps=len(self._times), step_time_s=times, wait_s=waits
            )
        self._times = []


def _gpu_uuid(group: Group) -> str | None:
    if group.device.type != "cuda":
        return None
    return f"GPU-{torch.cuda.get_device_properties(group.device).uuid}"
