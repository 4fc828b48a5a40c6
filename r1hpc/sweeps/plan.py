"""Plan a sweep: what each point needs now, and what all of them cost; and cancel its points.

steps = choose(sweep, definition.points(), "slurm")
planner = Planner(sweep, definition, order)
groups = planner.groups(steps)          # runs of equal cost, planned once
planned = planner.plan(steps[0])        # as an ordinary run
"""

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from r1hpc.attempt.state.cancel import cancel_job, touch_stop
from r1hpc.attempt.state.state import read_situation
from r1hpc.base.errors import R1hpcError, UsageError
from r1hpc.base.run_dir import RunDir
from r1hpc.config import load
from r1hpc.config.other_names import without_removed
from r1hpc.config.schema.run import RunConfig
from r1hpc.plan.hours.spread import Spread
from r1hpc.slurm import defaults, queue
from r1hpc.slurm.shell import contract
from r1hpc.submission.chain_steps import Action
from r1hpc.submission.order import Order
from r1hpc.submission.plan_run import OrderFacts, PlannedRun, share_done
from r1hpc.submission.resume import OF_THE_PLACE, plan_inside
from r1hpc.sweeps.definition import Definition, Point, SweepDir, groups_of, is_setting
from r1hpc.telemetry.records.rungs import stopped_at

_MOST_TRIED = 8
MAY_CHANGE = (*OF_THE_PLACE, "checkpoint.")
"""Sections that may differ between two calls of a sweep."""
_WITH_CODE = ("task.", "reward.", "evaluate.", "model.chat_template")
"""Settings that may name files to freeze: each point of such a sweep has its own copy of the code."""


class PointStep(NamedTuple):
    """One point, what is done with it, and the job that it has already."""

    point: Point
    run: RunDir
    action: Action
    job_id: str | None = None


def choose(sweep: SweepDir, points: Sequence[Point], executor: str) -> list[PointStep]:
    """Return what each point needs now. Slurm is asked once, for the jobs of all."""
    there = {path.name for path in sweep.path.iterdir()} if sweep.path.is_dir() else set()
    asks = executor == "slurm" and defaults.slurm_is_here() and any(p.name in there for p in points)
    jobs, dropped = queue.jobs_by_folder() if asks else {}, _dropped(sweep, points)
    live = {folder.resolve(): each for folder, each in jobs.items()}  # perhaps submitted through a link
    folder = sweep.path.resolve()
    steps = []
    for point in points:
        run, job = sweep.stage(point.name), None
        action = Action.drop if point.name in dropped else Action.resume
        if point.name not in there or not run.config.is_file():
            action = Action.drop if point.name in dropped else Action.submit
        elif run.finished.exists():
            action = Action.skip
        elif executor == "local":
            now = read_situation(run)
            job = now.job.job_id if now.job is not None and now.state.is_at_work else None
        else:
            job = live.get(folder / point.name, [None])[-1]
        steps.append(PointStep(point, run, Action.leave if job else action, job))
    return steps


def _dropped(sweep: SweepDir, points: Sequence[Point]) -> set[str]:
    """Return the points that a rung stopped, with the other seeds of their settings, new ones too."""
    stopped = set(stopped_at(sweep.path))
    return stopped | {name for group in groups_of(points) if stopped & set(group) for name in group}


def config_of(definition: Definition, point: Point) -> RunConfig:
    """Return the configuration of a point, with its placeholders filled in script.args.

    Raise ConfigError or UsageError if a value is impossible.
    """
    varied = [f"{key}={value}" for key, value in point.settings.items() if is_setting(key)]
    layers = [without_removed(layer) for layer in definition.layers]
    config = load.merge_layers(layers, [*definition.overrides, *varied], definition.cluster)
    for key in (key for key in point.settings if not is_setting(key)):
        args = [word.replace(f"{{{key}}}", point.settings[key]) for word in config.script.args]
        if args == config.script.args:
            raise UsageError(
                f"{key} is no setting, which has a section, as train.lr has. For your script's own argument "
                f"write {{{key}}} where its value goes"
            )
        config = replace(config, script=replace(config.script, args=args))
    return config


