"""The ledger: what a run cost, attempt by attempt, and how that time was spent. Every command asks it.

    ledger = open_ledger(run, time.time())
    ledger.split().in_hours()      # {useful, lost, startup, save, idle, allocated}, GPU-hours
    ledger.used, ledger.unit       # the same in GPU-hours, of a run without GPUs in node-hours
    ledger.queue_s, ledger.source

    ledgers, notes = survey(run_root, now)     # of all runs; those that cannot be read are left out, in words

What was held is Slurm's to say, one allocation for each attempt (`sacct -D`), once any command has learnt it
(slurm_records); what happened in it is the run's own record (telemetry.summary). Where Slurm does not know an
attempt the run's record is all there is, and `source` says so: it begins when the attempt does, some seconds
after the allocation. In integer milliseconds, so that

    useful + lost + startup + save + idle == allocated

to the last one. Waiting in the queue is no GPU-hour and stands beside them.
"""

import pwd
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from r1hpc.accounting.forecast import NOTHING, Spread, by_progress, remaining, until_limit
from r1hpc.accounting.slurm_records import (
    SlurmRecords,
    ask_slurm,
    is_open,
    kept_records,
    learn,
    own_records,
    record_of,
    to_allocation,
)
from r1hpc.attempt.state import Situation, State, all_slurm_jobs, look
from r1hpc.base.choose_run import all_runs, full_name, unreadable
from r1hpc.base.errors import R1hpcError, StateError
from r1hpc.base.files import read_json
from r1hpc.base.rundir import RunDir
from r1hpc.slurm.accounting import JobRecord
from r1hpc.telemetry.hours import Allocation
from r1hpc.telemetry.summary import AttemptSummary, RunSummary, keep_cut, kept_cut, summarise_run
from r1hpc.telemetry.timeline import Split, milliseconds

PARTS = {"useful": "useful", "lost": "lost", "start-up": "startup", "save": "save", "idle": "idle"}
"""Where the hours of an attempt go, and the field of Split; they add up to all it held."""
_HOUR_MS = 3_600_000
_LEAST_PROGRESS = 0.05
"""Below this share of its steps a run's own speed says less than its estimate."""
_WAITING = (State.queued, State.requeued)


@dataclass(frozen=True)
class AttemptCost:
    """One allocation: who held what, and how its time was spent."""

    allocation: Allocation
    inside: tuple[AttemptSummary, ...]
    """The attempts that began in it: one; none where Slurm took it away before one could."""
    wall: Split
    by_slurm: bool
    width: int
    """GPUs, or nodes of a run without any: what its wall time is multiplied by."""
    wait_s: float | None
    """In the queue before it."""

    @property
    def attempt(self) -> int:
        """The attempt's number; 0: none began."""
        return self.inside[0].attempt.attempt if self.inside else 0

    @property
    def cause(self) -> str:
        """What ended it; `running` while nothing has."""
        if not self.inside:
            return self.allocation.state.lower()
        cause = self.inside[-1].attempt.cause
        return cause.value if cause else "running"

    @property
    def start(self) -> float:
        return self.allocation.start

    @property
    def end(self) -> float:
        return self.allocation.end

    @property
    def hours(self) -> float:
        """GPU-hours, or node-hours of a run without GPUs."""
        return self.width * self.wall.allocated / _HOUR_MS

    @property
    def parts(self) -> dict[str, float]:
        """The hours by PARTS."""
        return {part: self.width * getattr(self.wall, name) / _HOUR_MS for part, name in PARTS.items()}

    def to_json(self) -> dict[str, Any]:
        held = self.allocation
        return {
            "start": held.start,
            "end": held.end,
            "gpus": held.gpus,
            "nodes": held.nodes,
            "state": held.state,
            "attempts": [each.attempt.attempt for each in self.inside],
            "split": (self.wall * held.gpus).in_hours(),
        }


