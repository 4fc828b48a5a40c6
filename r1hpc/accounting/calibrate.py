"""Collect the finished runs under a run root, and compare their hours with their estimates, for `calibrate`.

For `estimate` and `submit`, `corrected` corrects a new estimate by them; correction.py has the mathematics.

A finished run does not change: results are kept in RUN_ROOT/calibration.json, until Slurm tells more. The
file may be removed at any time.
"""

import contextlib
import math
import os
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from r1hpc.accounting.correction import (
    CPU,
    Correction,
    FinishedRun,
    Planned,
    Scored,
    correction,
    effect,
    score,
)
from r1hpc.base.choose_run import all_runs, full_name, unreadable
from r1hpc.base.errors import R1hpcError
from r1hpc.base.files import read_object, write_json
from r1hpc.base.records import mistake
from r1hpc.base.run_dir import RunDir
from r1hpc.base.tables import format_table, wrap
from r1hpc.config import load
from r1hpc.config.schema.rl import RolloutConfig
from r1hpc.config.stages import samples
from r1hpc.plan.hours.estimate import Estimate
from r1hpc.plan.hours.estimate_run import CPU_PRIOR
from r1hpc.plan.hours.rl import EAGER_LAYER_S
from r1hpc.plan.hours.spread import Spread
from r1hpc.plan.topology.gpus import known_card
from r1hpc.telemetry.records.lines import Devices, read_tail

if TYPE_CHECKING:
    from r1hpc.accounting.ledger import RunLedger

_VERSION = 7
_CACHE = "calibration.json"
_HEADINGS = ("run", "stage", "estimate", "actual", "by", "useful", "ratio", "corrected", "error", "then")


@dataclass(frozen=True)
class Site:
    """Finished runs under a run root."""

    runs: tuple[FinishedRun, ...]
    """Oldest first."""
    left_out: Mapping[str, int]
    """Number of runs left out, by reason."""

    @property
    def resources(self) -> list[str]:
        return sorted({run.resource for run in self.runs})

    def of(self, resource: str) -> list[FinishedRun]:
        return [run for run in self.runs if run.resource == resource]


def corrected(found: Estimate, stage: str, site: Site) -> tuple[Estimate, dict[str, Any]]:
    """Correct the estimate by the site's finished runs; unchanged if they tell nothing.

    Returns:
        The estimate, and `uncorrected` and `correction` for its JSON if there was one.
    """
    key = "node_hours" if found.gpu_hours is None else "gpu_hours"
    hours: Spread | None = getattr(found, key)
    if hours is None:
        return found, {}
    known = found.assumptions
    planned = Planned(
        resource=CPU if found.gpu_hours is None else resource_name(str(known.get("gpu"))),
        stage=stage,
        estimate=hours,
        # The default number of GPUs counts as unknown.
        num_gpus=int(known.get("num_gpus") or 0) if known.get("num_gpus_given", True) else 0,
        num_nodes=int(known.get("nodes") or 0),
        params=known.get("params"),
    )
    result = correction(planned, site.runs)
    if not result.num_runs:
        return found, {}
    now = result.corrected
    wall = {n: now * (each.p50 / hours.p50) for n, each in found.wall_hours.items()}
    changed: dict[str, Any] = {key: now, "wall_hours": wall}
    return replace(found, **changed), {"uncorrected": {key: hours.to_json()}, "correction": result.to_json()}


def resource_name(name: str) -> str:
    """Return one name for each GPU type, even if it is not in the table."""
    if name == CPU:
        return CPU
    card = known_card(name)
    return card.name if card else name


