"""Warn the person who submits about settings that may not be intended.

notes = little_room(run, config, plan)              # for its checkpoints
notes = kept_from_before(config, profile, given)    # for a resumed run
"""

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from r1hpc.base.run_dir import RunDir
from r1hpc.base.units import format_bytes
from r1hpc.config.schema.cluster import ClusterConfig
from r1hpc.config.schema.run import RunConfig
from r1hpc.plan.run import RunPlan


def kept_from_before(
    config: RunConfig, profile: tuple[str, Mapping[str, Any]] | None, given: Sequence[str]
) -> list[str]:
    """Return a sentence on cluster settings that a resumed run keeps but today's profile lacks.

    Args:
        profile: the file, and its keys under `cluster`; None: there is none.
        given: `cluster.KEY=VALUE` of command lines.
    """
    if profile is None:
        return []
    file, said = profile[0], profile[1]["cluster"]
    named = {*said, "name", *(item.partition("=")[0].split(".")[1] for item in given)}
    now, unset = dataclasses.asdict(config.cluster), dataclasses.asdict(ClusterConfig())
    kept = [f"cluster.{key}" for key in now if now[key] != unset[key] and key not in named]
    if "environment" in said:
        variables = [name for name in now["environment"] if name not in said["environment"]]
        kept += [f"cluster.environment.{name}" for name in variables]
    if not kept:
        return []
    return [
        f"{', '.join(kept)}: as before, though {file} does not say so. What was taken out of it is taken out "
        "of the run by saying so there: network_interface: null, setup: [], environment: !replace {…}"
    ]


def little_room(run: RunDir, config: RunConfig, plan: RunPlan) -> list[str]:
    """Warn if the checkpoints of a run may not fit under its root. Quotas cannot be seen from here."""
    if plan.checkpoint_bytes is None:
        return []
    there = next(folder for folder in run.path.absolute().parents if folder.exists())
    most, free = config.checkpoint.keep + 1, shutil.disk_usage(there).free
    if most * plan.checkpoint_bytes <= free:
        return []
    return [
        f"{most} checkpoints of {format_bytes(plan.checkpoint_bytes)} may exist there at once "
        f"(checkpoint.keep={config.checkpoint.keep}), and {there} has {format_bytes(free)} free: give a "
        "--run-root with more room"
    ]
