"""Where the declarative files lie: jobs, configs, shards, sbatch."""

import os
from pathlib import Path


def assets(folder: str) -> Path:
    """The folder `jobs`, `configs`, `shards` or `sbatch`: of the checkout, or as installed in the wheel."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "_assets" / folder
    return installed if installed.is_dir() else package.parent / folder


def own_profiles() -> Path:
    """The folder of the user's own cluster profiles, for all checkouts; it need not exist."""
    return Path(os.path.expanduser("~/.config/r1hpc/cluster"))  # noqa: PTH111 - Path's own raises without a home


def names_in(folder: str) -> list[str]:
    """The YAML files in one of them, or in a folder inside, by name without .yaml."""
    return sorted(path.stem for path in assets(folder).glob("*.yaml"))