def finished_runs(run_root: Path) -> Site:
    """Return every finished run under `run_root`, stages of chains included, with its ledger's hours."""
    cache, now = _read_cache(run_root), time.time()
    entries: list[dict[str, Any]] = []
    fresh: list[RunDir] = []
    kept: dict[str, Any] = {}
    for run in all_runs(run_root):
        entry = cache.get(full_name(run))
        if not os.path.exists(run.finished):  # noqa: PTH110  # false also where the folder cannot be read
            entries.append({"left_out": "not finished"})
        elif entry is not None and entry["mark"] == _mark(run):
            kept[full_name(run)] = entry
            entries.append(entry)
        else:
            fresh.append(run)
    ledgers: list[RunLedger] = []
    if fresh:
        from r1hpc.accounting.open_ledger import open_ledgers  # deferred: nearly always all runs are cached

        ledgers, _ = open_ledgers(fresh, now)
    for ledger in ledgers:
        entry, is_final = _judge(ledger, now)
        entries.append(entry)
        if is_final:
            kept[ledger.run_id] = entry
    left_out = Counter(entry["left_out"] for entry in entries if "left_out" in entry)
    num_damaged = len(fresh) - len(ledgers) + len(unreadable(run_root))
    if num_damaged:
        left_out["damaged"] = num_damaged
    if kept != cache:
        # Another user's run root may be read-only: then nothing is kept.
        with contextlib.suppress(OSError):
            write_json(run_root / _CACHE, {"version": _VERSION, "runs": kept})
    stored = [entry["run"] for entry in entries if "run" in entry]
    runs = [FinishedRun(**{**run, "estimate": Spread.of_json(run["estimate"])}) for run in stored]
    return Site(tuple(sorted(runs, key=lambda run: run.finished_at)), dict(left_out))


def _mark(run: RunDir) -> list[int]:
    files = (run.finished, run.estimate, run.allocations)
    return [path.stat().st_mtime_ns if path.exists() else 0 for path in files]


class _Entry(TypedDict):
    mark: list[int]
    run: NotRequired[FinishedRun]
    left_out: NotRequired[str]


class _LeftOutError(Exception):
    """The reason to leave out a run."""


def _judge(ledger: "RunLedger", now: float) -> tuple[dict[str, Any], bool]:
    """Return the run's entry for the cache, and whether it is final."""
    from r1hpc.attempt.state.slurm_records import is_settled, kept_records

    run, mark = ledger.run, _mark(ledger.run)
    try:
        resource = _resource(ledger)
        estimate = _estimate(run, "node_hours" if resource == CPU else "gpu_hours")
        if ledger.used <= 0:
            raise _LeftOutError("no time on record")
    except _LeftOutError as error:
        return {"mark": mark, "left_out": str(error)}, True
    last = ledger.summary.attempts[-1].attempt
    params = _assumptions(read_object(run.estimate)).get("params")
    used = ledger.used - ledger.unused  # an estimate covers only the requested GPUs
    finished = FinishedRun(
        run_id=ledger.run_id,
        resource=resource,
        stage=ledger.stage,
        finished_at=mark[0] / 1e9,
        estimate=estimate,
        hours=used,
        source=ledger.source,
        useful_share=ledger.parts["useful"] / used,
        num_gpus=last.gpus,
        num_nodes=last.nodes,
        params=float(params) if isinstance(params, int | float) and params > 0 else None,
    )
    # slurmdbd gets the end a little after the run itself, and may know only some of the jobs.
    is_final = not ledger.jobs or is_settled(kept_records(run), ledger.jobs, ledger.summary.history, now)
    return {"mark": mark, "run": asdict(finished)}, is_final


def _resource(ledger: "RunLedger") -> str:
    """Return what the run ran on, if its estimate was for that.

    Prefer what NVML read, then the configuration. An assumed GPU type does not count.
    """
    run = ledger.run
    if not any(each.attempt.gpus for each in ledger.summary.attempts):
        return CPU
    known = _assumptions(read_object(run.estimate))
    estimated = known.get("gpu")
    found = _gpu_seen(run) or (estimated if known.get("gpu_given") is True else None)
    if not found:
        raise _LeftOutError("GPU not known")
    if estimated and resource_name(str(estimated)) != resource_name(str(found)):
        raise _LeftOutError("estimated for another GPU than it ran on")
    return resource_name(str(found))


def _assumptions(stored: Mapping[str, Any]) -> dict[str, Any]:
    found = stored.get("assumptions")
    return found if isinstance(found, dict) else {}


def _gpu_seen(run: RunDir) -> str | None:
    for path in run.all_gpu_metrics:
        first = read_tail(path, 0).first
        for gpu in first["gpus"] if first is not None and mistake(first, Devices) is None else ():
            if gpu.get("name"):
                return str(gpu["name"])
    return None


