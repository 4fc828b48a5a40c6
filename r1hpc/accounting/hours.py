"""Define an allocation, and sum the GPU-hours of many: by user, account, QOS, state, day, run and so on.

gpu_hours = GPUs x allocated wall hours, busy or idle. An allocation over midnight is split between its days;
days are local, as in sacct. A running one counts until now. A `Selection` decides which records count, and
which part of them.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from r1hpc.base.choose_run import full_name
from r1hpc.base.errors import UsageError
from r1hpc.base.names import is_among, nearest
from r1hpc.slurm.gres import Shares
from r1hpc.slurm.sacct import JobRecord, SetAside
from r1hpc.slurm.shell.endings import BY_SACCT
from r1hpc.telemetry.diagnosis.summary import RunSummary

UNKNOWN = "unknown"
KEYS = ("user", "account", "state", "qos", "partition", "cluster")
BILLED_KEYS = ("user", "account")
RUN_KEYS = ("run", "stage")
"""Known only for jobs of known runs: totals have them if at least one allocation does."""


@dataclass(frozen=True)
class Allocation:
    """GPUs held from `start` to `end` (Unix seconds), and who held them."""

    start: float
    end: float
    gpus: float
    nodes: int = 0
    user: str = UNKNOWN
    account: str = UNKNOWN
    state: str = UNKNOWN
    qos: str = UNKNOWN
    partition: str = UNKNOWN
    cluster: str = UNKNOWN
    gpu_types: tuple[tuple[str, float], ...] = ()
    """(type, GPUs), as far as known."""
    billing: int = 0
    """The billing TRES; 0: unknown."""
    run: str = UNKNOWN
    stage: str = UNKNOWN

    @property
    def seconds(self) -> float:
        return max(0.0, self.end - self.start)

    @property
    def hours(self) -> float:
        return self.seconds / 3600


def to_allocation(record: JobRecord) -> Allocation:
    """Convert a sacct record. A running job counts its time so far; suspended time does not count."""
    start = record.start or 0.0
    return Allocation(
        start=start,
        end=start + record.elapsed_s,
        gpus=record.gpus,
        nodes=record.nodes,
        gpu_types=record.gpu_types,
        billing=record.billing,
        **{key: getattr(record, key) or UNKNOWN for key in KEYS},
    )


def own_allocations(summary: RunSummary, user: str) -> list[Allocation]:
    """Return what a run held by its own record. Slurm's allocations are some seconds longer."""
    return [
        Allocation(
            start=a.attempt.start,
            end=a.end,
            gpus=a.attempt.gpus,
            nodes=a.attempt.nodes,
            user=user,
            state=a.cause,
            run=full_name(summary.run),
            stage=summary.stage,
        )
        for a in summary.attempts
    ]


def fold_hours(allocations: Iterable[Allocation]) -> dict[str, Any]:
    """Return {total, node_hours, by_user, by_account, by_state, by_qos, by_partition, by_cluster,
    by_gpu_type, by_cause, by_day, by_month}, in hours.

    Known runs add by_run and by_stage, the billing TRES adds billing_hours and billing_by_user, _account.
    by_day is keyed YYYY-MM-DD, and has the days on which a GPU was held; by_cause see `cause_of`. Whole
    seconds are summed exactly and divided once, at the end.
    """
    keys = (*KEYS, "gpu_type", "day", *RUN_KEYS)
    by: dict[str, dict[str, float]] = {key: defaultdict(float) for key in keys}
    billed: dict[str, dict[str, float]] = {key: defaultdict(float) for key in BILLED_KEYS}
    total = node_seconds = 0.0
    for allocation in allocations:
        gpu_seconds = allocation.gpus * allocation.seconds
        total += gpu_seconds
        node_seconds += allocation.nodes * allocation.seconds
        for key in (*KEYS, *RUN_KEYS):
            by[key][getattr(allocation, key) or UNKNOWN] += gpu_seconds
        for key in BILLED_KEYS if allocation.billing and allocation.seconds else ():
            billed[key][getattr(allocation, key)] += allocation.billing * allocation.seconds
        named = sum(gpus for _, gpus in allocation.gpu_types)
        for kind, gpus in (*allocation.gpu_types, (UNKNOWN, allocation.gpus - named)):
            if gpus > 1e-9:
                by["gpu_type"][kind] += gpus * allocation.seconds
        days = split_days(allocation.start, allocation.end) if allocation.gpus else ()
        for day, seconds in days:
            by["day"][day] += allocation.gpus * seconds
    return in_hours(total, node_seconds, by, billed)


