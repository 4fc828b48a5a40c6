"""Read the state of a budget: what is spent, and what running and queued jobs will still use.

Slurm answers if it can: sacct for what an account has spent, squeue for jobs that r1hpc did not start, and
its own GrpTRESMins. Otherwise the run folders are counted, and `notes` says so. `budget` and the report page
show the state; `check_submission` applies budget.py to it before runs on GPUs are submitted.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from r1hpc.accounting.account import NO_GPU_NAMED, hours_from_sacct, hours_of_runs, left_out, names_no_gpu
from r1hpc.accounting.budget import (
    Budget,
    RunRequest,
    Verdict,
    check_budget,
    find_budget,
    format_day,
    load_budget,
)
from r1hpc.accounting.hours import UNKNOWN, Selection, fold_hours, midnight_before
from r1hpc.accounting.ledger import RunLedger
from r1hpc.accounting.open_ledger import survey
from r1hpc.attempt.state.state import State
from r1hpc.base.errors import StateError
from r1hpc.base.units import format_hours
from r1hpc.plan.hours.spread import Spread, total, until_limit
from r1hpc.slurm.client import SlurmError, without_advice
from r1hpc.slurm.probe import hides_jobs
from r1hpc.slurm.queue import QueuedJob, TresLimit, ask_squeue, gpu_limits

T = TypeVar("T")
PACE_DAYS = 14
"""Two weeks cover a group's weekdays and weekends alike."""
_LEAST_DAYS = 3
"""A pace measured over fewer days does not predict the next months."""


