"""Read the budget file, and decide whether runs may be submitted, from hours that budget_status.py looks up.

A budget counts the hours spent since `start`, and what running and queued jobs will still use. Runs are
refused if their P50 does not fit into the rest; if only their P90 does not, there is a warning. They are
also refused after `end`, above max_gpu_hours_per_run, and above Slurm's own GrpTRESMins.
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

from r1hpc.base.errors import ConfigError
from r1hpc.base.names import is_among
from r1hpc.base.units import format_hours
from r1hpc.config.assets import assets
from r1hpc.config.load import read_section
from r1hpc.config.schema.ranges import ranged
from r1hpc.plan.hours.spread import NOTHING, Spread, total
from r1hpc.plan.topology.gpus import known_card
from r1hpc.slurm.gres import Shares, parse_shares
from r1hpc.slurm.queue import TresLimit

_LESS = "ask for less (train.num_steps, --nodes), "


@dataclass(frozen=True)
class _File:
    """configs/budget.yaml."""

    account: str | None = None
    gpu_hours: float | None = ranged(None, above=0)
    start: str | None = None
    end: str | None = None
    warn_at: list[float] = ranged(factory=lambda: [0.5, 0.8, 0.95], above=0, most=1)  # noqa: RUF009
    max_gpu_hours_per_run: float | None = ranged(None, above=0)
    override: bool = True
    campaign: str | None = None
    gres_per_gpu: str | None = None
    users: dict[str, float] = ranged(factory=dict, above=0)  # noqa: RUF009


def day(text: str | None, where: str, end: bool = False) -> float | None:
    """Return the local midnight that begins the day, or with `end` the one that ends it, in Unix seconds."""
    if text is None:
        return None
    try:
        found = datetime.fromisoformat(text).date()
    except ValueError:
        raise ConfigError(f"{where} is {text!r}: write a day such as 2026-10-01") from None
    return (datetime(found.year, found.month, found.day) + timedelta(days=end)).timestamp()


@dataclass(frozen=True)
class Budget:
    """configs/budget.yaml, checked. Times are Unix seconds; hours are GPU-hours."""

    path: Path
    account: str | None = None
    """The account whose jobs count; None: the runs under the run root."""
    gpu_hours: float | None = None
    start: float | None = None
    end: float | None = None
    warn_at: tuple[float, ...] = (0.5, 0.8, 0.95)
    max_gpu_hours_per_run: float | None = None
    override: bool = True
    campaign: str | None = None
    gres_per_gpu: Shares = field(default_factory=dict)
    users: Mapping[str, float] = field(default_factory=dict)
    """Quotas of single users."""

    def is_of(self, account: str | None) -> bool:
        """True if jobs of this account count; None, the user's default account, does."""
        return account is None or is_among(account, self.account)

    @property
    def until(self) -> str:
        return "" if self.end is None else f" until {format_day(self.end - 1)}"

    def passed(self, hours: float) -> list[float]:
        """Return the warning marks that `hours` has reached."""
        return [] if self.gpu_hours is None else [m for m in self.warn_at if hours >= m * self.gpu_hours]


@dataclass(frozen=True)
class RunRequest:
    """A run to be submitted. Hours are GPU-hours."""

    rest: Spread | None
    """Estimate of what it will still use; None: there is no estimate."""
    whole: float | None = None
    """P50 of its estimate including finished parts; None: there are none."""
    ceiling: float | None = None
    """GPUs x time limit, the most one attempt can take; Slurm counts this against its limits."""
    gpu: str | None = None
    """Its GPU, by any usual name; None: unknown."""

    @property
    def counted(self) -> Spread:
        """Return its estimate, else its time limit, else nothing."""
        if self.rest is not None:
            return self.rest
        return NOTHING if self.ceiling is None else Spread(self.ceiling, self.ceiling, self.ceiling)

    @property
    def size(self) -> float:
        """Return the P50 of the complete run, over all its submissions."""
        return self.counted.p50 if self.whole is None else self.whole


def needed(requests: Sequence[RunRequest]) -> Spread:
    """Return what the runs will use together."""
    return total([each.counted for each in requests])


@dataclass(frozen=True)
class Verdict:
    """Decision whether runs may be submitted, and notes for their owner."""

    allowed: bool
    sentence: str
    """If `allowed`, what is left afterwards; else the reason and the way around it. Empty: no budget."""
    warnings: tuple[str, ...] = ()


