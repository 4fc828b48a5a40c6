"""metrics/ranks.jsonl: how long each rank worked and how long it waited for the others.

    writer = RankTimeWriter(run, attempt=2, nodes=("n1", "n1", "n2", "n2"))      # on rank 0
    writer.write(global_step=20, num_steps=10, step_time_s=[...], wait_s=[...])  # one number per rank

    times = read_rank_times(run, attempt=2)

Lines of the file, the lists in order of rank:

    {"event": "ranks", "time", "attempt", "nodes": ["n1", ...], "gpu_uuids": ["GPU-...", null, ...]}
        once per attempt
    {"global_step", "attempt", "time", "num_steps", "step_time_s": [...], "wait_s": [...]}
        means over the last `num_steps` steps

`wait_s` is the part of a step in which the rank may have waited for another one: everything but reading its
data and its own forward passes, where no collective runs (ZeRO 3 gathers weights there too, so there it
hides part of a straggler). All ranks of synchronous training have the same step time; a straggler is the
rank that works longest and waits least.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from r1hpc.base.files import append_record
from r1hpc.base.rundir import RunDir
from r1hpc.base.shapes import mistake
from r1hpc.telemetry.lines import RankHead, RankMeans
from r1hpc.telemetry.tail import read_tail


@dataclass(frozen=True)
class RankTimes:
    """The records of one attempt. `nodes` and `gpu_uuids` are empty where the file does not say."""

    nodes: tuple[str, ...]
    gpu_uuids: tuple[str | None, ...]
    step_time_s: tuple[tuple[float, ...], ...]
    """Record by record, one number per rank."""
    wait_s: tuple[tuple[float, ...], ...]

    @property
    def busy_s(self) -> list[tuple[float, ...]]:
        """What each rank did by itself, record by record."""
        pairs = zip(self.step_time_s, self.wait_s, strict=True)
        return [tuple(t - w for t, w in zip(times, waits, strict=True)) for times, waits in pairs]


class RankTimeWriter:
    """Appends the records of one attempt; rank 0 holds the only one."""

    def __init__(
        self, run: RunDir, attempt: int, nodes: Sequence[str], gpu_uuids: Sequence[str | None] = ()
    ) -> None:
        self._path = run.ranks
        self._attempt = attempt
        head = {"event": "ranks", "time": time.time(), "attempt": attempt}
        append_record(self._path, {**head, "nodes": [*nodes], "gpu_uuids": [*gpu_uuids]}, durable=False)

    def write(
        self, *, global_step: int, num_steps: int, step_time_s: Sequence[float], wait_s: Sequence[float]
    ) -> None:
        """The means of the last `num_steps` steps, in order of rank."""
        head = {"global_step": global_step, "attempt": self._attempt, "time": time.time()}
        times = {"num_steps": num_steps, "step_time_s": [*step_time_s], "wait_s": [*wait_s]}
        append_record(self._path, {**head, **times}, durable=False)


def read_rank_times(run: RunDir, attempt: int, max_bytes: int = 2**22) -> RankTimes | None:
    """The newest records of an attempt, at most `max_bytes` of the file; None without any."""
    nodes: tuple[str, ...] = ()
    uuids: tuple[str | None, ...] = ()
    times: list[tuple[float, ...]] = []
    waits: list[tuple[float, ...]] = []
    for record in read_tail(run.ranks, max_bytes).records:
        if record.get("attempt") != attempt:
            continue
        if record.get("event") == "ranks" and mistake(record, RankHead) is None:
            nodes, uuids = tuple(record.get("nodes", ())), tuple(record.get("gpu_uuids", ()))
        elif _is_record(record):
            times.append(tuple(record["step_time_s"]))
            waits.append(tuple(record["wait_s"]))
    return RankTimes(nodes, uuids, tuple(times), tuple(waits)) if times else None


def _is_record(record: dict[str, Any]) -> bool:
    if mistake(record, RankMeans) is not None:
        return False
    return 0 < len(record["step_time_s"]) == len(record["wait_s"])
