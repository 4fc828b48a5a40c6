"""Estimate what a chain will cost before any of it is submitted: the hours of each stage, and their sum."""

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from r1hpc.accounting.forecast import NOTHING, Spread, total
from r1hpc.base.tables import format_table, wrap
from r1hpc.base.units import amount, format_duration
from r1hpc.plan.hours.estimate_run import as_if_on_gpus
from r1hpc.submission.chain.file import read_definition
from r1hpc.submission.chain.folder import ChainDir
from r1hpc.submission.chain_steps import StageStep, plan_steps
from r1hpc.submission.order import Order

_UNITS = ("GPU-hours", "node-hours")


@dataclass(frozen=True)
class StageCost:
    """Cost of one stage."""

    name: str
    kind: str
    width: int
    """GPUs, or nodes of a CPU stage."""
    unit: str
    """GPU-hours or node-hours."""
    hours: Spread | None
    """None: unknown."""
    time_limit_s: int | None
    """For one attempt."""
    estimate: Mapping[str, Any] = field(default_factory=dict)
    """Estimate.to_json(); empty if unknown."""

    def to_json(self) -> dict[str, Any]:
        hours = None if self.hours is None else self.hours.to_json()
        return {
            "stage": self.name,
            "kind": self.kind,
            "gpus" if self.unit == "GPU-hours" else "nodes": self.width,
            "gpu_hours": hours if self.unit == "GPU-hours" else None,
            "node_hours": hours if self.unit == "node-hours" else None,
            "time_limit_s": self.time_limit_s,
            "assumptions": self.estimate.get("assumptions", {}),
            "baselines": self.estimate.get("baselines", {}),
            "memory": self.estimate.get("memory"),
        }


@dataclass(frozen=True)
class ChainCost:
    """All stages in order."""

    stages: tuple[StageCost, ...]
    notes: tuple[str, ...] = ()

    def sum(self, unit: str) -> Spread:
        """Return the sum over the estimated stages; their errors partly agree: see forecast.total."""
        return total([each.hours for each in self.stages if each.unit == unit and each.hours is not None])

    @property
    def unknown(self) -> list[str]:
        return [each.name for each in self.stages if each.hours is None]

    @property
    def assumptions(self) -> dict[str, Any]:
        """Return the assumptions that all estimated stages share."""
        found = [each.estimate["assumptions"] for each in self.stages if each.estimate]
        first = found[0] if found else {}
        return {key: value for key, value in first.items() if all(each.get(key) == value for each in found)}

    @property
    def baselines(self) -> dict[str, float]:
        """Return GPU-hours, summed over the estimated stages."""
        sums: Counter[str] = Counter()
        for each in self.stages:
            sums.update(each.estimate.get("baselines", {}))
        return dict(sums)

    @property
    def memory(self) -> dict[str, Any] | None:
        """Return the memory plan of the stage whose leanest configuration is the largest."""
        plans = [plan for each in self.stages if (plan := each.estimate.get("memory"))]
        return max(plans, key=lambda plan: float(plan["smallest"]["total_gib"]), default=None)

    def to_json(self) -> dict[str, Any]:
        on_gpus, on_cpus = (self.sum(unit) for unit in _UNITS)
        return {
            "gpu_hours": None if on_gpus == NOTHING else on_gpus.to_json(),
            "node_hours": None if on_cpus == NOTHING else on_cpus.to_json(),
            "assumptions": self.assumptions,
            "baselines": self.baselines,
            "memory": self.memory,
            "stages": [each.to_json() for each in self.stages],
            "not_estimated": self.unknown,
            "notes": list(self.notes),
        }

    def text(self) -> str:
        """Return a table for a terminal, and what it leaves out."""
        rows = [_row(each) for each in self.stages]
        for unit in _UNITS:
            if (spread := self.sum(unit)) != NOTHING:
                rows.append(("all", "", "", *_figures(spread), unit, ""))
        headings = ("stage", "kind", "on", "estimate", "P10 to P90", "", "time limit")
        lines = [format_table(headings, rows, right={3, 4}, indent="  ")]
        if self.unknown:
            lines.append(wrap(f"not estimated: {', '.join(self.unknown)}"))
        return "\n".join([*lines, *(wrap(f"note: {note}") for note in self.notes)])


def estimate_chain(job: Path, order: Order) -> ChainCost:
    """Estimate every stage as `submit --dry-run` would plan it, corrected by the site's runs; ignore budgets.

    Raises:
        ConfigError, UsageError: a stage cannot be planned as described.
    """
    with tempfile.TemporaryDirectory() as folder:  # a name that no chain has; nothing is written
        chain = ChainDir(Path(folder) / "chain")
        definition = read_definition(job, chain, order.overrides, order.cluster)
        steps = plan_steps(chain, definition, order)
    planned = [step.planned for step in steps if step.planned is not None]
    notes = dict.fromkeys(note for each in planned for note in (each.estimate or {}).get("notes", ()))
    return ChainCost(tuple(_cost(step) for step in steps), tuple(notes))


def _cost(step: StageStep) -> StageCost:
    assert step.planned is not None, "a stage that has no folder is planned"
    plan = step.planned.plan
    where = plan.topology
    unit = "GPU-hours" if where.num_gpus else "node-hours"
    estimate = step.planned.estimate or {}
    if estimate and not where.num_gpus:
        rules, memory = as_if_on_gpus(step.planned.config, plan)
        estimate = {**estimate, "baselines": rules, "memory": memory and memory.to_json()}
    hours = estimate.get("gpu_hours" if where.num_gpus else "node_hours")
    return StageCost(
        name=step.stage.name,
        kind=step.stage.config.stage,
        width=where.num_gpus or where.num_nodes,
        unit=unit,
        hours=None if hours is None else Spread.of_json(hours),
        time_limit_s=plan.time_limit_s,
        estimate=estimate,
    )


def _row(each: StageCost) -> Sequence[str]:
    kind = "GPU" if each.unit == "GPU-hours" else "node"
    limit = "" if each.time_limit_s is None else format_duration(each.time_limit_s)
    hours = ("-", "", "") if each.hours is None else (*_figures(each.hours), each.unit)
    return (each.name, each.kind, f"{each.width} {kind}{'s' * (each.width != 1)}", *hours, limit)


def _figures(spread: Spread) -> tuple[str, str]:
    return amount(spread.p50), f"{amount(spread.p10)} to {amount(spread.p90)}"
