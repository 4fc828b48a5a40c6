"""The GPU-hours of a group: what was granted, what is left of it, and whether a run may still be submitted.

    budget = load_budget(find_budget(run_root))     # None: there is none
    verdict = check_budget(budget, p50, p90, spent=8123.4, committed=Spread(300, 400, 600), now=time.time())
    if not verdict.allowed:
        raise R1hpcError(verdict.sentence)

A budget counts the hours spent since `start` and, beside them, what running and queued jobs will still use.
A run is refused when its P50 does not fit into the rest, and warned of when only its P90 does not.
"""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from r1hpc.base.errors import ConfigError
from r1hpc.hours import yaml_block
from r1hpc.hours.forecast import NOTHING, Spread, one_sided, total
from r1hpc.slurm.limits import TresLimit

OVERRIDE_FLAG = "--over-budget"
_KEYS = (
    "account",
    "gpu_hours",
    "start",
    "end",
    "warn_at",
    "max_gpu_hours_per_run",
    "override",
    "campaign",
)


@dataclass(frozen=True)
class Budget:
    """configs/budget.yaml, checked. Times are Unix seconds; hours are GPU-hours."""

    path: Path
    account: str | None = None
    """Whose jobs are counted; None: the runs under the run root."""
    gpu_hours: float | None = None
    start: float | None = None
    end: float | None = None
    warn_at: tuple[float, ...] = (0.5, 0.8, 0.95)
    max_gpu_hours_per_run: float | None = None
    override: bool = True
    campaign: str | None = None

    @property
    def until(self) -> str:
        return "" if self.end is None else f" until {format_day(self.end - 1)}"

    def passed(self, hours: float) -> list[float]:
        """The warning marks that `hours` has reached."""
        return [] if self.gpu_hours is None else [m for m in self.warn_at if hours >= m * self.gpu_hours]


@dataclass(frozen=True)
class Verdict:
    """Whether a run may be submitted, and what its owner should know."""

    allowed: bool
    sentence: str
    """With `allowed` what is left after it, else why not and the way around it. Empty: no budget."""
    warnings: tuple[str, ...] = ()


def find_budget(run_root: Path, given: Path | None = None) -> Path:
    """The budget file: the one given, $R1HPC_BUDGET, RUN_ROOT/budget.yaml, else configs/budget.yaml.

    Raises:
        ConfigError: the one that was named does not exist.
    """
    named = given or (Path(os.environ["R1HPC_BUDGET"]) if os.environ.get("R1HPC_BUDGET") else None)
    if named is not None:
        if not named.is_file():
            raise ConfigError(f"no budget file {named}: copy configs/budget.yaml there, or unset it")
        return named
    own = run_root / "budget.yaml"
    if own.is_file():
        return own
    from r1hpc.config.load import assets  # takes a fifth of a second, for omegaconf

    return assets("configs") / "budget.yaml"


def load_budget(path: Path) -> Budget | None:
    """The budget in a file; None where it sets nothing.

    Raises:
        ConfigError: an unknown key or a value that cannot be.
    """
    where = str(path)
    if not path.is_file():
        return None
    values = yaml_block.read_block(path)
    yaml_block.check_keys(values, _KEYS, where)
    budget = Budget(
        path=path,
        account=yaml_block.text(values, "account", where),
        gpu_hours=yaml_block.number(values, "gpu_hours", where),
        start=yaml_block.day(values, "start", where),
        end=yaml_block.day(values, "end", where, end=True),
        warn_at=_marks(values.get("warn_at"), where),
        max_gpu_hours_per_run=yaml_block.number(values, "max_gpu_hours_per_run", where),
        override=_flag(values.get("override"), where),
        campaign=yaml_block.text(values, "campaign", where),
    )
    if budget.start is not None and budget.end is not None and budget.start >= budget.end:
        raise ConfigError(f"{where}: start must lie before end")
    active = (budget.gpu_hours, budget.max_gpu_hours_per_run, budget.campaign)
    return budget if any(value is not None for value in active) else None


def check_budget(
    budget: Budget | None,
    estimate_p50: float | None,
    estimate_p90: float | None = None,
    *,
    spent: float = 0.0,
    committed: Spread = NOTHING,
    limits: Sequence[TresLimit] = (),
    ceiling: float | None = None,
    over_budget: bool = False,
    now: float | None = None,
) -> Verdict:
    """Whether a run of this size may be submitted now.

    Args:
        estimate_p50, estimate_p90: GPU-hours of the run; None where nobody could estimate it.
        spent: GPU-hours of the period so far.
        committed: what running and queued jobs will still use.
        limits: Slurm's GrpTRESMins that apply to the run.
        ceiling: GPUs x time limit, the most one attempt can take: what Slurm holds against its limits.
        over_budget: the user said --over-budget.
    """
    p50 = ceiling if estimate_p50 is None else estimate_p50
    p90 = max(p50 or 0.0, estimate_p90 or 0.0)
    warnings = [] if budget is None else list(_warnings(budget, p50, p90, spent, committed))
    if budget is not None and estimate_p50 is None:
        warnings.append("the run has no estimate: its time limit was counted instead")
    by_slurm = _over_slurm(limits, p50)
    if by_slurm:
        return Verdict(False, by_slurm, tuple(warnings))
    warnings += _slurm_warnings(limits, ceiling)
    refusal = None if budget is None else _refusal(budget, p50, spent, committed, now or time.time())
    if refusal is None or budget is None:
        return Verdict(True, _left(budget, p50, p90, spent, committed), tuple(warnings))
    if over_budget and budget.override:
        return Verdict(True, f"over budget: {refusal.fact}", tuple(warnings))
    flag = f", or submit with {OVERRIDE_FLAG} REASON" if budget.override else ""
    words = f"{refusal.fact}; {refusal.less}change {refusal.key} in {budget.path}{flag}"
    return Verdict(False, words, tuple(warnings))


