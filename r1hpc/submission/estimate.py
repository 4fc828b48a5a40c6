"""Estimate for `estimate` what a run, or each stage of a chain and their sum, would cost, without submitting.

A run is estimated without a cluster, on a given number of GPUs.
"""

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from r1hpc.attempt.workload import workload_of
from r1hpc.base.errors import UsageError
from r1hpc.base.names import printable
from r1hpc.base.tables import format_table, wrap
from r1hpc.base.units import amount, format_duration, parse_time
from r1hpc.config import load, paths
from r1hpc.config.schema.run import RunConfig
from r1hpc.config.stages import is_server
from r1hpc.plan.hours.estimate import Estimate, seed_estimate, text_gigabytes
from r1hpc.plan.hours.estimate_run import as_if_on_gpus
from r1hpc.plan.hours.goodput import FailureRates
from r1hpc.plan.hours.spread import NOTHING, Spread, total
from r1hpc.plan.run import RunPlan, make_plan
from r1hpc.plan.topology.gpus import find_gpu
from r1hpc.submission.chain.file import read_definition
from r1hpc.submission.chain.folder import ChainDir
from r1hpc.submission.chain_steps import StageStep, plan_steps
from r1hpc.submission.order import Order
from r1hpc.submission.plan_run import ASSUMED_GPUS_PER_NODE, PlannedRun

_UNITS = ("GPU-hours", "node-hours")


def estimate_job(
    job: str,
    overrides: Sequence[str] = (),
    *,
    cluster: str | None = None,
    gpu: str | None = None,
    num_gpus: int | None = None,
    rates: FailureRates | None = None,
    by_article: bool = False,
) -> Estimate:
    """Estimate one run.

    Raise ConfigError or UsageError if it cannot run as described, or its size is unknown.

    Args:
        cluster: name of a profile.
        gpu, num_gpus: replace those of the job.
        rates: the site's own failures and preemptions; None takes published ones.
        by_article: use the article's formula instead.
    """
    config = paths.with_absolute_paths(load.load(job, overrides, cluster))
    if gpu is not None:
        cluster_of = replace(config.cluster, gpu_type=find_gpu(gpu).name)
        config = replace(config, cluster=cluster_of, resources=replace(config.resources, gpu_type=None))
    if is_server(config.stage):
        raise UsageError(
            f"{printable(job)} is a server: it costs its GPUs x running time, at most the time limit"
        )
    uncounted = ""
    try:
        config = workload_of(config.stage).complete(config)
    except UsageError as error:  # the files may exist only on the cluster
        uncounted = f"the questions of the test files could not be counted: {error}"
    plan = _plan(config, num_gpus)
    found = workload_of(config.stage).estimate(config, plan, rates)
    if found is None:
        raise UsageError(
            f"{printable(job)}: the model's parameters are not known before it is built; give "
            "--params and --tokens in its place"
        )
    if by_article:
        return seed_estimate(float(plan.num_parameters or 0), text_gigabytes(plan.total_tokens))
    if found.gpu_hours is None:
        rules, memory = as_if_on_gpus(config, plan)
        found = replace(found, baselines=rules, memory=memory)
    return replace(found, notes=(*found.notes, uncounted)) if uncounted else found


def _plan(config: RunConfig, num_gpus: int | None) -> RunPlan:
    asked, nodes = config.resources.gpus_per_node, config.resources.nodes
    per_node = config.cluster.gpus_per_node if asked is None else asked
    per_node = ASSUMED_GPUS_PER_NODE if per_node is None else per_node
    if num_gpus is not None and per_node:
        if num_gpus < 1:
            raise UsageError(f"--num-gpus is {num_gpus}: it must be at least 1")
        if num_gpus <= per_node:
            per_node, nodes = num_gpus, 1
        elif num_gpus % per_node:
            raise UsageError(f"--num-gpus {num_gpus} is not a multiple of the {per_node} GPUs of a node")
        else:
            nodes = num_gpus // per_node
    limit = config.resources.time
    return make_plan(
        config,
        gpus_per_node=per_node,
        num_nodes=nodes,
        vocab_size=workload_of(config.stage).vocab_size(config),
        time_limit_s=None if limit is None else parse_time(limit),
    )