def in_hours(
    gpu_seconds: float,
    node_seconds: float,
    by: dict[str, dict[str, float]],
    billed: dict[str, dict[str, float]],
) -> dict[str, Any]:
    """Return the dict of `fold_hours` from sums in seconds, by key."""
    causes, months = _joined(by["state"], cause_of), _joined(by["day"], lambda day: day[:7])
    by = {**by, "cause": causes, "month": months}
    hours: dict[str, Any] = {"total": gpu_seconds / 3600, "node_hours": node_seconds / 3600}
    if billed_seconds := sum(billed["user"].values()):
        hours |= {"billing_hours": billed_seconds / 3600}
        hours |= {f"billing_by_{key}": _sorted_hours(sums) for key, sums in billed.items()}
    named = {key: sums for key, sums in by.items() if key not in RUN_KEYS or set(sums) - {UNKNOWN}}
    return hours | {f"by_{key}": _sorted_hours(sums) for key, sums in named.items()}


def cause_of(state: str) -> str:
    """Return r1hpc's cause for a state of sacct: `preempted` for REQUEUED; else the state in lower case."""
    ending = BY_SACCT.get(state)
    return (ending.cause if ending else "") or state.lower()


def _sorted_hours(sums: Mapping[str, float]) -> dict[str, float]:
    return {name: seconds / 3600 for name, seconds in sorted(sums.items())}


def _joined(sums: Mapping[str, float], rule: Callable[[str], str]) -> dict[str, float]:
    joined: dict[str, float] = defaultdict(float)
    for name, seconds in sums.items():
        joined[rule(name)] += seconds
    return joined


def in_words(set_aside: SetAside, unshared: Collection[str]) -> dict[str, Any]:
    """Return what the sums do not hold: rows set aside, shards of unknown size; empty if nothing."""
    rows = {"set_aside": {"rows": set_aside.count, "first": set_aside.first}} if set_aside.count else {}
    return rows | ({"unknown_shares": sorted(unshared)} if unshared else {})


def split_days(start: float, end: float) -> Iterator[tuple[str, float]]:
    """Yield (YYYY-MM-DD, seconds in that local day) from `start` to `end`; a day may have 23 or 25 hours."""
    while start < end:
        day = datetime.fromtimestamp(start).date()
        midnight = midnight_before(start, 1)
        yield day.isoformat(), min(end, midnight) - start
        start = midnight


def midnight_before(moment: float, days: int = 0) -> int:
    """Return the local midnight before `moment`, or that many days later, in Unix seconds."""
    day = datetime.fromtimestamp(moment).date() + timedelta(days=days)
    return int(datetime.combine(day, datetime.min.time()).timestamp())


@dataclass(frozen=True)
class Selection:
    """Select records by owner and time: None selects all."""

    user: str | None = None
    """One, or several with commas between them; so for accounts."""
    account: str | None = None
    start: float | None = None
    """Unix seconds; what an allocation held earlier does not count."""
    end: float | None = None
    runs: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Job ID -> (run, stage), for jobs of known runs."""
    clusters: Mapping[str, str | None] = field(default_factory=dict)
    """Job ID -> the cluster it ran on, where known: a job of another cluster is another job."""
    shares: Shares = field(default_factory=dict)
    """Shards and MPS parts that make a GPU."""
    by: tuple[str, ...] = ()
    """Keys of `report --by`, for sums by all of them together; see accounting.groups."""

    @property
    def columns(self) -> list[str]:
        """Return the sacct columns that the selection needs."""
        chosen = {"User": self.user, "Account": self.account}
        return [name for name, value in chosen.items() if value is not None]

    def run_of(self, record: JobRecord) -> tuple[str, str]:
        """Return (run, stage) of a record."""
        cluster = self.clusters.get(record.job_id)
        if cluster is not None and record.cluster not in ("", cluster):
            return UNKNOWN, UNKNOWN
        return self.runs.get(record.job_id, (UNKNOWN, UNKNOWN))

    def refuse_unknown(self, key: str, names: Collection[str], source: str) -> None:
        """Raise UsageError if a selected `user` or `account` is not among the names of started jobs."""
        for name in getattr(self, key).split(","):
            if name.strip() and not any(is_among(each, name) for each in names):
                near = nearest(name.strip().lower(), {each.lower() for each in names} - {UNKNOWN})
                raise UsageError(f"{source} has no started job of {key} {name.strip()!r}{near}")

    def clip(self, allocations: Iterable[Allocation]) -> list[Allocation]:
        first = -math.inf if self.start is None else self.start
        last = math.inf if self.end is None else self.end
        clipped = [
            replace(a, start=max(a.start, first), end=min(a.end, last))
            for a in allocations
            if is_among(a.user, self.user) and is_among(a.account, self.account)
        ]
        if self.start is None and self.end is None:
            return clipped
        return [a for a in clipped if a.end > a.start]
