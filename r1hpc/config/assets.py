"""Where the declarative files lie: jobs, configs, shards, sbatch."""

from pathlib import Path


def assets(folder: str) -> Path:
    """The folder `jobs`, `configs`, `shards` or `sbatch`: of the checkout, or as installed in the wheel."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "_assets" / folder
    return installed if installed.is_dir() else package.parent / folder


def names_in(folder: str) -> list[str]:
    """The YAML files in one of them, or in a folder inside, by name without .yaml."""
    return sorted(path.stem for path in assets(folder).glob("*.yaml"))
