"""GPU-hours by user, account, state, QOS, partition and day, from any list of allocations.

gpu_hours = GPUs x allocated wall hours, busy or idle. An allocation that runs over midnight is split
between its days; days are local ones, as in sacct. One that still runs counts until now.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Allocation:
    """GPUs held from `start` to `end` (Unix seconds), and who held them."""

    start: float
    end: float
    gpus: int
    nodes: int = 0
    user: str = UNKNOWN
    account: str = UNKNOWN
    state: str = UNKNOWN
    qos: str = UNKNOWN
    partition: str = UNKNOWN

    @property
    def hours(self) -> float:
        return max(0.0, self.end - self.start) / 3600


def fold_hours(allocations: Iterable[Allocation]) -> dict[str, Any]:
    """{total, node_hours, by_user, by_account, by_state, by_qos, by_partition, by_day}, in hours.

    by_day is keyed YYYY-MM-DD. All but node_hours are GPU-hours.
    """
    keys = ("user", "account", "state", "qos", "partition")
    by: dict[str, dict[str, float]] = {key: defaultdict(float) for key in (*keys, "day")}
    total = node_hours = 0.0
    for allocation in allocations:
        gpu_hours = allocation.gpus * allocation.hours
        total += gpu_hours
        node_hours += allocation.nodes * allocation.hours
        for key in keys:
            by[key][getattr(allocation, key) or UNKNOWN] += gpu_hours
        for day, seconds in split_days(allocation.start, allocation.end):
            by["day"][day] += allocation.gpus * seconds / 3600
    folded = {f"by_{key}": dict(sorted(hours.items())) for key, hours in by.items()}
    return {"total": total, "node_hours": node_hours, **folded}


def split_days(start: float, end: float) -> Iterator[tuple[str, float]]:
    """(YYYY-MM-DD, seconds in that local day) from `start` to `end`; a day may have 23 or 25 hours."""
    while start < end:
        day = datetime.fromtimestamp(start).date()
        midnight = datetime.combine(day + timedelta(days=1), datetime.min.time()).timestamp()
        yield day.isoformat(), min(end, midnight) - start
        start = midnight
