"""What a run will cost by its plan, as estimate.json holds it.

estimate, notes = estimate_for(run_root, config, plan)     # None: not known
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from r1hpc.accounting.calibrate import Site, corrected, finished_runs
from r1hpc.config.schema import RunConfig
from r1hpc.estimator.estimate_run import estimate_of_run
from r1hpc.plan.hardware import FLAGS_INSTEAD, UnknownGpuError
from r1hpc.plan.run import RunPlan


def estimate_for(
    run_root: Path, config: RunConfig, plan: RunPlan, expected_model: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """The hours of a run, corrected by what this site's finished runs really took.

    Args:
        expected_model: the config.json that an earlier stage of a chain will leave in model.path.

    Returns:
        Estimate.to_json(), with `uncorrected` and `correction` beside it where there was one; and notes.
    """
    try:
        found = estimate_of_run(config, plan, expected_model=expected_model)
    except UnknownGpuError as error:
        said = str(error).replace(FLAGS_INSTEAD, "set cluster.gpu_type to")
        return None, (f"no estimate: {said}",)
    if found is None:
        return None, ()
    found, correction = corrected(found, config.stage, _site(run_root.absolute()))
    return {**found.to_json(), **correction}, ()


@functools.cache
def _site(run_root: Path) -> Site:
    """Once for all stages of a submission: every finished run is read."""
    return finished_runs(run_root)
