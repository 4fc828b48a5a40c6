"""Record and read how long ranks work and wait; read when parts finished and how fast earlier runs saved.

Lines of metrics/ranks.jsonl, the lists in order of rank:

    {"event": "ranks", "time", "attempt", "nodes": ["n1", ...], "gpu_uuids": ["GPU-...", null, ...]}
        once per attempt
    {"global_step", "attempt", "time", "num_steps", "step_time_s": [...], "wait_s": [...]}
        means over the last `num_steps` steps

`wait_s` is the part of a step in which the rank may have waited for another: everything except reading its
data and its own forward passes, which have no collectives (ZeRO 3 also gathers weights there, so it hides
part of a straggler). All ranks of synchronous training have the same step time; a straggler works longest and
waits least.
"""

import statistics
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from r1hpc.base.choose_run import all_runs
from r1hpc.base.errors import StateError
from r1hpc.base.files import append_record
from r1hpc.base.records import mistake
from r1hpc.base.run_dir import RunDir
from r1hpc.base.units import GIB
from r1hpc.plan.save_time import SaveSpeed
from r1hpc.telemetry.records.lines import MetricEvent, RankHead, RankMeans, read_tail

_LEAST_BYTES = GIB // 4
"""Smaller saves take as long as their fsyncs and renames, and do not show the speed."""
_RUNS = 10
_TAIL_BYTES = 64 << 10


@dataclass(frozen=True)
class RankTimes:
    """The records of one attempt. `nodes` and `gpu_uuids` are empty if the file does not have them."""

    nodes: tuple[str, ...]
    gpu_uuids: tuple[str | None, ...]
    step_time_s: tuple[tuple[float, ...], ...]
    """One tuple per record, with one number per rank."""
    wait_s: tuple[tuple[float, ...], ...]

    @property
    def busy_s(self) -> list[tuple[float, ...]]:
        """Return each rank's own work, record by record."""
        pairs = zip(self.step_time_s, self.wait_s, strict=True)
        return [tuple(t - w for t, w in zip(times, waits, strict=True)) for times, waits in pairs]


class RankTimeWriter:
    """Appends the records of one attempt; only rank 0 has one."""

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
        """Write the means of the last `num_steps` steps, in order of rank."""
        head = {"global_step": global_step, "attempt": self._attempt, "time": time.time()}
        times = {"num_steps": num_steps, "step_time_s": [*step_time_s], "wait_s": [*wait_s]}
        append_record(self._path, {**head, **times}, durable=False)


def read_rank_times(run: RunDir, attempt: int, max_bytes: int = 2**22) -> RankTimes | None:
    """Return the newest records of an attempt, at most `max_bytes` of the file; None without any."""
    nodes: tuple[str, ...] = ()
    uuids: tuple[str | None, ...] = ()
    times: list[tuple[float, ...]] = []
    waits: list[tuple[float, ...]] = []
    for record in read_tail(run.ranks, max_bytes).records:
        if record.get("attempt") != attempt:
            continue
        if record.get("event") == "ranks" and mistake(record, RankHead) is None:
            nodes, uuids = tuple(record.get("nodes", ())), tuple(record.get("gpu_uuids", ()))
        elif mistake(record, RankMeans) is None and 0 < len(record["step_time_s"]) == len(record["wait_s"]):
            times.append(tuple(record["step_time_s"]))
            waits.append(tuple(record["wait_s"]))
    return RankTimes(nodes, uuids, tuple(times), tuple(waits)) if times else None


def finish_times(paths: Iterable[Path], start: float, end: float | None = None) -> list[float]:
    """Return the finish times from `start` to `end`, by mtime: each file appears complete."""
    times = []
    for path in paths:
        with suppress(FileNotFoundError):  # used-up files are removed
            times.append(path.stat().st_mtime)
    return sorted(t for t in times if start <= t and (end is None or t <= end))


def measured_save_speed(run_root: Path, num_nodes: int) -> SaveSpeed | None:
    """Return the median of the newest runs' saves, scaled down if `num_nodes` is smaller than theirs."""
    speeds: list[float] = []
    for run in sorted(all_runs(run_root), key=_last_written, reverse=True)[:_RUNS]:
        try:
            records = read_tail(run.events, _TAIL_BYTES).records
        except StateError:  # the caller plans another run
            continue
        for event in records:
            if mistake(event, MetricEvent) is not None or event["event"] != "save":
                continue
            waited_s = event.get("seconds", 0.0) - (event.get("waited_s") or 0.0)
            fewer = min(1.0, num_nodes / (event.get("num_nodes") or num_nodes))
            taken_s = waited_s + (event.get("write_s") or 0.0)
            if (event.get("bytes") or 0) >= _LEAST_BYTES and taken_s > 0:
                speeds.append(fewer * event["bytes"] / GIB / taken_s)
    if not speeds:
        return None
    return SaveSpeed(statistics.median(speeds), f"measured: the median of {len(speeds)} saves in {run_root}")


def _last_written(run: RunDir) -> float:
    try:
        return run.events.stat().st_mtime
    except OSError:
        return 0.0
