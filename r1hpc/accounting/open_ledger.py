"""Open ledgers: join Slurm's allocations of a run with the run's own record of what it did in them.

Slurm decides what was held, one allocation for each attempt (`sacct -D`), once any command has learnt it
(attempt.state.slurm_records). The run's own record tells what happened in it (telemetry.diagnosis.summary).
If Slurm does not know an attempt, only the run's record counts, and `source` says so; that record begins
some seconds after the allocation. From a ledger come `report_run` for `report`, and `measured_run` for
`estimate --method measured`.
"""

import pwd
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

from r1hpc.accounting.hours import Allocation, fold_hours, own_allocations, to_allocation
from r1hpc.accounting.ledger import WAITING, AttemptCost, RunLedger
from r1hpc.attempt.state.slurm_records import (
    SlurmRecords,
    ask_slurm,
    is_open,
    kept_records,
    learn,
    own_records,
    record_of,
)
from r1hpc.attempt.state.state import State, read_situation, slurm_jobs
from r1hpc.attempt.workload import workload_of
from r1hpc.base.choose_run import all_runs, full_name, unreadable
from r1hpc.base.errors import R1hpcError, StateError, UsageError
from r1hpc.base.files import read_json
from r1hpc.base.run_dir import RunDir
from r1hpc.config.load import read
from r1hpc.config.stages import counts_of, is_rl
from r1hpc.plan.hours.estimate import Estimate, measured_estimate
from r1hpc.plan.hours.spread import Spread
from r1hpc.plan.run import RunPlan
from r1hpc.plan.topology.batch import updates_per_rollout
from r1hpc.slurm.sacct import JobRecord
from r1hpc.telemetry.diagnosis.summary import (
    AttemptSummary,
    RunSummary,
    split_seconds,
    store_split,
    stored_split,
    summarise_run,
)
from r1hpc.telemetry.diagnosis.timeline import Split, milliseconds
from r1hpc.telemetry.records.lines import PlanFacts
from r1hpc.telemetry.records.metrics import Audit, audit_ledger


def open_ledger(run: RunDir, now: float, records: Iterable[JobRecord] = (), note: str = "") -> RunLedger:
    """Open the ledger of one run, from everything that any command has learnt about it.

    Raise StateError with the problem if the folder cannot be read.

    Args:
        records: what sacct or a file of it reports now; kept for the other commands.
        note: why sacct gave nothing, if it was asked.
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
    """Open the ledgers of many runs; add a note on each that is left out or read only in part.

    Args:
        ask: ask sacct, for a bounded time, about ended attempts that are still unknown.
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
    """Open the ledgers of all runs under a run root, the newest first; add notes on those left out."""
    ledgers, notes = open_ledgers(all_runs(run_root), now, records, ask)
    return ledgers, [*notes, *unreadable(run_root)]


def completed(ledgers: Sequence[RunLedger], now: float, timeout_s: float = 10.0) -> list[RunLedger]:
    """Return the ledgers after asking sacct about ended attempts that are still unknown."""
    asked = [(each.run, each.jobs, each.summary.history) for each in ledgers if each.jobs]
    found, _ = ask_slurm(asked, now, timeout_s)
    jobs = {record.job_id for record in found}
    return [open_ledger(each.run, now, found) if jobs & set(each.jobs) else each for each in ledgers]


def settled_ledger(run: RunDir, now: float) -> RunLedger:
    """Open a ledger; for a run that is over ask sacct once, for up to 5 s, what it held."""
    ledger = open_ledger(run, now)
    return completed([ledger], now, timeout_s=5.0)[0] if ledger.situation.state.is_over else ledger


def owner(run: RunDir) -> str:
    """Return the user who owns its folder."""
    uid = run.path.stat().st_uid
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


class _Estimate(TypedDict, total=False):
    gpu_hours: Spread | None
    node_hours: Spread | None