@dataclass(frozen=True)
class StageCost:
    name: str
    planned: PlannedRun
    estimate: Mapping[str, Any]
    """Estimate.to_json(), for a CPU stage with the rules of thumb and memory of GPUs; empty if unknown."""

    @property
    def unit(self) -> str:
        return "GPU-hours" if self.planned.plan.topology.num_gpus else "node-hours"

    @property
    def width(self) -> int:
        """Return the GPUs, or the nodes of a CPU stage."""
        return self.planned.plan.topology.num_gpus or self.planned.plan.topology.num_nodes

    def to_json(self) -> dict[str, Any]:
        hours = self.planned.hours and self.planned.hours.to_json()
        return {
            "stage": self.name,
            "kind": self.planned.config.stage,
            "gpus" if self.unit == "GPU-hours" else "nodes": self.width,
            "gpu_hours": hours if self.unit == "GPU-hours" else None,
            "node_hours": hours if self.unit == "node-hours" else None,
            "time_limit_s": self.planned.plan.time_limit_s,
            "assumptions": self.estimate.get("assumptions", {}),
            "baselines": self.estimate.get("baselines", {}),
            "memory": self.estimate.get("memory"),
        }


@dataclass(frozen=True)
class ChainCost:
    stages: tuple[StageCost, ...]
    notes: tuple[str, ...] = ()

    def sum(self, unit: str) -> Spread:
        """Return the sum over the estimated stages, whose errors partly agree (plan.hours.spread.total)."""
        return total([hours for each in self.stages if each.unit == unit and (hours := each.planned.hours)])

    @property
    def unknown(self) -> list[str]:
        return [each.name for each in self.stages if each.planned.hours is None]

    def to_json(self) -> dict[str, Any]:
        on_gpus, on_cpus = (self.sum(unit) for unit in _UNITS)
        estimates = [each.estimate for each in self.stages if each.estimate]
        assumed = [each["assumptions"] for each in estimates]
        first = assumed[0] if assumed else {}
        shared = {key: value for key, value in first.items() if all(a.get(key) == value for a in assumed)}
        baselines: Counter[str] = Counter()
        for each in estimates:
            baselines.update(each.get("baselines", {}))
        plans = [plan for each in estimates if (plan := each.get("memory"))]
        return {
            "gpu_hours": None if on_gpus == NOTHING else on_gpus.to_json(),
            "node_hours": None if on_cpus == NOTHING else on_cpus.to_json(),
            "assumptions": shared,
            "baselines": dict(baselines),
            # Of the stage whose leanest configuration is the largest.
            "memory": max(plans, key=lambda plan: float(plan["smallest"]["total_gib"]), default=None),
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

    Raise ConfigError or UsageError if a stage cannot be planned as described.
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
    estimate = step.planned.estimate or {}
    if estimate and not step.planned.plan.topology.num_gpus:
        rules, memory = as_if_on_gpus(step.planned.config, step.planned.plan)
        estimate = {**estimate, "baselines": rules, "memory": memory and memory.to_json()}
    return StageCost(step.stage.name, step.planned, estimate)


def _row(each: StageCost) -> Sequence[str]:
    kind = "GPU" if each.unit == "GPU-hours" else "node"
    width = f"{each.width} {kind}{'s' * (each.width != 1)}"
    limit_s, hours = each.planned.plan.time_limit_s, each.planned.hours
    limit = "" if limit_s is None else format_duration(limit_s)
    figures = ("-", "", "") if hours is None else (*_figures(hours), each.unit)
    return (each.name, each.planned.config.stage, width, *figures, limit)


def _figures(spread: Spread) -> tuple[str, str]:
    return amount(spread.p50), f"{amount(spread.p10)} to {amount(spread.p90)}"
