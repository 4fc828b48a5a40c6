"""How fast checkpoints were written under a run root, from earlier saves: for the plan of the next run.

speed = measured_save_speed(run_root, num_nodes=8)      # None: nothing large enough was saved there
"""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from r1hpc.base.choose_run import all_runs
from r1hpc.base.errors import StateError
from r1hpc.base.rundir import RunDir
from r1hpc.base.shapes import mistake
from r1hpc.base.units import GIB
from r1hpc.plan.preemption import SaveSpeed
from r1hpc.telemetry.lines import MetricEvent
from r1hpc.telemetry.metrics import events_path
from r1hpc.telemetry.tail import read_tail

_LEAST_BYTES = GIB // 4
"""Smaller saves take as long as their fsyncs and renames do, and say nothing of the speed."""
_RUNS = 10
_TAIL_BYTES = 64 << 10


def measured_save_speed(run_root: Path, num_nodes: int) -> SaveSpeed | None:
    """The median of the newest runs' saves, scaled down where `num_nodes` are fewer than wrote them."""
    speeds: list[float] = []
    for run in sorted(all_runs(run_root), key=_last_written, reverse=True)[:_RUNS]:
        for event in _newest_events(run):
            speeds += _speed_of(event, num_nodes)
    if not speeds:
        return None
    return SaveSpeed(statistics.median(speeds), f"measured: the median of {len(speeds)} saves in {run_root}")


def _newest_events(run: RunDir) -> list[dict[str, Any]]:
    """Of a run that cannot be read there are none: this is about another one."""
    try:
        records = read_tail(events_path(run), _TAIL_BYTES).records
    except StateError:
        return []
    return [event for event in records if mistake(event, MetricEvent) is None]


def _speed_of(event: dict[str, Any], num_nodes: int) -> Iterator[float]:
    """GiB/s of a save; nothing for what is no save, or too small a one."""
    if event["event"] != "save" or (event.get("bytes") or 0) < _LEAST_BYTES:
        return
    waited_s = event.get("seconds", 0.0) - (event.get("waited_s") or 0.0)
    fewer = min(1.0, num_nodes / (event.get("num_nodes") or num_nodes))
    taken_s = waited_s + (event.get("write_s") or 0.0)
    if taken_s > 0:
        yield fewer * event["bytes"] / GIB / taken_s


def _last_written(run: RunDir) -> float:
    try:
        return events_path(run).stat().st_mtime
    except OSError:
        return 0.0