def _planned(path: Path, shape: Any, spoilt: list[str]) -> dict[str, Any]:
    """Read plan.json or estimate.json; a damaged one costs the run no hour, but is noted in `spoilt`."""
    try:
        found: dict[str, Any] = read_json(path, shape)
    except FileNotFoundError:
        return {}
    except StateError as error:
        spoilt.append(f"{error}: until then the run's plan is unknown")
        return {}
    return found


def _open(run: RunDir, now: float, given: Iterable[JobRecord], note: str) -> RunLedger:
    situation, user, jobs = read_situation(run), owner(run), tuple(slurm_jobs(run))
    history = situation.history
    is_running = situation.state is State.running
    summary = summarise_run(run, history, now, is_running)
    mine = own_records(given, jobs, history)
    kept = learn(run, mine, now) if mine else kept_records(run)
    records = tuple(own_records(kept.records, jobs, history))
    spoilt: list[str] = []
    plan = _planned(run.plan, PlanFacts, spoilt)
    estimate = _planned(run.estimate, _Estimate, spoilt)
    on_cpu = not any(a.attempt.gpus for a in summary.attempts)
    on_cpu = on_cpu and (bool(summary.attempts) or plan.get("gpu_hours_ceiling") == 0)
    costs = _costs(summary, replace(kept, records=records), now if is_running else None, user, on_cpu)
    submitted = sorted(float(s["time"]) for s in history.submissions)
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
        planned=Spread.read(estimate.get("node_hours" if on_cpu else "gpu_hours")),
        spoilt=tuple(spoilt),
        num_steps=_positive(plan.get("num_steps")),
        ceiling=_positive(plan.get("node_hours_ceiling" if on_cpu else "gpu_hours_ceiling")),
        waiting_since=submitted[-1] if submitted else None,
        jobs=jobs,
        asked_account=plan.get("account"),
    )
    waiting = [record for record in mine if record.start is None]
    said = "its job has not started" if waiting and not note else note
    return _with_waits(replace(ledger, note=_note(ledger, said, records)), records, waiting, submitted, now)


def _costs(
    summary: RunSummary, kept: SlurmRecords, now: float | None, user: str, on_cpu: bool
) -> tuple[AttemptCost, ...]:
    """Join each allocation with the attempts that began in it; an attempt unknown to Slurm is its own."""
    inside: dict[JobRecord, list[AttemptSummary]] = {record: [] for record in kept.records}
    alone = []
    for each, own in zip(summary.attempts, own_allocations(summary, user), strict=True):
        attempt = each.attempt
        record = record_of(kept.records, attempt.job_id, attempt.start, each.end, attempt.job_start)
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
    """Convert a record to an allocation of the run. One that was open when seen has gone on since."""
    held = replace(to_allocation(record), run=full_name(summary.run), stage=summary.stage)
    if not held.gpus:  # Slurm may not count them: the site sets AccountingStorageTRES
        held = replace(held, gpus=max((each.attempt.gpus for each in inside), default=0))
    if not is_open(record):
        return held
    is_alive = now is not None and bool(inside) and inside[-1] is summary.attempts[-1]
    is_suspended = record.state in ("SUSPENDED", "STOPPED")  # its time is not counted then, as in sacct
    since = max(0.0, (now or seen) - seen) if is_alive and not is_suspended else 0.0
    ended = max((each.end for each in inside if each.attempt.cause is not None), default=0.0)
    return replace(held, end=max(held.end + since, ended))


def _wall(summary: RunSummary, inside: Sequence[AttemptSummary], held: Allocation, by_slurm: bool) -> Split:
    """Split the time of an allocation: start-up before its attempts, idle after and between them."""
    begin = milliseconds(held.start)
    end = max(begin, milliseconds(held.end))
    if not inside:
        return Split(idle=end - begin)
    own = sum((each.split for each in inside), Split())
    first, last = milliseconds(inside[0].attempt.start), milliseconds(inside[-1].end)
    if begin <= first and last <= end and own.allocated <= last - first:
        idle = (end - begin) - (first - begin) - own.allocated
        return own + Split(startup=first - begin, idle=idle)
    rest = end - begin - own.allocated
    if rest >= 0 and not begin <= first <= end:  # by the batch host's clock, which is wrong
        return own + Split(startup=rest)
    # Two clocks that differ: the allocation ends, or begins, within an attempt.
    kept = stored_split(summary, begin, end)
    if kept is not None:
        return kept
    split = summary.split_between(inside, held.start, begin, end)
    if by_slurm and all(each.attempt.cause is not None for each in inside):
        store_split(summary, begin, end, split)
    return split


