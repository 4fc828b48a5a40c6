"""Which files a path of questions names: of a run's tasks, and of the test files it asks.

named_by(Path("data/gsm8k/train-*.parquet"))     # a file, all of a folder, or those that fit a pattern
of_one_kind(Path("data/gsm8k"))                  # those of a folder that are read together
files_in(config)                                 # {"/data/gsm8k": [its files]}: what a run is held to
"""

import os
from pathlib import Path
from typing import Any

from r1hpc.base.files import matching
from r1hpc.config.schema import RunConfig

FILES = ("file", "jsonl")
"""Names of the task whose questions come from a file."""
TABLES = (".parquet", ".arrow")
KINDS = (".jsonl", *TABLES)


def named_by(path: Path) -> list[Path]:
    """A file, all of a folder, or those that fit a pattern in the last part of the path; sorted by name.

    Raises:
        UsageError: it is no pattern.
        OSError: the folder cannot be listed.
    """
    found = sorted(path.iterdir()) if path.is_dir() else matching(path)
    return [file for file in found if not _is_cache(file)]


def of_one_kind(path: Path) -> list[Path]:
    """As `named_by`; of a folder only the Arrow files, or else those of Parquet, or else those of lines."""
    named = named_by(path)
    if not path.is_dir():
        return [file for file in named if file.is_file()]
    kinds = ([file for file in named if file.suffix == kind] for kind in reversed(KINDS))
    return next(filter(None, kinds), [])


def files_in(config: RunConfig) -> dict[str, list[Path]]:
    """Every path by which the options of a task, or the tests of the stage, name files, with these files.

    An own task's options are its own affair: of these only what is a file itself.
    """
    task = config.task
    parts = [(task.name, task.options)]
    parts += [(part.get("name", task.name), part.get("options", {})) for part in task.mix.values()]
    questions = [options.get("path") for name, options in parts if name in FILES]
    if config.stage in ("rl", "evaluate"):
        evaluate = config.evaluate
        questions += [evaluate.path, *(part["path"] for part in evaluate.sets.values())]
    found = {path: of_one_kind(path) for each in questions if (path := _absolute(each)) is not None}
    named = [value for _, options in parts for value in options.values()]
    # os.path: a text, a template for example, may be longer than a path, and Path raises on that.
    plain = [path for each in named if (path := _absolute(each)) is not None and os.path.isfile(path)]  # noqa: PTH113
    found |= {path: [path] for path in plain}
    return {str(path): files for path, files in found.items() if files}


def _absolute(value: Any) -> Path | None:
    return Path(value).absolute() if isinstance(value, str) and value else None


def _is_cache(file: Path) -> bool:
    """What `datasets` leaves of map() and filter() beside the data."""
    return file.suffix == ".arrow" and file.name.startswith("cache-")
