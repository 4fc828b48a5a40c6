"""Submit a sweep, or continue one: add points, resume unfinished ones, skip finished ones.

done = submit_sweep(order, {"train.lr": ["1e-4", "3e-4"]}, at_most=4)
done["points"], done["estimate"]

On Slurm every point is a job. With `at_most` K the jobs form K lanes, in each of which a job waits by
`afterany` for the one before it: no process controls them. At most 500 points wait or run at once.
"""

import math
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

from r1hpc.attempt.state.state import slurm_jobs
from r1hpc.base.errors import R1hpcError, UsageError
from r1hpc.base.run_dir import RunDir
from r1hpc.config import load, snapshot
from r1hpc.config.assets import find_job
from r1hpc.config.stages import find_workload
from r1hpc.plan.hours.spread import Spread, total
from r1hpc.slurm import defaults, fields
from r1hpc.submission import start_run
from r1hpc.submission.chain.folder import SUBMISSION, held, supervisor_pid
from r1hpc.submission.order import DEFAULT_JOB, Order, Purpose
from r1hpc.submission.plan_run import PlannedRun, check_budget, show_to_slurm
from r1hpc.submission.submit import budget_held
from r1hpc.sweeps.definition import Definition, Grid, Point, SweepDir, groups_of
from r1hpc.sweeps.plan import MAY_CHANGE, Planner, PointStep, choose, config_of
from r1hpc.sweeps.samples import Samples, draw
from r1hpc.telemetry.records.rungs import Halving

MOST_QUEUED = 500
"""Points of one sweep that wait or run at once: more would burden slurmctld for everybody."""
_MOST_NOTES = 20
Jobs = dict[str, str]
"""Job IDs by point."""


class Chosen(NamedTuple):
    """Successive halving as asked for."""

    rungs: int
    keep: float
    """Share that goes on after each rung."""
    by: str
    lower: bool


def submit_sweep(
    order: Order,
    grid: Grid,
    at_most: int | None = None,
    halving: Chosen | None = None,
    samples: Samples | None = None,
) -> dict[str, Any]:
    """Begin a sweep, or continue the one of this name; return the object of --json.

    Raise UsageError if a point cannot run as described, or the sweep is another one. Raise R1hpcError if the
    budget is too small, or Slurm refuses or does not answer.

    Args:
        order: its overrides are the same for all points.
        at_most: points that run at once; None: all on Slurm, else 1.
        halving: stops worse points early; None: none is stopped.
        samples: draws the settings that have a range; None: none has one.
    """
    executor, notes = defaults.choose_executor(order.executor, will_submit=order.purpose is Purpose.start)
    order = replace(order, executor=executor)
    sweep, definition = _defined(order, grid, halving, samples)
    with nullcontext() if order.is_dry_run else budget_held(order.counted_root):
        steps, planner = choose(sweep, _in_order(definition), executor), Planner(sweep, definition, order)
        to_do = [step for step in steps if step.action.makes_a_job]
        groups = planner.groups(to_do)
        notes += definition.spellings()[:_MOST_NOTES]
        notes += check_budget(groups, order.counted_root, order.over_budget)
        notes += list(dict.fromkeys(note for planned in groups for note in planned.notes))[:_MOST_NOTES]
        jobs = {step.point.name: step.job_id for step in steps if step.job_id is not None}
        if order.is_dry_run and groups and (trial := show_to_slurm(groups[0])):
            notes.append(trial.sentence)
        if to_do and not order.is_dry_run:
            ready = [planner.plan(step) for step in to_do[: max(0, MOST_QUEUED - len(jobs))]]
            _carry_out(sweep, definition, steps, ready, order, at_most, jobs)
    return {
        "sweep": sweep.name,
        "sweep_dir": str(sweep.path),
        "executor": executor,
        "dry_run": order.is_dry_run,
        "counts": Counter(step.action for step in steps),
        "not_in_queue": sum(step.point.name not in jobs for step in to_do),
        "estimate": {unit: _cost(groups, unit) for unit in ("gpu_hours", "node_hours")},
        "rungs": _course(definition),
        "notes": notes,
        "points": [
            {"point": name, "settings": settings, "action": action, "job_id": jobs.get(name)}
            for (name, settings), _, action, _ in steps
        ],
    }