@dataclass(frozen=True)
class RunLedger:
    """One run: planned, used, how, and still to come."""

    run: RunDir
    situation: Situation
    summary: RunSummary
    attempts: tuple[AttemptCost, ...]
    """Oldest first."""
    user: str
    unit: str
    """GPU-hours or node-hours."""
    source: str
    """`sacct`, `run` for the run's own record, or `sacct and run`."""
    queue_s: float
    """Seconds in the queue, of all attempts and of what waits now."""
    planned: Spread | None = None
    """The estimate stored at submission, in hours of the unit; None: there is none, or only a part of the
    run's time is selected."""
    num_steps: int | None = None
    ceiling: float | None = None
    """GPUs x time limit of one attempt, in hours of the unit."""
    waiting_since: float | None = None
    jobs: tuple[str, ...] = ()
    """Every Slurm job id it has had."""
    note: str = ""
    """Why nothing, or not all, is by sacct."""

    @property
    def run_id(self) -> str:
        """CHAIN/STAGE for a stage of a chain."""
        return full_name(self.run)

    @property
    def stage(self) -> str:
        return self.summary.stage

    @property
    def job_name(self) -> str:
        return self.summary.job_name

    @property
    def state(self) -> str:
        return self.situation.state.value

    @property
    def is_live(self) -> bool:
        return self.situation.state in (State.running, *_WAITING)

    @property
    def start(self) -> float:
        """When its first attempt began; before that when it was submitted, or its folder was made."""
        if self.attempts:
            return self.attempts[0].start
        return self.waiting_since or self.run.path.stat().st_mtime

    @property
    def end(self) -> float:
        return self.attempts[-1].end if self.attempts else self.start

    def split(self) -> Split:
        """GPU-milliseconds."""
        return sum((each.wall * each.allocation.gpus for each in self.attempts), Split())

    def node_split(self) -> Split:
        """Node-milliseconds: what a CPU run costs."""
        return sum((each.wall * each.allocation.nodes for each in self.attempts), Split())

    def wall(self) -> Split:
        """Wall milliseconds of all attempts."""
        return sum((each.wall for each in self.attempts), Split())

    @property
    def gpu_hours(self) -> float:
        return self.split().allocated / _HOUR_MS

    @property
    def used(self) -> float:
        """Hours of the unit."""
        return self._held.allocated / _HOUR_MS

    @property
    def parts(self) -> dict[str, float]:
        """Hours of the unit by PARTS."""
        return {part: getattr(self._held, name) / _HOUR_MS for part, name in PARTS.items()}

    @property
    def _held(self) -> Split:
        return self.split() if self.unit == "GPU-hours" else self.node_split()

    @property
    def allocations(self) -> list[Allocation]:
        return [each.allocation for each in self.attempts]

    @property
    def own(self) -> list[Allocation]:
        """What the run itself says it held."""
        return self.summary.allocations(self.user)

    @property
    def notes(self) -> tuple[str, ...]:
        """What of its folder could not be read."""
        bad = self.summary.num_bad_lines
        lines = (f"{self.run_id}: {bad} lines of {self.run.train_metrics} hold no step",) if bad else ()
        return (*self.summary.history.notes, *lines)

    @property
    def share_done(self) -> float | None:
        last = self.summary.last_step
        return last / self.num_steps if last and self.num_steps else None

    @property
    def to_come(self) -> Spread:
        """Hours that the run will still use."""
        if not self.is_live:
            return NOTHING
        if self.share_done is not None and self.used > 0 and self.share_done >= _LEAST_PROGRESS:
            return by_progress(self.used, min(1.0, self.share_done))
        if self.planned is not None:
            return remaining(self.planned, self.used)
        return NOTHING if self.ceiling is None else until_limit(max(0.0, self.ceiling - self._used_now))

    @property
    def _used_now(self) -> float:
        """By the attempt that runs: the time limit is of one."""
        is_running = self.situation.state is State.running and self.attempts
        return self.attempts[-1].hours if is_running else 0.0

    @property
    def ratio(self) -> float | None:
        """Used over planned (P50), once the run finished."""
        known = self.planned is not None and self.planned.p50 > 0 and self.used > 0
        finished = self.situation.state is State.finished
        return self.used / self.planned.p50 if finished and known and self.planned else None

    @property
    def mfu(self) -> float | None:
        """Mean over the steps that lasted, by their time."""
        return self.summary.mfu

    @property
    def gap(self) -> "Gap | None":
        """Why Slurm's hours differ from the run's own; None: nothing is by Slurm."""
        return None if self.source == "run" else _gap(self.attempts)

    def split_of(self, each: AttemptSummary) -> Split:
        """Wall milliseconds of one attempt; nothing where its time is not selected.

        Those of its allocation; where several attempts shared one, those of its own record.
        """
        cost = next((cost for cost in self.attempts if each in cost.inside), None)
        if cost is None:
            return Split()
        return cost.wall if len(cost.inside) == 1 else each.split

    def cut(
        self, start: float | None, end: float | None, user: str | None = None, account: str | None = None
    ) -> "RunLedger":
        """What was held between two times (Unix seconds), by this user and for this account."""
        chosen = [
            a
            for a in self.attempts
            if user in (None, a.allocation.user) and account in (None, a.allocation.account)
        ]
        if start is None and end is None:
            return replace(self, attempts=tuple(chosen))
        parts = [part for each in chosen if (part := _within(self.summary, each, start, end)) is not None]
        return replace(self, attempts=tuple(parts), planned=None)

    def to_json(self) -> dict[str, Any]:
        return {
            "planned": None if self.planned is None else self.planned.to_json(),
            "split": {**self.split().in_hours(), "queue_s": self.queue_s},
            "node_split": self.node_split().in_hours(),
            "allocations": [each.to_json() for each in self.attempts],
        }