def find_budget(run_root: Path, given: Path | None = None) -> Path:
    """Return the budget file: `given`, $R1HPC_BUDGET, RUN_ROOT/budget.yaml, else configs/budget.yaml.

    Raise ConfigError if the named file does not exist.
    """
    named = given or (Path(os.environ["R1HPC_BUDGET"]) if os.environ.get("R1HPC_BUDGET") else None)
    if named is not None:
        if not named.is_file():
            raise ConfigError(f"no budget file {named}: copy configs/budget.yaml there, or unset it")
        return named
    own = run_root / "budget.yaml"
    if os.path.lexists(own):
        return own
    return assets("configs") / "budget.yaml"


def load_budget(path: Path) -> Budget | None:
    """Return the budget in a file; None if it sets nothing.

    Raise ConfigError for an unknown key or an invalid value.
    """
    if not os.path.lexists(path):
        return None
    if not path.is_file():
        raise ConfigError(f"{path} is no file: remove it, or write the budget there")
    found = read_section(path, _File)
    budget = Budget(
        **{
            **vars(found),
            "path": path,
            "start": day(found.start, f"{path}: start"),
            "end": day(found.end, f"{path}: end", end=True),
            "warn_at": tuple(sorted(found.warn_at)),
            "gres_per_gpu": parse_shares(found.gres_per_gpu, f"{path}: gres_per_gpu")
            if found.gres_per_gpu
            else {},
        }
    )
    if budget.start is not None and budget.end is not None and budget.start >= budget.end:
        raise ConfigError(f"{path}: start must lie before end")
    active = (budget.gpu_hours, budget.max_gpu_hours_per_run, budget.campaign)
    is_active = budget.users or any(value is not None for value in active)
    return budget if is_active else None


def check_budget(
    budget: Budget | None,
    requests: Sequence[RunRequest],
    *,
    spent: float = 0.0,
    committed: Spread = NOTHING,
    limits: Sequence[TresLimit] = (),
    over_budget: bool = False,
    now: float | None = None,
) -> Verdict:
    """Decide whether these runs may be submitted now, all of them or none.

    Args:
        spent: GPU-hours of the period so far.
        committed: what running and queued jobs will still use.
        limits: Slurm's GrpTRESMins that apply to the runs.
        over_budget: the user gave --over-budget.
    """
    warnings = [] if budget is None else list(_warnings(budget, requests, spent, committed))
    by_slurm = _over_slurm(limits, requests)
    if by_slurm:
        return Verdict(False, by_slurm, tuple(warnings))
    warnings += _slurm_warnings(limits, requests)
    refusal = None if budget is None else _refusal(budget, requests, spent, committed, now or time.time())
    if refusal is None or budget is None:
        rest = ""
        if budget is not None and budget.gpu_hours is not None:
            after = budget.gpu_hours - spent - total([committed, needed(requests)]).p50
            granted = format_hours(budget.gpu_hours)
            rest = f"after {_who(requests)} about {_hours_or_none(after)} of {granted} GPU-hours are left"
            rest += budget.until
        return Verdict(True, rest, tuple(warnings))
    fact, key, less = refusal
    if over_budget and budget.override:
        return Verdict(True, f"over budget: {fact}", tuple(warnings))
    flag = ", or submit with --over-budget REASON" if budget.override else ""
    return Verdict(False, f"{fact}; {less}change {key} in {budget.path}{flag}", tuple(warnings))


def format_range(hours: Spread) -> str:
    """Format P10 and P90 as `80 to 150`."""
    return f"{format_hours(hours.p10)} to {format_hours(hours.p90)}"


def format_day(moment: float) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(moment))


def _refusal(
    budget: Budget, requests: Sequence[RunRequest], spent: float, committed: Spread, now: float
) -> tuple[str, str, str] | None:
    """Return the fact, the key in the budget file that forbids it, and what else would help."""
    if budget.end is not None and now >= budget.end:
        return f"the budget in {budget.path} ended on {format_day(budget.end - 1)}", "end", ""
    most, largest = budget.max_gpu_hours_per_run, max((each.size for each in requests), default=0.0)
    if most is not None and largest > most:
        who = "this run" if len(requests) == 1 else "the largest of these runs"
        fact = f"{who} needs about {format_hours(largest)} GPU-hours"
        fact += f", and max_gpu_hours_per_run is {format_hours(most)}"
        return fact, "max_gpu_hours_per_run", _LESS
    if budget.gpu_hours is None:
        return None
    left = budget.gpu_hours - spent - committed.p50
    if left > 0 and needed(requests).p50 <= left:
        return None
    return (
        f"{_needs(requests)}, and {_hours_or_none(left)} of {format_hours(budget.gpu_hours)} are left"
        f"{budget.until} (spent {format_hours(spent)}, running and queued {format_hours(committed.p50)})",
        "gpu_hours",
        _LESS,
    )


def _who(requests: Sequence[RunRequest]) -> str:
    return "this run" if len(requests) == 1 else f"these {len(requests)} runs"