def _course(definition: Definition) -> dict[str, Any] | None:
    """Return how many settings may be expected to go on to which step, and their share of all steps.

    Settings come to a rung in any order: of the first i, the i-th is in the best k with the chance k / i.
    """
    if (rungs := definition.rungs) is None:
        return None
    points = definition.points()
    config = config_of(definition, points[0])
    most = find_workload(config.stage).steps(config) or 0
    left = len(groups_of(points))
    course, begin, taken, num_settings = [], 0, 0, left
    for step in (*rungs["steps"], most):
        course.append({"step": step, "settings": left})
        taken, begin = taken + left * (step - begin), step
        left = round(sum(max(1, math.floor(rungs["keep"] * i + 1e-9)) / i for i in range(1, left + 1)))
    return {"expected": course, "share": taken / (num_settings * most)}


def _in_order(definition: Definition) -> list[Point]:
    """Return the points; with rungs the seeds of a setting are neighbours, so that they run together."""
    points = definition.points()
    if definition.rungs is None:
        return points
    by_name = {point.name: point for point in points}
    return [by_name[name] for group in groups_of(points) for name in group]


def _cost(groups: Sequence[PlannedRun], unit: str) -> dict[str, float] | None:
    """Return the hours of all unfinished points; None if they are not known."""
    runs = [each for each in groups if bool(each.plan.topology.num_gpus) == (unit == "gpu_hours")]
    known = [hours for each in runs if (hours := (each.estimate or {}).get(unit))]
    is_known = known and len(known) == len(runs)
    return total(list(map(Spread.of_json, known))).to_json() if is_known else None


def _defined(
    order: Order, grid: Grid, halving: Chosen | None, samples: Samples | None
) -> tuple[SweepDir, Definition]:
    """Return the folder, and the definition with the new points."""
    job = find_job(order.job or DEFAULT_JOB)
    sweep = SweepDir(order.folder(order.run_name or f"{job.stem[:56]}-sweep").path)
    layers = [layer for _, layer in load.named_layers(job)]
    grids, drawn_from = draw(grid, samples)
    overrides = list(order.overrides)
    fresh = Definition(str(job.absolute()), layers, overrides, order.cluster, grids, drawn_from=drawn_from)
    if halving is not None:
        fresh = replace(fresh, rungs=_rungs(config_of(fresh, fresh.points()[0]), halving))
    if SweepDir.find(sweep.path) is None:
        if sweep.path.is_dir() and {path.name for path in sweep.path.iterdir()} - {"shared", sweep.lock.name}:
            raise UsageError(f"{sweep.path} is there and is no sweep: choose another --run-name")
        return sweep, _with_groups(fresh)
    frozen = sweep.read()
    differs = {
        "the job file": (fresh.source, fresh.layers) != (frozen.source, frozen.layers),
        "the settings of all points": _lasting(fresh) != _lasting(frozen),
        "the varied settings": set(grid) != set(frozen.grids[0]),
        f"the ranges ({' '.join(frozen.drawn_from) or 'none'})": drawn_from != frozen.drawn_from,
        "the rungs": fresh.rungs is not None and not _same_rungs(fresh.rungs, frozen.rungs),
    }
    if any(differs.values()):
        what = " and ".join(name for name, is_other in differs.items() if is_other)
        raise UsageError(
            f"{what} must be the same as when {sweep.name} was begun: or take another --run-name"
        )
    grids = [{key: values[key] for key in frozen.grids[0]} for values in grids]
    added = {repr(values): values for values in (*frozen.grids, *grids)}
    return sweep, _with_groups(replace(fresh, grids=list(added.values()), rungs=frozen.rungs))


def _with_groups(definition: Definition) -> Definition:
    """Add the points of each setting to the rungs, which compare settings."""
    if definition.rungs is None:
        return definition
    return replace(definition, rungs={**definition.rungs, "groups": groups_of(definition.points())})


def _same_rungs(asked: Halving, frozen: Halving | None) -> bool:
    """True if these rungs are those of the sweep, whatever its points."""
    return frozen is not None and {**asked, "groups": None} == {**frozen, "groups": None}