@dataclass(frozen=True)
class Gap:
    """Why sacct's GPU-hours differ from the run's own, in GPU-hours."""

    before: float = 0.0
    """From the start of the allocation until the attempt began: prolog, imports, the batch script."""
    after: float = 0.0
    """From the attempt's end until the allocation's: the batch script's last lines, the epilog."""
    without_attempt: float = 0.0
    """Allocations in which no attempt began."""


def open_ledger(run: RunDir, now: float, records: Iterable[JobRecord] = (), note: str = "") -> RunLedger:
    """The ledger of one run, by all that any command has learnt of it.

    Args:
        records: what sacct or a file of it says now; kept, for the other commands.
        note: why sacct said nothing, if somebody asked it.

    Raises:
        StateError: the folder cannot be read; says what is wrong with it.
    """
    try:
        return _open(run, now, records, note)
    except R1hpcError:
        raise
    except OSError as error:
        raise StateError(f"{run.path} cannot be read: {error.strerror or error}") from None
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError) as error:
        raise StateError(f"{run.path} is damaged: {type(error).__name__}: {error}") from None


def open_ledgers(
    runs: Sequence[RunDir], now: float, records: Sequence[JobRecord] = (), ask: bool = True
) -> tuple[list[RunLedger], list[str]]:
    """The ledgers of many runs, and a note on each that is left out or cannot be read whole.

    Args:
        ask: ask sacct, for a bounded time, of ended attempts that nobody has learnt of yet.
    """
    ledgers, notes = [], []
    for run in runs:
        try:
            ledgers.append(open_ledger(run, now, records))
        except R1hpcError as error:
            notes.append(f"{full_name(run)} is left out: {error}")
    if ask:
        ledgers = completed(ledgers, now)
    return ledgers, [*notes, *(note for ledger in ledgers for note in ledger.notes)]


def survey(
    run_root: Path, now: float, records: Sequence[JobRecord] = (), ask: bool = True
) -> tuple[list[RunLedger], list[str]]:
    """`open_ledgers` for all runs under a run root, the newest first, and notes on those left out."""
    ledgers, notes = open_ledgers(all_runs(run_root), now, records, ask)
    return ledgers, [*notes, *unreadable(run_root)]


def completed(ledgers: Sequence[RunLedger], now: float, timeout_s: float = 10.0) -> list[RunLedger]:
    """The same, once sacct was asked of ended attempts that nobody has learnt of yet."""
    asked = [(each.run, each.jobs, each.summary.history) for each in ledgers if each.jobs]
    found, _ = ask_slurm(asked, now, timeout_s)
    jobs = {record.job_id for record in found}
    return [open_ledger(each.run, now, found) if jobs & set(each.jobs) else each for each in ledgers]


def clip(ledgers: Sequence[RunLedger], start: float | None, end: float | None) -> list[RunLedger]:
    """What was held between two times; runs that held nothing then are left out."""
    parts = [ledger.cut(start, end) for ledger in ledgers]
    return [part for part in parts if part.attempts]


def owner(run: RunDir) -> str:
    """The user whose folder it is."""
    uid = run.path.stat().st_uid
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def read_estimate(path: Path, key: str = "gpu_hours") -> Spread | None:
    """The hours stored at submission: {"gpu_hours": {"p10", "p50", "p90"}}; None where there are none.

    Args:
        key: gpu_hours, or node_hours of a CPU run.
    """
    found = _read(path).get(key)
    try:
        return Spread(*(float(found[key]) for key in ("p10", "p50", "p90"))) if found else None
    except (KeyError, TypeError, ValueError, AssertionError):
        return None


