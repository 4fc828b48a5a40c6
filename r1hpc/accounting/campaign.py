"""Compare a campaign, a plan of stages with days and GPU-hours, with the runs that happened.

`budget` and the report page show it. A stage here is a phase of the plan (configs/campaign/), not a run's
stage. A run belongs to at most one: the first whose `runs` pattern matches its name or its Slurm job name,
else the first whose `stages` lists its r1hpc stage, else the one in whose days it began.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from fnmatch import fnmatchcase
from itertools import accumulate
from pathlib import Path
from typing import Any

from r1hpc.accounting.budget import Budget, day
from r1hpc.accounting.ledger import RunLedger
from r1hpc.base.errors import ConfigError
from r1hpc.base.names import nearest, printable
from r1hpc.config.assets import assets, find_named
from r1hpc.config.load import as_section, read_section
from r1hpc.config.schema.ranges import ranged
from r1hpc.config.stages import STAGES
from r1hpc.plan.hours.spread import Spread, around, remaining, total

_DAY = 86400.0


@dataclass(frozen=True)
class _File:
    """configs/campaign/NAME.yaml."""

    name: str | None = None
    start: str | None = None
    gpu_hours: float | None = ranged(None, above=0)
    stages: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class _Block:
    """An entry of its `stages`."""

    name: str
    days: float | None = ranged(None, above=0)
    share: float | None = ranged(None, above=0)
    gpu_hours: float | None = ranged(None, above=0)
    runs: list[str] = field(default_factory=list)
    stages: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class CampaignStage:
    name: str
    days: float
    gpu_hours: float
    runs: tuple[str, ...] = ()
    stages: tuple[str, ...] = ()


@dataclass(frozen=True)
class Campaign:
    name: str
    stages: tuple[CampaignStage, ...]
    start: float | None = None
    """Unix seconds; None: when the first run began."""

    @property
    def gpu_hours(self) -> float:
        return sum(stage.gpu_hours for stage in self.stages)

    @property
    def days(self) -> float:
        return sum(stage.days for stage in self.stages)


@dataclass(frozen=True)
class StageProgress:
    """One stage: plan and progress. Times are Unix seconds."""

    stage: CampaignStage
    start: float
    end: float
    used: float
    num_runs: int
    forecast: Spread
    """Its total GPU-hours: used, running, queued and, until its days end, what the plan still holds."""
    when: str
    """past, now or ahead."""

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.stage.name,
            "days": self.stage.days,
            "start": self.start,
            "end": self.end,
            "when": self.when,
            "planned_gpu_hours": self.stage.gpu_hours,
            "used_gpu_hours": self.used,
            "forecast_gpu_hours": self.forecast.to_json(),
            "runs": self.num_runs,
        }


@dataclass(frozen=True)
class CampaignProgress:
    """The plan compared with what happened."""

    campaign: Campaign
    stages: tuple[StageProgress, ...]
    elsewhere: float
    """GPU-hours of runs outside every stage."""

    @property
    def used(self) -> float:
        return sum(stage.used for stage in self.stages) + self.elsewhere

    @property
    def forecast(self) -> Spread:
        """Return the GPU-hours of the campaign at its end; spent hours are certain."""
        rest = [Spread(*(max(0.0, q - s.used) for q in astuple(s.forecast))) for s in self.stages]
        return total(rest) + self.used

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.campaign.name,
            "days": self.campaign.days,
            "planned_gpu_hours": self.campaign.gpu_hours,
            "used_gpu_hours": self.used,
            "elsewhere_gpu_hours": self.elsewhere,
            "forecast_gpu_hours": self.forecast.to_json(),
            "stages": [stage.to_json() for stage in self.stages],
        }


def load_campaign(name: str, gpu_hours: float | None = None) -> Campaign:
    """Return the campaign at path `name`, or of that name in configs/campaign/.

    Raise ConfigError if there is no such file, or for an unknown key or an invalid value.

    Args:
        gpu_hours: the grant; replaces the file's own. A stage's own `gpu_hours` stay.
    """
    folder = assets("configs") / "campaign"
    path = find_named("campaign", name, (folder / f"{name}.yaml", Path(name)), folder)
    found = read_section(path, _File)
    if not found.stages or not all(isinstance(block, dict) for block in found.stages):
        raise ConfigError(f"{path}: stages must be a list of blocks, each with name, days and share")
    return Campaign(
        name=found.name or path.stem,
        stages=tuple(_stage(block, gpu_hours or found.gpu_hours, str(path)) for block in found.stages),
        start=day(found.start, f"{path}: start"),
    )


def follow(campaign: Campaign, runs: Sequence[RunLedger], now: float) -> CampaignProgress:
    """Count each run to its stage and forecast the rest."""
    began = campaign.start or min((run.start for run in runs), default=now)
    ends = [began + _DAY * days for days in accumulate(stage.days for stage in campaign.stages)]
    starts = [began, *ends[:-1]]
    members: dict[int | None, list[RunLedger]] = {}
    for run in runs:
        members.setdefault(_stage_of(run, campaign.stages, starts, ends), []).append(run)
    stages = []
    for i, (stage, start, end) in enumerate(zip(campaign.stages, starts, ends, strict=True)):
        inside = members.get(i, [])
        used = sum(run.used for run in inside)
        rest = total([run.to_come for run in inside])
        if now < end:  # later, what the plan had left will not be spent any more
            planned = remaining(around(stage.gpu_hours), used)
            rest = Spread(*(max(a, b) for a, b in zip(astuple(planned), astuple(rest), strict=True)))
        stages.append(
            StageProgress(
                stage=stage,
                start=start,
                end=end,
                used=used,
                num_runs=len(inside),
                forecast=rest + used,
                when="ahead" if now < start else "past" if now >= end else "now",
            )
        )
    return CampaignProgress(campaign, tuple(stages), sum(run.used for run in members.get(None, [])))


def follow_campaign(
    budget: Budget | None, runs: Sequence[RunLedger], now: float, name: str | None = None
) -> CampaignProgress | None:
    """Follow the campaign `name`, else the budget's, by its runs on GPUs; None if there is none.

    Raise ConfigError as `load_campaign` does.
    """
    name = name or (budget.campaign if budget else None)
    if name is None:
        return None
    plan = load_campaign(name, budget.gpu_hours if budget else None)
    counted = [run for run in runs if run.unit == "GPU-hours"]
    if plan.start is not None:  # an earlier campaign's runs have the same stages
        counted = [run for run in counted if run.is_live or run.end > plan.start]
    return follow(plan, counted, now)


def _stage_of(
    run: RunLedger, stages: Sequence[CampaignStage], starts: Sequence[float], ends: Sequence[float]
) -> int | None:
    for i, stage in enumerate(stages):
        if any(fnmatchcase(name, glob) for glob in stage.runs for name in (run.run_id, run.summary.job_name)):
            return i
    for i, stage in enumerate(stages):
        if run.stage in stage.stages:
            return i
    spans = enumerate(zip(starts, ends, strict=True))
    return next((i for i, (start, end) in spans if start <= run.start < end), None)


def _stage(values: dict[str, Any], whole: float | None, where: str) -> CampaignStage:
    name = values.get("name")
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{where}: each of stages needs a name")
    place = f"{where}: stage {printable(name)}"
    block = as_section(values, _Block, place)
    if block.days is None:
        raise ConfigError(f"{place}: days is missing")
    hours = block.gpu_hours
    if hours is None:
        if block.share is None or whole is None:
            raise ConfigError(f"{place}: give gpu_hours, or share here and gpu_hours for the campaign")
        hours = block.share * whole
    for stage in block.stages:
        if stage not in STAGES:
            raise ConfigError(
                f"{place}: stages has {stage!r}{nearest(stage, STAGES)}; a run's stage is one of "
                f"{', '.join(STAGES)}"
            )
    return CampaignStage(name, block.days, hours, tuple(block.runs), tuple(block.stages))
