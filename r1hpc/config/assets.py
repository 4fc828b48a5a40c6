"""Find job files, presets and cluster profiles by name, and list names and settings for TAB.

Loads no YAML, since completion must be quick.
"""

import dataclasses
import os
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Any

from r1hpc.base.errors import ConfigError
from r1hpc.base.names import nearest, printable
from r1hpc.config.schema.ranges import range_of
from r1hpc.config.schema.run import settings_of


def assets(folder: str) -> Path:
    """Return the folder `jobs`, `configs`, `shards` or `sbatch`, of the checkout or the installed wheel."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "_assets" / folder
    return installed if installed.is_dir() else package.parent / folder


def own_profiles() -> Path:
    """Return the folder of the user's own cluster profiles, for all checkouts; it need not exist."""
    return Path(os.path.expanduser("~/.config/r1hpc/cluster"))  # noqa: PTH111 - Path's own raises without a home


def find_job(name: str, what: str = "job") -> Path:
    """Return the job file at path `name`, or of that name in jobs/; a ConfigError names the known jobs."""
    jobs = assets("jobs")
    # jobs/smoke.yaml works from any folder; another folder's name must not lead to a job of ours.
    candidates = (Path(name), jobs / name, jobs / f"{name}.yaml", jobs.parent / name)
    folder = Path(name)
    if folder.is_dir() and not any(each.is_file() for each in candidates):
        shown = printable(name)
        if (folder / "config.yaml").is_file():
            raise ConfigError(
                f"{shown} is a run, and no job file: to go on with it, "
                f"`submit --resume --run-root {folder.absolute().parent} --run-name {folder.absolute().name}`"
            )
        raise ConfigError(f"{shown} is a folder, and no job file: name a file in it")
    return find_named(what, name, candidates, jobs)


def find_named(what: str, name: str, candidates: Iterable[Path], folder: Path, *own: Path) -> Path:
    """Return the first candidate that is a file.

    If there is none, ConfigError lists the YAML files of `folder` and of `own`, the user's folders.
    """
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    found = {each: sorted(path.stem for path in each.glob("*.yaml")) for each in (folder, *own)}
    known = [name for names in found.values() for name in names]
    hint = nearest(Path(name).stem, known)
    where = "" if Path(name).is_absolute() else f", and no such file in {printable(str(Path.cwd()))}"
    there = [
        f"in {printable(str(each)) if each in own else each.name}/ there are: {', '.join(names) or 'none'}"
        for each, names in found.items()
    ]
    raise ConfigError(f"no {what} {printable(name)!r}{hint}{where}; {'; '.join(there)}")


def shown(path: Path) -> str:
    """Return our own file's path in configs/ or jobs/, any other path as given."""
    for folder in (assets("configs"), assets("jobs")):
        if path.is_relative_to(folder):
            return str(path.relative_to(folder.parent))
    return str(path)


def find_include(name: str, job: Path) -> Path:
    """Return the file that a job includes: in configs/, or beside the job."""
    for candidate in (assets("configs") / f"{name}.yaml", job.parent / name, job.parent / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    configs = assets("configs")
    known = sorted(str(path.relative_to(configs).with_suffix("")) for path in configs.rglob("*.yaml"))
    raise ConfigError(f"{job} includes {printable(name)!r}, which is not in configs/{nearest(name, known)}")


def find_profile(name: str) -> Path:
    """Return the file of a cluster profile: ours, the user's, or a path."""
    folder, own = assets("configs") / "cluster", own_profiles()
    places = (folder / f"{name}.yaml", own / f"{name}.yaml", Path(name))
    return find_named("cluster profile", name, places, folder, own)


def names_in(folder: str) -> list[str]:
    """Return the names, without .yaml, of the files in a folder such as `jobs` or `configs/cluster`."""
    return sorted(path.stem for path in assets(folder).glob("*.yaml"))


def job_words(prefix: str, **_: Any) -> list[str]:
    """Complete jobs by name and setting keys; after `KEY=` the named values it may have."""
    if "=" in prefix:
        key = prefix.partition("=")[0]
        fields = dict(settings_of())
        return [f"{key}={value}" for value in (_values(fields[key]) if key in fields else ())]
    return [*names_in("jobs"), *(f"{key}=" for key, _ in settings_of())]


def cluster_profiles(**_: Any) -> list[str]:
    return sorted({*names_in("configs/cluster"), *(path.stem for path in own_profiles().glob("*.yaml"))})


def campaigns(**_: Any) -> list[str]:
    return names_in("configs/campaign")


def recipes(**_: Any) -> list[str]:
    return names_in("shards")


def _values(field: "dataclasses.Field[Any]") -> Iterable[str]:
    """Return the named values that a setting may have."""
    if field.type is bool:
        return ("true", "false")
    if isinstance(field.type, type) and issubclass(field.type, Enum):
        return [str(member.value) for member in field.type]
    return map(str, getattr(range_of(field), "choices", ()))
