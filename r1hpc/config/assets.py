"""Find the declarative files (jobs, configs, shards, sbatch), and complete jobs and settings with TAB.

Loads no YAML, since completion must be quick.

parser.add_argument("words", nargs="*").completer = job_words
"""

import dataclasses
import os
import typing
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

from r1hpc.config.schema.run import RunConfig, section_of


def assets(folder: str) -> Path:
    """Return the folder `jobs`, `configs`, `shards` or `sbatch`, of the checkout or the installed wheel."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "_assets" / folder
    return installed if installed.is_dir() else package.parent / folder


def own_profiles() -> Path:
    """Return the folder of the user's own cluster profiles, for all checkouts; it need not exist."""
    return Path(os.path.expanduser("~/.config/r1hpc/cluster"))  # noqa: PTH111 - Path's own raises without a home


def names_in(folder: str) -> list[str]:
    """Return the names, without .yaml, of the YAML files in such a folder or a subfolder."""
    return sorted(path.stem for path in assets(folder).glob("*.yaml"))


def job_words(prefix: str, **_: Any) -> list[str]:
    """Complete jobs by name and setting keys; after `KEY=` the named values it may have."""
    if "=" in prefix:
        key = prefix.partition("=")[0]
        return [f"{key}={value}" for value in dict(_settings()).get(key, ())]
    return [*names_in("jobs"), *(f"{key}=" for key, _ in _settings())]


def cluster_profiles(**_: Any) -> list[str]:
    return sorted({*names_in("configs/cluster"), *(path.stem for path in own_profiles().glob("*.yaml"))})


def campaigns(**_: Any) -> list[str]:
    return names_in("configs/campaign")


def recipes(**_: Any) -> list[str]:
    return names_in("shards")


def _settings(schema: type = RunConfig, prefix: str = "") -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield (dotted key, its named values) of each setting."""
    hints = typing.get_type_hints(schema)
    for each in dataclasses.fields(schema):
        section = section_of(each)
        if section is not None:
            yield from _settings(section, f"{prefix}{each.name}.")
        else:
            yield f"{prefix}{each.name}", _names(hints[each.name], each.metadata.get("range"))


def _names(hint: Any, allowed: Any) -> tuple[str, ...]:
    if hint is bool:
        return ("true", "false")
    if isinstance(hint, type) and issubclass(hint, Enum):
        return tuple(str(member.value) for member in hint)
    return tuple(map(str, getattr(allowed, "choices", ())))
