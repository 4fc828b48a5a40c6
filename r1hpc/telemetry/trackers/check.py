"""Check before submission that the run's trackers can work."""

import os
from pathlib import Path
from urllib.parse import urlsplit

from r1hpc.base.errors import UsageError
from r1hpc.config.schema.run import RunConfig
from r1hpc.config.stages import TRAINED_STAGES, require


def check_trackers(config: RunConfig, executor: str) -> None:
    """Look for the packages in the interpreter that will feed the trackers, and for W&B's key, which a Slurm
    job does not get from the environment.

    Raise UsageError if something is missing, or W&B's URL holds a password; it says what to do.
    """
    if config.stage not in (*TRAINED_STAGES, "script"):
        return
    asked = dict.fromkeys(config.monitor.trackers)
    needed = [name for name in asked if name != "prometheus"]  # its file needs no package
    require("monitor.trackers", needed, "trackers", config, executor)
    if "wandb" in asked and "@" in os.environ.get("WANDB_BASE_URL", ""):
        raise UsageError(
            "WANDB_BASE_URL holds a user or a password, and the run would record it: take it out of the URL, "
            "and log in with `wandb login --host URL`, which leaves the key in ~/.netrc"
        )
    if "wandb" in asked and config.monitor.wandb.mode == "online" and not _has_key(config, executor):
        raise UsageError(
            "monitor.wandb.mode=online finds no key: run `wandb login` here, which leaves it in ~/.netrc for "
            "the job (WANDB_API_KEY is not passed to jobs); or take monitor.wandb.mode=offline"
        )


def _has_key(config: RunConfig, executor: str) -> bool:
    if any("WANDB_API_KEY" in line for line in config.cluster.setup):  # a line that reads it from a file
        return True
    if executor == "local" and os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    try:
        return host in Path(os.environ.get("NETRC") or "~/.netrc").expanduser().read_text()
    except (OSError, ValueError, RuntimeError):
        return False
