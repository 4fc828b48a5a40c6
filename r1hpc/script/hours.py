"""Estimate the hours of a script from finished runs of the same script, for submissions and the budget.

estimate_like(run_root, config, plan, digest)      # None: no finished run on as many of these GPUs
"""

import statistics
import time
from pathlib import Path

from r1hpc.accounting.open_ledger import open_ledger
from r1hpc.base.choose_run import all_runs
from r1hpc.base.errors import R1hpcError
from r1hpc.base.files import read_object
from r1hpc.base.run_dir import RunDir
from r1hpc.config.load import read
from r1hpc.config.schema.run import RunConfig
from r1hpc.plan.hours.estimate import Estimate
from r1hpc.plan.hours.spread import Spread
from r1hpc.plan.run import RunPlan
from r1hpc.plan.topology.gpus import gpu_type_of
from r1hpc.script.look import digest_file

_MOST_RUNS = 5
_LOG_SD = 0.15
"""Spread assumed between two runs of the same script."""


def estimate_like(run_root: Path, config: RunConfig, plan: RunPlan, digest: str) -> Estimate | None:
    """Return the median hours of the newest finished runs of this script, scaled by their number of steps."""
    runs = [run for run in all_runs(run_root) if read_object(digest_file(run)).get("digest") == digest]
    finished = [run for run in runs if run.finished.exists()]
    finished.sort(key=lambda run: run.finished.stat().st_mtime)
    hours = [each for run in finished[-_MOST_RUNS:] if (each := _hours(run, config, plan)) is not None]
    if not hours:
        return None
    on_gpus = plan.topology.num_gpus > 0
    spread = Spread.log_normal(statistics.median(hours), _LOG_SD)
    return Estimate(
        method="finished runs",
        gpu_hours=spread if on_gpus else None,
        node_hours=None if on_gpus else spread,
        wall_hours={plan.topology.num_gpus: spread * (1 / plan.topology.num_gpus)} if on_gpus else {},
        assumptions={"runs_measured": len(hours), "steps": config.script.steps},
        notes=(f"the median of {len(hours)} finished run(s) of this script on as many cards",),
    )


def _hours(run: RunDir, config: RunConfig, plan: RunPlan) -> float | None:
    """Return the hours that a finished run held, scaled to this one's steps; None on other GPUs."""
    try:
        theirs, ledger = read(run.config), open_ledger(run, time.time())
    except R1hpcError:
        return None
    last = ledger.summary.history.last
    where = plan.topology
    if last is None or (last.gpus, last.nodes) != (where.num_gpus, where.num_nodes):
        return None
    if gpu_type_of(theirs) != gpu_type_of(config):
        return None
    held = ledger.split() if last.gpus else ledger.node_split()
    ours, before = config.script.steps, theirs.script.steps
    scale = ours / before if ours and before else 1.0
    return held.in_hours()["allocated"] * scale
