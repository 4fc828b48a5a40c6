"""Name the stages a run can have, and find the workload that runs each.

Other packages add a stage through the entry point group `r1hpc.workloads`:

    [project.entry-points."r1hpc.workloads"]
    toy = "my_package.toy:WORKLOAD"
"""

import functools
from importlib import import_module
from typing import Any

from r1hpc.base.errors import ConfigError
from r1hpc.base.names import nearest

_TRAINING = "r1hpc.train.workload:TRAINING"
WORKLOADS = {
    **dict.fromkeys(("pretrain", "traces", "sft", "rl", "generate", "evaluate"), _TRAINING),
    "serve": "r1hpc.serving.workload:SERVING",
    "script": "r1hpc.script.workload:SCRIPT",
}
"""The stages of this package. By name, so that a stage is imported only when needed."""
STAGES = tuple(WORKLOADS)
TRAINED_STAGES = ("pretrain", "sft", "rl")
"""Stages that take optimizer steps and leave a model."""
SAMPLED_STAGES = ("rl", "generate", "evaluate")
"""Stages that sample completions from a model."""
MODEL_STAGES = tuple(stage for stage in STAGES if stage not in ("traces", "script"))
"""Stages that load or build a model of ours."""
PLANNED_STAGES = tuple(stage for stage in STAGES if stage not in ("serve", "script"))
"""Stages with steps or parts that the plan counts. Others are planned by nodes and time alone."""
GROUP = "r1hpc.workloads"


def check_stage(stage: str) -> None:
    """Refuse a stage that nobody provides; the ConfigError names the nearest one."""
    if stage not in WORKLOADS and stage not in _others():
        known = (*STAGES, *_others())
        raise ConfigError(f"stage is {stage!r}{nearest(stage, known)}; it may be one of {', '.join(known)}")


def find_workload(stage: str) -> Any:
    """Return the workload of a stage; raise ConfigError if no package that can be imported provides it."""
    if stage in WORKLOADS:
        module, _, name = WORKLOADS[stage].partition(":")
        return getattr(import_module(module), name)
    check_stage(stage)
    try:
        return _others()[stage].load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"stage {stage}: its package cannot be imported ({error})") from error


@functools.cache
def _others() -> dict[str, Any]:
    from importlib.metadata import entry_points  # scans every installed package: only when needed

    return {point.name: point for point in entry_points(group=GROUP)}