def _with_waits(
    ledger: RunLedger,
    records: Sequence[JobRecord],
    waiting: Sequence[JobRecord],
    submitted: Sequence[float],
    now: float,
) -> RunLedger:
    """Add queue times by sacct's Eligible and Start if known for every attempt, else by the run folder."""
    eligible = {(r.job_id, r.start): r.eligible for r in records}
    if ledger.source == "sacct" and all(value is not None for value in eligible.values()):
        # Costs by Slurm are in the order of its records.
        waits: list[float | None] = [max(0.0, (r.start or 0.0) - (r.eligible or 0.0)) for r in records]
        rest = sum(max(0.0, (r.end or now) - r.eligible) for r in waiting if r.eligible is not None)
    else:
        waits, rest = _own_waits(ledger.attempts, submitted), 0.0
        since = max([*submitted[-1:], *(each.end for each in ledger.attempts[-1:])], default=None)
        is_in_slurm = ledger.situation.job is not None and ledger.situation.job.is_slurm
        if ledger.situation.state in WAITING and is_in_slurm and since is not None:
            rest = max(0.0, now - since)
    costs = tuple(replace(each, wait_s=wait) for each, wait in zip(ledger.attempts, waits, strict=True))
    return replace(ledger, attempts=costs, queue_s=sum(wait or 0.0 for wait in waits) + rest)


def _own_waits(costs: Sequence[AttemptCost], submitted: Sequence[float]) -> list[float | None]:
    """Return the seconds before each attempt, from its submission or from the end of the one before.

    None for a local attempt: no queue held it, a local chain runs its stages in turn.
    """
    waits: list[float | None] = []
    before: list[float] = []
    for cost in costs:
        began = cost.inside[0].attempt.start if cost.inside else cost.start
        since = max([*before, *(time for time in submitted if time <= began)], default=None)
        is_local = bool(cost.inside) and (cost.inside[0].attempt.job_id or "").startswith("local-")
        waits.append(None if since is None or is_local else max(0.0, began - since))
        before = [cost.inside[-1].end if cost.inside else cost.end]
    return waits


def _note(ledger: RunLedger, note: str, records: Sequence[JobRecord]) -> str:
    if ledger.source == "run":
        return note if ledger.jobs or note else "no job of this run was Slurm's"
    alone = [each for cost in ledger.attempts if not cost.by_slurm for each in cost.inside]
    if alone:
        numbers = ", ".join(str(each.attempt.attempt) for each in alone)
        jobs = ", ".join(dict.fromkeys(str(each.attempt.job_id) for each in alone))
        return f"sacct has no record of attempt {numbers} (job {jobs}): the run's own record counts for it"
    has_gpus = any(cost.by_slurm and cost.allocation.gpus for cost in ledger.attempts)
    if not has_gpus or any(record.gpus for record in records):
        return ""
    return (
        "Slurm's records name no GPU (its AccountingStorageTRES lacks gres/gpu): times are by sacct, GPUs "
        "by the run's own record"
    )


def _positive(value: Any) -> Any:
    return value if isinstance(value, int | float) and value > 0 else None