def format_hours(hours: float) -> str:
    """GPU-hours for a person: 12,345  123.4  12.34  0.012."""
    if hours == 0:
        return "0"
    if abs(hours) >= 1000:
        return f"{hours:,.0f}"
    if abs(hours) >= 100:
        return f"{hours:.1f}"
    return f"{hours:.2f}" if abs(hours) >= 0.1 else f"{hours:.2g}" if abs(hours) < 0.01 else f"{hours:.3f}"


def format_day(moment: float) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(moment))


@dataclass(frozen=True)
class _Refusal:
    fact: str
    key: str
    """Of the budget file."""
    less: str = "ask for less (train.num_steps, --nodes), "


def _refusal(
    budget: Budget, p50: float | None, spent: float, committed: Spread, now: float
) -> _Refusal | None:
    if budget.end is not None and now >= budget.end:
        return _Refusal(f"the budget in {budget.path} ended on {format_day(budget.end - 1)}", "end", "")
    needs = f"this run needs about {format_hours(p50)} GPU-hours" if p50 else "this run has no estimate"
    most = budget.max_gpu_hours_per_run
    if p50 is not None and most is not None and p50 > most:
        fact = f"{needs}, and max_gpu_hours_per_run is {format_hours(most)}"
        return _Refusal(fact, "max_gpu_hours_per_run")
    if budget.gpu_hours is None:
        return None
    left = budget.gpu_hours - spent - committed.p50
    if left > 0 and (p50 or 0.0) <= left:
        return None
    return _Refusal(
        f"{needs}, and {_hours_or_none(left)} of {format_hours(budget.gpu_hours)} are left{budget.until} "
        f"(spent {format_hours(spent)}, running and queued {format_hours(committed.p50)})",
        "gpu_hours",
    )


def _hours_or_none(left: float) -> str:
    return format_hours(left) if left > 0 else "none"


def _warnings(
    budget: Budget, p50: float | None, p90: float, spent: float, committed: Spread
) -> Iterator[str]:
    """Marks that this run would pass, and a rest that its P90 does not fit into."""
    if budget.gpu_hours is None:
        return
    before, after = spent + committed.p50, spent + committed.p50 + (p50 or 0.0)
    new = [mark for mark in budget.passed(after) if mark not in budget.passed(before)]
    of = f"of {format_hours(budget.gpu_hours)} GPU-hours are spent or promised"
    if new:
        share = 100 * after / budget.gpu_hours
        yield f"with this run {share:.0f} % {of}: past the mark at {100 * max(new):.0f} %"
    elif budget.passed(before):
        yield f"{100 * before / budget.gpu_hours:.0f} % {of}"
    over = total([committed, one_sided(p50 or 0.0, p90)]).p90 + spent - budget.gpu_hours
    if after <= budget.gpu_hours and over > 0:
        yield (
            f"at its P90 ({format_hours(p90)} GPU-hours) this run and those before it exceed the budget "
            f"by {format_hours(over)}"
        )


def _over_slurm(limits: Sequence[TresLimit], p50: float | None) -> str:
    """Why Slurm's own limit cannot hold the run; no flag of ours goes around that."""
    tight = [limit for limit in limits if p50 is not None and p50 > limit.left]
    if not tight:
        return ""
    limit = min(tight, key=lambda limit: limit.left)
    return (
        f"this run needs about {format_hours(p50 or 0.0)} GPU-hours, and Slurm's GrpTRESMins of "
        f"{limit.owner} leaves {format_hours(limit.left)} of {format_hours(limit.gpu_hours)} "
        f"(used {format_hours(limit.used)}, held for running jobs {format_hours(limit.running)}): it would "
        "stay pending. Ask for less (train.num_steps, --nodes), "
        "submit to another --account or --qos, or ask your site to raise it"
    )


def _slurm_warnings(limits: Sequence[TresLimit], ceiling: float | None) -> Iterator[str]:
    for limit in limits:
        if ceiling is not None and ceiling > limit.left:
            yield (
                f"Slurm holds GPUs x time limit ({format_hours(ceiling)} GPU-hours) against GrpTRESMins of "
                f"{limit.owner}, which has {format_hours(limit.left)} left: the job will stay pending; "
                "ask for a shorter --time"
            )


def _left(budget: Budget | None, p50: float | None, p90: float, spent: float, committed: Spread) -> str:
    if budget is None or budget.gpu_hours is None:
        return ""
    after = budget.gpu_hours - spent - total([committed, one_sided(p50 or 0.0, p90)]).p50
    return (
        f"after this run about {_hours_or_none(after)} of {format_hours(budget.gpu_hours)} GPU-hours are "
        f"left{budget.until}"
    )


def _marks(value: object, where: str) -> tuple[float, ...]:
    if value is None:
        return Budget.warn_at
    if not isinstance(value, list) or not all(isinstance(m, int | float) and 0 < m <= 1 for m in value):
        raise ConfigError(f"{where}: warn_at is {value!r}: it must be a list of shares, as in [0.5, 0.8]")
    return tuple(sorted(float(mark) for mark in value))


def _flag(value: object, where: str) -> bool:
    if value is None:
        return Budget.override
    if not isinstance(value, bool):
        raise ConfigError(f"{where}: override is {value!r}: it must be true or false")
    return value