def _open(run: RunDir, now: float, given: Iterable[JobRecord], note: str) -> RunLedger:
    situation, user, jobs = look(run), owner(run), tuple(all_slurm_jobs(run))
    history = situation.history
    is_running = situation.state is State.running
    summary = summarise_run(run, history, now, is_running)
    mine = own_records(given, jobs, history)
    kept = learn(run, mine, now) if mine else kept_records(run)
    records = tuple(own_records(kept.records, jobs, history))
    plan = _read(run.plan)
    on_cpu = not any(a.attempt.gpus for a in summary.attempts)
    on_cpu = on_cpu and (bool(summary.attempts) or plan.get("gpu_hours_ceiling") == 0)
    costs = _costs(summary, replace(kept, records=records), now if is_running else None, user, on_cpu)
    submitted = sorted(float(s["time"]) for s in history.submissions if "time" in s)
    by_slurm = {each.by_slurm for each in costs}
    ledger = RunLedger(
        run=run,
        situation=situation,
        summary=summary,
        attempts=costs,
        user=user,
        unit="node-hours" if on_cpu else "GPU-hours",
        source="sacct and run" if len(by_slurm) == 2 else "sacct" if True in by_slurm else "run",
        queue_s=0.0,
        planned=read_estimate(run.path / "estimate.json", "node_hours" if on_cpu else "gpu_hours"),
        num_steps=_positive(plan.get("num_steps")),
        ceiling=_positive(plan.get("node_hours_ceiling" if on_cpu else "gpu_hours_ceiling")),
        waiting_since=submitted[-1] if submitted else None,
        jobs=jobs,
    )
    waiting = [record for record in mine if record.start is None]
    said = "its job has not started" if waiting and not note else note
    return _with_waits(replace(ledger, note=_note(ledger, said)), records, waiting, submitted, now)


def _costs(
    summary: RunSummary, kept: SlurmRecords, now: float | None, user: str, on_cpu: bool
) -> tuple[AttemptCost, ...]:
    """Each allocation with the attempts that began in it; an attempt that Slurm does not know is its own."""
    inside: dict[JobRecord, list[AttemptSummary]] = {record: [] for record in kept.records}
    alone = []
    for each, own in zip(summary.attempts, summary.allocations(user), strict=True):
        record = record_of(kept.records, each.attempt.job_id, each.attempt.start, each.end)
        if record is None:
            alone.append((own, (each,), False))
        else:
            inside[record].append(each)
    held = [
        (_held(record, kept.seen, attempts, now, summary), tuple(attempts), True)
        for record, attempts in inside.items()
    ]
    return tuple(
        AttemptCost(
            allocation=allocation,
            inside=attempts,
            wall=_wall(summary, attempts, allocation, by_slurm),
            by_slurm=by_slurm,
            width=allocation.nodes if on_cpu else allocation.gpus,
            wait_s=None,
        )
        for allocation, attempts, by_slurm in sorted([*held, *alone], key=lambda one: one[0].start)
    )


def _held(
    record: JobRecord, seen: float, inside: Sequence[AttemptSummary], now: float | None, summary: RunSummary
) -> Allocation:
    """A record as an allocation of the run. One that had not ended when it was seen has gone on since."""
    held = replace(to_allocation(record), run=summary.run_id, stage=summary.stage)
    if not is_open(record):
        return held
    is_alive = now is not None and bool(inside) and inside[-1] is summary.attempts[-1]
    since = max(0.0, (now or seen) - seen) if is_alive else 0.0
    ended = max((each.end for each in inside if each.attempt.cause is not None), default=0.0)
    return replace(held, end=max(held.end + since, ended))