def _estimate(run: RunDir, key: str) -> Spread:
    """Return the estimate stored at submission, before any correction."""
    stored = read_object(run.estimate)
    before = stored.get("uncorrected", stored)
    value = before.get(key) if isinstance(before, dict) else before
    if value is None:
        raise _LeftOutError("no estimate")
    known = _assumptions(stored)
    is_eager = samples(str(known.get("stage"))) and _engine(run) == "sampler"
    is_of_before = {
        "node_hours": known.get("cpu_prior") != CPU_PRIOR,
        "gpu_hours": is_eager and known.get("eager_layer_s") != EAGER_LAYER_S,
    }
    if is_of_before[key]:
        raise _LeftOutError("estimated by an earlier version")
    spread = Spread.read(value)
    if spread is None:
        raise _LeftOutError("an estimate that cannot be read")
    if not 0 < spread.p50 < math.inf:
        raise _LeftOutError("an estimate of nothing")
    return spread


def _engine(run: RunDir) -> str:
    """Return the engine that decodes in a run; the default if its configuration cannot be read."""
    try:
        return load.read(run.config).rollout.engine
    except R1hpcError:
        return RolloutConfig().engine


def _read_cache(run_root: Path) -> dict[str, Any]:
    cache = read_object(run_root / _CACHE)
    runs = cache.get("runs")
    if cache.get("version") != _VERSION or not isinstance(runs, dict):
        return {}
    return {name: entry for name, entry in runs.items() if _is_entry(entry)}


def _is_entry(entry: Any) -> bool:
    """True if it can be read: another program, or a person, may have written there."""
    if mistake(entry, _Entry) is not None or ("run" in entry) == ("left_out" in entry):
        return False
    run = entry.get("run")
    known = {each.name for each in fields(FinishedRun)}
    return run is None or (run.keys() <= known and Spread.read(run["estimate"]) is not None)


def site_json(site: Site) -> dict[str, Any]:
    """Return by resource: its runs, the effect of the corrections so far, and the next one."""
    resources = {}
    for name in site.resources:
        scored = score(site.of(name))
        shown = effect(scored)
        resources[name] = {
            "unit": _unit(name),
            "correction": _next(site, name).to_json(),
            "effect": None if shown is None else asdict(shown),
            "runs": [each.to_json() for each in scored],
        }
    return {"resources": resources, "num_runs": len(site.runs), "left_out": dict(site.left_out)}


def site_text(site: Site) -> str:
    """Return a table for each resource."""
    if site.left_out:
        reasons = ", ".join(f"{count} ({reason})" for reason, count in sorted(site.left_out.items()))
        last = wrap(f"Left out: {reasons}.")
    else:
        num = len(site.runs)
        last = f"{num} finished run{'s' * (num != 1)}, none left out"
    return "\n\n".join([*(_as_text(site, name) for name in site.resources), last])


def _next(site: Site, resource: str) -> Correction:
    """Return the correction for a run like the last one."""
    runs = site.of(resource)
    return correction(runs[-1], runs)


def _as_text(site: Site, resource: str) -> str:
    scored = score(site.of(resource))
    table = format_table(_HEADINGS, [_row(each) for each in scored], right={2, 3, *range(5, 10)}, indent="  ")
    following = wrap(f"Next estimate: {_next(site, resource).basis}.", "  ", "  ")
    lines = [f"{resource} ({_unit(resource)})", table, following]
    shown = effect(scored)
    if shown is not None:
        before, after, num = shown.before, shown.after, shown.num_runs
        runs = "1 run" if num == 1 else f"{num} runs"
        text = (
            f"Over the {runs} with one like it before: as estimated, a median error of "
            f"{before.median_error:.0%}, P90/P10 {before.median_width:.1f}, {before.num_inside} of {num} "
            f"inside; corrected by those before, {after.median_error:.0%}, P90/P10 {after.median_width:.1f}, "
            f"{after.num_inside} of {num} inside."
        )
        lines.append(wrap(text, "  ", "  "))
    return "\n".join(lines)


def _row(each: Scored) -> tuple[str, ...]:
    return (
        each.run.run_id,
        each.run.stage,
        f"{each.run.estimate.p50:.4g}",
        f"{each.run.hours:.4g}",
        each.run.source,
        f"{each.run.useful_share:.0%}",
        f"{each.ratio:.2f}",
        f"{each.corrected.p50:.4g}" if each.num_before else "-",
        f"{each.error_before:.0%}",
        f"{each.error_after:.0%}" if each.num_before else "-",
    )


def _unit(resource: str) -> str:
    return "node-hours" if resource == CPU else "GPU-hours"