def _needs(requests: Sequence[RunRequest]) -> str:
    hours, is_one = needed(requests).p50, len(requests) == 1
    if not hours:
        return f"{_who(requests)} {'has' if is_one else 'have'} no estimate"
    verb, together = ("needs", "") if is_one else ("need", " together")
    return f"{_who(requests)} {verb} about {format_hours(hours)} GPU-hours{together}"


def _hours_or_none(left: float) -> str:
    return format_hours(left) if left > 0 else "none"


def _warnings(
    budget: Budget, requests: Sequence[RunRequest], spent: float, committed: Spread
) -> Iterator[str]:
    """Yield warnings: marks these runs would pass, a rest too small for their P90, and unknown costs."""
    if budget.gpu_hours is not None:
        granted, asked = budget.gpu_hours, needed(requests)
        before, after = spent + committed.p50, spent + committed.p50 + asked.p50
        new = [mark for mark in budget.passed(after) if mark not in budget.passed(before)]
        of = f"of {format_hours(granted)} GPU-hours are spent or promised"
        if new:
            share, level = 100 * after / granted, 100 * max(new)
            yield f"with {_who(requests)}, {share:.0f} % {of}: above the warning level of {level:.0f} %"
        elif budget.passed(before):
            yield f"{100 * before / granted:.0f} % {of}"
        over = total([committed, asked]).p90 + spent - granted
        if after <= granted and over > 0:
            whose = "its" if len(requests) == 1 else "their"
            yield (
                f"at {whose} P90 ({format_hours(asked.p90)} GPU-hours) {_who(requests)} and those before "
                f"exceed the budget by {format_hours(over)}"
            )
    guessed = [each for each in requests if each.rest is None]
    for words, count in (
        ("time limit was counted instead", sum(each.ceiling is not None for each in guessed)),
        ("cost was not counted: no time limit is set", sum(each.ceiling is None for each in guessed)),
    ):
        if count and len(requests) == 1:
            yield f"the run has no estimate: its {words}"
        elif count:
            yield f"{count} of these {len(requests)} runs without an estimate: the {words}"


def _counted_by(limit: TresLimit, requests: Sequence[RunRequest]) -> list[RunRequest]:
    """Return the runs that use up this limit; for a limit on one GPU type, those known to use it.

    A refusal by Slurm's limit cannot be overridden, and Slurm enforces it: unsure cases are left to Slurm.
    """
    card = limit.card
    return [r for r in requests if card is None or (r.gpu is not None and _family(r.gpu) == _family(card))]


def _family(name: str) -> str:
    """Return the family of a GPU by any of its names; one that is not in the table keeps its own name."""
    card = known_card(name)
    return card.family if card else name.lower()


def _over_slurm(limits: Sequence[TresLimit], requests: Sequence[RunRequest]) -> str:
    """Return why Slurm's own limit cannot hold the runs; no r1hpc flag overrides it."""
    counted = [(limit, _counted_by(limit, requests)) for limit in limits]
    tight = [(limit, runs) for limit, runs in counted if needed(runs).p50 > limit.unused]
    if not tight:
        return ""
    limit, runs = min(tight, key=lambda pair: pair[0].unused)
    return (
        f"{_needs(runs)}, and Slurm's GrpTRESMins of {_owner(limit)} leaves {format_hours(limit.unused)} of "
        f"{format_hours(limit.gpu_hours)} (used {format_hours(limit.used)}): it would "
        "stay pending. Ask for less (train.num_steps, --nodes), "
        "submit to another --account or --qos, or ask your site to raise it"
    )


def _slurm_warnings(limits: Sequence[TresLimit], requests: Sequence[RunRequest]) -> Iterator[str]:
    for limit in limits:
        runs = _counted_by(limit, requests)
        ceiling = max((r.ceiling for r in runs if r.ceiling is not None), default=0.0)
        if ceiling > limit.unused:
            yield (
                f"Slurm holds GPUs x time limit ({format_hours(ceiling)} GPU-hours) against GrpTRESMins of "
                f"{_owner(limit)}, which has {format_hours(limit.unused)} left: the job will stay pending; "
                "ask for a shorter --time"
            )
        elif max(ceiling, needed(runs).p50) > limit.left:
            yield (
                f"Slurm holds {format_hours(limit.running)} GPU-hours of the GrpTRESMins of {_owner(limit)} "
                f"for running jobs, and {format_hours(limit.left)} are left: {_who(runs)} will wait until "
                "some of them end"
            )


def _owner(limit: TresLimit) -> str:
    return limit.owner if limit.card is None else f"{limit.owner} ({limit.tres})"