def _wall(summary: RunSummary, inside: Sequence[AttemptSummary], held: Allocation, by_slurm: bool) -> Split:
    """How the time of an allocation was spent: before its attempts start-up, after and between them idle."""
    begin = milliseconds(held.start)
    end = max(begin, milliseconds(held.end))
    if not inside:
        return Split(idle=end - begin)
    own = sum((each.split for each in inside), Split())
    first, last = milliseconds(inside[0].attempt.start), milliseconds(inside[-1].end)
    if begin <= first and last <= end and own.allocated <= last - first:
        idle = (end - begin) - (first - begin) - own.allocated
        return own + Split(startup=first - begin, idle=idle)
    # Two clocks that differ: the allocation ends, or begins, within an attempt.
    kept = kept_cut(summary, begin, end)
    if kept is not None:
        return kept
    split = summary.paint(inside, held.start, begin, end)
    if by_slurm and all(each.attempt.cause is not None for each in inside):
        keep_cut(summary, begin, end, split)
    return split


def _within(
    summary: RunSummary, cost: AttemptCost, start: float | None, end: float | None
) -> AttemptCost | None:
    """The part of it between two times; None: there is none."""
    held = cost.allocation
    first = held.start if start is None else max(held.start, start)
    last = held.end if end is None else min(held.end, end)
    if last <= first:
        return None
    if (first, last) == (held.start, held.end):
        return cost
    wall = summary.paint(cost.inside, held.start, milliseconds(first), milliseconds(last))
    return replace(cost, allocation=replace(held, start=first, end=last), wall=wall)


def _with_waits(
    ledger: RunLedger,
    records: Sequence[JobRecord],
    waiting: Sequence[JobRecord],
    submitted: Sequence[float],
    now: float,
) -> RunLedger:
    """By sacct's Eligible and Start where they are known of every attempt, else by the run folder."""
    eligible = {(r.job_id, r.start): r.eligible for r in records}
    if ledger.source == "sacct" and all(value is not None for value in eligible.values()):
        # Costs by Slurm are in the order of its records.
        waits: list[float | None] = [max(0.0, (r.start or 0.0) - (r.eligible or 0.0)) for r in records]
        rest = sum(max(0.0, (r.end or now) - r.eligible) for r in waiting if r.eligible is not None)
    else:
        waits, rest = _own_waits(ledger.attempts, submitted), 0.0
        since = max([*submitted[-1:], *(each.end for each in ledger.attempts[-1:])], default=None)
        if ledger.situation.state in _WAITING and since is not None:
            rest = max(0.0, now - since)
    costs = tuple(replace(each, wait_s=wait) for each, wait in zip(ledger.attempts, waits, strict=True))
    return replace(ledger, attempts=costs, queue_s=sum(wait or 0.0 for wait in waits) + rest)


def _own_waits(costs: Sequence[AttemptCost], submitted: Sequence[float]) -> list[float | None]:
    """Seconds before each attempt since it was asked for, by its submission or the end of the one before."""
    waits: list[float | None] = []
    before: list[float] = []
    for cost in costs:
        began = cost.inside[0].attempt.start if cost.inside else cost.start
        since = max([*before, *(time for time in submitted if time <= began)], default=None)
        waits.append(None if since is None else max(0.0, began - since))
        before = [cost.inside[-1].end if cost.inside else cost.end]
    return waits


def _note(ledger: RunLedger, note: str) -> str:
    """Which attempts Slurm has no record of, where it has some; why it has none."""
    if ledger.source == "run":
        return note if ledger.jobs or note else "no job of this run was Slurm's"
    alone = [each for cost in ledger.attempts if not cost.by_slurm for each in cost.inside]
    if not alone:
        return ""
    numbers = ", ".join(str(each.attempt.attempt) for each in alone)
    jobs = ", ".join(dict.fromkeys(str(each.attempt.job_id) for each in alone))
    return f"sacct has no record of attempt {numbers} (job {jobs}): the run's own record counts for it"


def _gap(costs: Sequence[AttemptCost]) -> Gap:
    """What lies around the attempts in Slurm's allocations, added up."""
    before = after = without = 0.0
    for cost in costs:
        held = cost.allocation
        if not cost.by_slurm:
            continue
        if cost.inside:
            before += held.gpus * (cost.inside[0].attempt.start - held.start) / 3600
            after += held.gpus * (held.end - cost.inside[-1].end) / 3600
        else:
            without += held.gpus * held.hours
    return Gap(before, after, without)


def _read(path: Path) -> dict[str, Any]:
    """A JSON object of the run folder; empty where there is none, or another program's."""
    try:
        value = read_json(path)
    except (FileNotFoundError, StateError):
        return {}
    return value if isinstance(value, dict) else {}


def _positive(value: Any) -> Any:
    return value if isinstance(value, int | float) and value > 0 else None