class Planner:
    """Plans points as ordinary runs, with the cluster asked once."""

    def __init__(self, sweep: SweepDir, definition: Definition, order: Order) -> None:
        self._sweep, self._definition, self._order = sweep, definition, order
        self._ask = functools.cache(defaults.ask_cluster)
        self._keys = list(definition.grids[0])
        self.shared = None if any(key.startswith(_WITH_CODE) for key in self._keys) else sweep.shared

    def plan(self, step: PointStep) -> PlannedRun:
        """Return the plan of a point; one that is resumed keeps its configuration and code.

        Raise UsageError with the point if it cannot run as described.
        """
        order, config = self._order, None
        try:
            if step.action is Action.resume:
                changes = tuple(item for item in order.overrides if item.startswith(MAY_CHANGE))
                order = replace(order, overrides=changes)
            else:
                config = config_of(self._definition, step.point)
            planned = plan_inside(self._sweep.name, config, OrderFacts(step.run, order=order), self._ask)
        except UsageError as error:
            raise type(error)(f"point {step.point.name}: {error}") from None
        if self.shared is None:
            return planned
        script = replace(planned.script, contract=contract.of_frozen(self.shared.code))
        return replace(planned, script=script, shared=self.shared)

    def groups(self, steps: Sequence[PointStep]) -> list[PlannedRun]:
        """Return for each group of points with the same plan a run that costs as much as the group.

        A setting that changes neither plan nor cost of the first point, such as a seed, makes no groups.
        """
        new = [step._replace(action=Action.submit) for step in steps]
        keys = [key for key in self._keys if new and self._matters(key, new)]
        shares: dict[tuple[str, ...], float] = {}
        first: dict[tuple[str, ...], PointStep] = {}
        for old, step in zip(steps, new, strict=True):
            group = tuple(step.point.settings[key] for key in keys)
            first.setdefault(group, step)
            left = 1.0
            if old.action is Action.resume:
                left -= share_done(old.run, load.read(old.run.config).train.num_steps)
            shares[group] = shares.get(group, 0.0) + left
        return [_times(self.plan(step), shares[group]) for group, step in first.items()]

    def _matters(self, key: str, steps: Sequence[PointStep]) -> bool:
        """True if the first point's plan or cost depend on this setting; of many numbers three are tried."""
        base = self.plan(steps[0])
        values = list(dict.fromkeys(step.point.settings[key] for step in steps))
        if len(values) > _MOST_TRIED:
            with contextlib.suppress(ValueError):
                ordered = sorted(values, key=float)
                values = [ordered[0], ordered[len(ordered) // 2], ordered[-1]]
        for value in values:
            point = steps[0].point._replace(settings={**steps[0].point.settings, key: value})
            try:
                other = self.plan(steps[0]._replace(point=point))
            except R1hpcError:  # perhaps no point of the sweep
                return True
            if (other.plan, other.estimate) != (base.plan, base.estimate):
                return True
        return False


def _times(planned: PlannedRun, factor: float) -> PlannedRun:
    """Return a run that costs so many times as much: equal runs err together."""
    hours = {name: (planned.estimate or {}).get(name) for name in ("gpu_hours", "node_hours")}
    known = {name: (Spread.of_json(each) * factor).to_json() for name, each in hours.items() if each}
    most = planned.plan.gpu_hours_ceiling
    plan = replace(planned.plan, gpu_hours_ceiling=None if most is None else most * factor)
    return replace(planned, plan=plan, estimate={**(planned.estimate or {}), **known} or None)


def cancel_sweep(sweep: SweepDir, save_first: bool = False) -> dict[str, str]:
    """Cancel every point that waits or runs, the last first, so that none begins because another ends."""
    end, done = touch_stop if save_first else cancel_job, {}
    for point in reversed(sweep.read().points()):
        run = sweep.stage(point.name)
        if run.config.is_file() and (now := read_situation(run)).state.is_at_work:
            done[point.name] = end(run, now).text
    return done