@dataclass(frozen=True)
class BudgetStatus:
    """State of a budget. Hours are GPU-hours."""

    spent: float
    by_day: dict[str, float]
    """YYYY-MM-DD: GPU-hours."""
    running: Spread
    """Still to be used by running jobs."""
    queued: Spread
    num_running: int
    num_queued: int
    limits: tuple[TresLimit, ...]
    source: str
    """`sacct` or `run folders`: the origin of `spent`."""
    notes: tuple[str, ...] = ()
    billing_hours: float | None = None
    """Hours of the billing TRES; None: sacct names none."""
    by_user: dict[str, float] = field(default_factory=dict)

    @property
    def committed(self) -> Spread:
        """Return what everything that runs or waits will still use."""
        return total([self.running, self.queued])

    def lasts_until(self, left: float, now: float) -> float | None:
        """Return when `left` will be spent at the pace of the last PACE_DAYS days; None: too few days."""
        since = midnight_before(now, -PACE_DAYS)
        recent = {day: hours for day, hours in self.by_day.items() if _midnight(day) >= since}
        if not recent or now - _midnight(min(self.by_day)) < _LEAST_DAYS * 86400 or left <= 0:
            return None
        begin = max(since, _midnight(min(self.by_day)))
        return now + left * (now - begin) / sum(recent.values())

    def warnings(self, budget: Budget | None) -> Iterator[str]:
        """Yield warnings of marks passed now or later, of users at their quota, or an overbooked budget."""
        if budget is None:
            return
        for user, quota in budget.users.items():
            used = self.by_user.get(user, 0.0)
            if used >= max(budget.warn_at, default=1.0) * quota:
                of = f"{format_hours(used)} of {format_hours(quota)} GPU-hours"
                yield f"{user} has spent {of}, {100 * used / quota:.0f} % of the quota"
        if budget.gpu_hours is None:
            return
        granted, after = budget.gpu_hours, self.spent + self.committed.p50
        spent, promised = budget.passed(self.spent), budget.passed(after)
        if spent:
            share = 100 * self.spent / granted
            yield f"{share:.0f} % are spent: the mark at {100 * max(spent):.0f} % is passed"
        if promised and promised != spent:
            yield f"with running and queued jobs the mark at {100 * max(promised):.0f} % will be passed"
        if after > granted:
            over = format_hours(after - granted)
            yield f"running and queued jobs exceed the budget by {over} GPU-hours: submissions are refused"

    def is_over(self, budget: Budget) -> bool:
        """True if more is spent than granted, in all or to a user."""
        is_over = budget.gpu_hours is not None and self.spent > budget.gpu_hours
        return is_over or any(self.by_user.get(user, 0.0) > quota for user, quota in budget.users.items())

    def to_json(self) -> dict[str, Any]:
        return {
            "spent": self.spent,
            "source": self.source,
            "billing_hours": self.billing_hours,
            "running": {**self.running.to_json(), "jobs": self.num_running},
            "queued": {**self.queued.to_json(), "jobs": self.num_queued},
            "by_day": self.by_day,
            "by_user": self.by_user,
            "slurm_limits": [{**vars(limit), "left": limit.left} for limit in self.limits],
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class _SlurmAnswers:
    """Slurm's answers; None: it was not asked or did not answer."""

    hours: dict[str, Any] | None = None
    """fold_hours of the account."""
    jobs: tuple[QueuedJob, ...] = ()
    limits: tuple[TresLimit, ...] = ()
    notes: tuple[str, ...] = ()


def read_budget_status(
    budget: Budget | None, runs: Sequence[RunLedger], now: float, ask_slurm: bool = True
) -> BudgetStatus:
    """Return what is spent of the budget's period, and what is promised."""
    period = budget or Budget(Path())
    said = (
        _ask(period, now) if ask_slurm else _SlurmAnswers(notes=_uncounted(period, "this run is not Slurm's"))
    )
    counted = [run for run in runs if period.is_of(run.account)]
    hours, notes = said.hours, said.notes
    is_by_slurm = hours is not None and not names_no_gpu(hours)
    if hours is None or not is_by_slurm:
        own = hours_of_runs(counted, replace(_selection(period, now), account=None))
        if hours is not None and own["by_day"]:
            notes += _uncounted(period, NO_GPU_NAMED)
        hours = {**(hours or {}), **own}
    by_day = hours["by_day"]
    if is_by_slurm and (purged := _purged(period, runs, now, min(by_day, default=format_day(now)))):
        notes += (
            f"sacct no longer has jobs of {min(purged)} to {max(purged)}: for these days spent is "
            f"{format_hours(sum(purged.values()))} GPU-hours, of the runs under the run root alone",
        )
        by_day = purged | by_day
    ours = {job for run in runs for job in run.jobs}
    # sacct lists a run that is a task of an array as `4711_3`, one that became an array as `4711`.
    others = [job for job in said.jobs if not {job.job_id, job.job_id.split("_")[0]} & ours and job.gpus]
    live = [run for run in counted if run.is_live and run.unit == "GPU-hours"]
    running = [run.to_come for run in live if run.situation.state is State.running]
    queued = [run.to_come for run in live if run.situation.state is not State.running]
    running += [until_limit(job.most_left or 0.0) for job in others if not job.is_pending]
    queued += [until_limit(job.most_left or 0.0) for job in others if job.is_pending]
    return BudgetStatus(
        spent=sum(by_day.values()),
        by_day=by_day,
        running=total(running),
        queued=total(queued),
        num_running=len(running),
        num_queued=len(queued),
        limits=said.limits,
        source="sacct" if is_by_slurm else "run folders",
        notes=notes,
        billing_hours=hours.get("billing_hours"),
        by_user=hours["by_user"],
    )


def check_submission(
    run_root: Path,
    requests: Sequence[RunRequest],
    *,
    account: str | None = None,
    qos: str | None = None,
    over_budget: bool = False,
    ask_slurm: bool = True,
) -> Verdict:
    """Decide whether runs may be submitted now: `check_budget` with everything looked up.

    Without a budget and Slurm limits this costs one call to slurmctld and allows the runs. The warnings name
    what could not be counted.

    Args:
        account, qos: those of the jobs; None: those of the budget.
        ask_slurm: false for runs on this machine.
    """
    now = time.time()
    budget = load_budget(find_budget(run_root))
    limits: Sequence[TresLimit] = ()
    charged = account or (budget.account if budget else None)
    if ask_slurm and not (charged is None and qos is None):
        # Slurm enforces them itself: a missing warning must not stop a submission.
        with contextlib.suppress(SlurmError):
            limits = gpu_limits(charged, qos)
    if budget is None:
        return check_budget(None, requests, limits=limits)
    elsewhere: tuple[str, ...] = ()
    if not budget.is_of(account):
        elsewhere = (
            f"not counted: {budget.path} is of account {budget.account}, and this is charged to {account}",
        )
        budget = replace(budget, gpu_hours=None, end=None)
    runs, left_out = survey(run_root, now, ask=ask_slurm)
    status = read_budget_status(budget, runs, now, ask_slurm)
    verdict = check_budget(
        budget,
        requests,
        spent=status.spent,
        committed=status.committed,
        limits=limits,
        over_budget=over_budget,
        now=now,
    )
    return replace(verdict, warnings=(*elsewhere, *verdict.warnings, *status.notes, *left_out))


def _ask(period: Budget, now: float) -> _SlurmAnswers:
    """Ask each of Slurm's commands separately: if one fails, another may still answer."""
    account = period.account
    notes: list[str] = []
    limits, why = _answer(lambda: tuple(gpu_limits(account)))
    if limits is None:
        notes.append(f"Slurm's own limits are not known: {why}")
    if account is None:
        return _SlurmAnswers(limits=limits or (), notes=tuple(notes))
    hours, why = _answer(lambda: hours_from_sacct(_selection(period, now), timeout_s=60.0))
    notes += _uncounted(period, why) if hours is None else ()
    jobs, why = _answer(lambda: tuple(ask_squeue(account, period.gres_per_gpu)))
    if jobs is None:
        notes.append(f"running and queued are of the runs under the run root alone: {why}")
    if hides_jobs():
        notes.append(
            f"Slurm shows jobs of others to coordinators and operators only (PrivateData=jobs): unless you "
            f"are one, the hours of account {account} are of your own jobs"
        )
    queued = set[str]().union(*(job.unshared for job in jobs or ()))
    kinds = sorted(queued.union((hours or {}).get("unknown_shares", ())))
    notes += left_out({**(hours or {}), "unknown_shares": kinds}, f"{period.path}: gres_per_gpu: ")
    return _SlurmAnswers(hours, jobs or (), limits or (), tuple(notes))


def _purged(period: Budget, runs: Sequence[RunLedger], now: float, first_day: str) -> dict[str, float]:
    """Return the GPU-hours, by day, that Slurm counted once and sacct lists no more: sites purge old jobs."""
    known = (
        held
        for run in runs
        for held in run.allocations
        if held.account != UNKNOWN and period.is_of(held.account)
    )
    by_day = fold_hours(replace(_selection(period, now), account=None).clip(known))["by_day"]
    return {day: hours for day, hours in by_day.items() if day < first_day}


def _answer(ask: Callable[[], T]) -> tuple[T | None, str]:
    try:
        return ask(), ""
    except SlurmError as error:
        return None, without_advice(error)
    except StateError as error:
        return None, str(error)


def _selection(period: Budget, now: float) -> Selection:
    end, shares = min(now, period.end or now), period.gres_per_gpu
    return Selection(account=period.account, start=period.start, end=end, shares=shares)


def _uncounted(period: Budget, why: str) -> tuple[str, ...]:
    """Return the note on what is missing if Slurm's accounting was not asked."""
    if period.account is None:
        return ()
    whose = f"not of all jobs of account {period.account}"
    return (f"spent is of the runs under the run root, {whose}: {why}",)


def _midnight(day: str) -> float:
    return datetime.fromisoformat(day).timestamp()