def measured_run(run: RunDir, now: float) -> Estimate:
    """Estimate a run from the hours it has spent and the rest at its speed so far.

    Raise UsageError for a stage without steps, no attempt, or too few steps to measure. Raise StateError if
    its plan is of another version.
    """
    try:
        plan = RunPlan.from_json(read_json(run.plan))
    except (StateError, FileNotFoundError) as error:
        raise StateError(f"{run.run_id}: {error}; or take --method flops") from None
    config = read(run.config)
    if counts_of(config.stage) == "parts" or not plan.num_steps:
        raise UsageError(
            f"{run.run_id} is of stage {config.stage}, which takes no steps to measure: "
            f"python -m r1hpc.report {run.path} has its hours so far"
        )
    ledger = open_ledger(run, now)
    last = ledger.summary.history.last
    if last is None:
        raise UsageError(f"{run.run_id} has begun no attempt: take --method flops")
    on_gpus = last.gpus > 0
    held = ledger.split() if on_gpus else ledger.node_split()
    found = measured_estimate(
        _seconds(ledger.summary, on_gpus),
        num_steps=plan.num_steps,
        num_gpus=last.gpus,
        num_nodes=last.nodes,
        hours_spent=held.in_hours()["allocated"],
        useful=held.useful / held.allocated if held.allocated else 1.0,
        updates_per_rollout=updates_per_rollout(config) if is_rl(config.stage) else 1,
    )
    planned = workload_of(config.stage).estimate(config, plan)
    if planned is None:
        return found
    card = {"gpu": planned.assumptions["gpu"]}
    return replace(
        found, baselines=planned.baselines, memory=planned.memory, assumptions={**card, **found.assumptions}
    )


def _seconds(summary: RunSummary, on_gpus: bool) -> dict[int, float]:
    """Return the GPU-seconds (CPU runs: node-seconds) of each counted step; attempts may differ in width."""
    useful = summary.useful_steps()
    return {
        step.global_step: step.step_time_s * (each.attempt.gpus if on_gpus else each.attempt.nodes)
        for each in summary.attempts
        for step in useful[each.attempt.attempt]
        if step.step_time_s
    }


@dataclass(frozen=True)
class RunReport:
    """Report of one run: its ledger, steps, data and GPUs."""

    ledger: RunLedger
    audit: Audit
    gpus: tuple[dict[str, Any], ...]
    """telemetry.gpu.history of each node."""

    @property
    def run(self) -> RunDir:
        return self.ledger.run

    def to_json(self) -> dict[str, Any]:
        ledger = self.ledger
        return {
            "run_id": self.run.run_id,
            "run_dir": str(self.run.path),
            "stage": ledger.stage,
            "state": ledger.state,
            "gpu_hours": {**fold_hours(ledger.allocations), "source": ledger.source},
            "own_gpu_hours": fold_hours(ledger.own),
            "note": " ".join([ledger.note, *ledger.notes]).strip(),
            "attempts": [
                {
                    **each.attempt.to_json(),
                    "gpu_hours": ledger.split_of(each).in_hours()["allocated"] * ledger.gpus_of(each),
                    "num_steps": each.num_steps,
                    "num_lost_steps": each.num_lost,
                    "time": split_seconds(ledger.split_of(each)),
                }
                for each in ledger.summary.attempts
            ],
            "steps": {
                "useful": ledger.summary.num_useful,
                "lost": ledger.summary.num_lost,
                "last": ledger.summary.last_step,
            },
            "time": split_seconds(ledger.wall()),
            "data": self.audit.to_json(),
            "gpus": list(self.gpus),
            **ledger.to_json(),
        }


def report_run(run: RunDir, now: float, records: Sequence[JobRecord] | None = None) -> RunReport:
    """Gather the report. `records` are sacct's from a file; without them sacct itself is asked if it exists.

    Raise StateError if the run folder cannot be read.
    """
    note = ""
    jobs = list(slurm_jobs(run))
    if records is None:
        found, note = ask_slurm([(run, jobs, read_situation(run).history)] if jobs else [], now, again=True)
    else:
        found = [record for record in records if record.job_id in jobs]
    if jobs and not found and not note:
        whose = "sacct" if records is None else "the file"
        note = f"{whose} has no record of job {', '.join(jobs)}"
    ledger = open_ledger(run, now, found, note)
    gpus = tuple(node.result() for node in ledger.summary.gpus)
    return RunReport(ledger=ledger, audit=audit_ledger(run), gpus=gpus)