def _lasting(definition: Definition) -> list[str]:
    return sorted(item for item in definition.overrides if not item.startswith(MAY_CHANGE))


def _rungs(config: Any, chosen: Chosen) -> Halving:
    most, keep = find_workload(config.stage).steps(config) or 0, chosen.keep
    steps = [round(most * keep**power) for power in range(chosen.rungs - 1, 0, -1)]
    if not steps or len({0, *steps}) <= len(steps) or not 0 < keep < 1:
        raise UsageError(
            f"{chosen.rungs} rungs that keep {keep:.3g} do not fit {most} steps: give --rungs 2 or more, a "
            "--keep below 1, and enough steps (train.num_steps, script.steps)"
        )
    return Halving(steps=steps, keep=keep, by=chosen.by, lower=chosen.lower, groups=[])


def _carry_out(
    sweep: SweepDir,
    definition: Definition,
    steps: Sequence[PointStep],
    ready: Sequence[PlannedRun],
    order: Order,
    at_most: int | None,
    jobs: Jobs,
) -> None:
    """Freeze what is shared, then start every point of `ready`; add their jobs to `jobs`."""
    if (pid := supervisor_pid(sweep)) is not None:
        raise UsageError(
            f"{sweep.name} runs here (process {pid}): wait for its end, or cancel it by `r1hpc cancel "
            f"{sweep.path}`. Then the same command adds and resumes points"
        )
    start_run.create_parent(RunDir(sweep.path))
    sweep.path.mkdir(mode=0o700, exist_ok=True)
    with held(sweep, SUBMISSION) as lock:
        is_new = not sweep.definition.is_file()
        if is_new and ready[0].shared is not None:
            shutil.rmtree(sweep.shared.path, ignore_errors=True)  # left by a call that was cut off
            sweep.shared.path.mkdir(mode=0o700)
            snapshot.freeze(sweep.shared, ready[0].config, order.argv, order.overrides)
            sweep.shared.config.unlink()  # it is no run
        sweep.save(definition)
        try:
            if order.executor == "slurm":
                _queue(steps, ready, order, at_most, jobs)
            elif ready:
                runs = [step.run for step in steps if step.job_id is not None]
                runs += [planned.run for planned in ready]
                job_id = start_run.supervise(sweep, ready, runs, order, lock, at_most or 1)
                jobs |= dict.fromkeys((planned.run.run_id for planned in ready), job_id)
        except (R1hpcError, OSError):
            if is_new and not any(step.run.path.exists() for step in steps):  # the job file may be mended
                shutil.rmtree(sweep.path)
            raise


def _queue(
    steps: Sequence[PointStep], ready: Sequence[PlannedRun], order: Order, at_most: int | None, jobs: Jobs
) -> None:
    """Submit each point's job. Raise R1hpcError if Slurm refuses one; those before it are submitted."""
    for step in steps:
        if step.job_id is not None and step.job_id not in slurm_jobs(step.run):
            start_run.adopt(step.run, step.job_id)
    lanes = _lanes(list(jobs.values()), at_most)
    for planned in ready:
        start_run.clear_incomplete(planned.run)
        lane = next(lanes)
        ties = [planned.config.resources.dependency, f"afterany:{':'.join(lane)}" if lane else None]
        options = {"dependency": fields.check("dependency", ",".join(filter(None, ties)))} if lane else {}
        try:
            job_id = start_run.start(replace(planned, script=planned.script.with_options(options)), order)
        except R1hpcError as error:
            if "MaxSubmit" in str(error) and jobs:  # the user's limit: the rest comes with another call
                return
            again = f"\n{len(jobs)} points have a job: the same command goes on from there" if jobs else ""
            raise R1hpcError(f"point {planned.run.run_id}: {error}{again}") from None
        jobs[planned.run.run_id] = job_id
        lane[:] = [job_id]


def _lanes(jobs: Sequence[str], at_most: int | None) -> Iterator[list[str]]:
    """Yield for each new job those that it waits for; the caller puts the new one in their place."""
    lanes = [list(jobs[number::at_most]) for number in range(at_most or 0)]
    number = len(jobs)
    while True:
        yield lanes[number % len(lanes)] if lanes else []
        number += 1
