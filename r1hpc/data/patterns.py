"""Which files of a folder a source's glob means.

sorted(files_below(Path("corpus"), "wiki/**/*.jsonl", excluded=("tests",)))
"""

import os
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from r1hpc.base.errors import UsageError


def files_below(root: Path, pattern: str, excluded: tuple[str, ...]) -> Iterator[str]:
    """Relative POSIX paths of those that match, in no order.

    Links to folders are not followed, so a loop of links ends.

    Raises:
        UsageError: a folder cannot be listed; what lies in it would be left out without a word.
    """
    deepest = None if "**" in pattern else pattern.count("/")
    for folder, subfolders, files in os.walk(root, onerror=_refuse_unlistable):
        if deepest is not None and len(Path(folder).relative_to(root).parts) >= deepest:
            subfolders.clear()  # nothing down there could match
        subfolders[:] = [name for name in subfolders if name not in excluded and not name.startswith(".")]
        for name in files:
            relative = (Path(folder) / name).relative_to(root).as_posix()
            if name not in excluded and not name.startswith(".") and _matches(relative, pattern):
                yield relative


def _refuse_unlistable(error: OSError) -> None:
    raise UsageError(
        f"{error.filename} cannot be listed ({error.strerror}): make it readable, or name it in the source's "
        "exclude"
    )


def _matches(relative: str, pattern: str) -> bool:
    """Glob match in which each `**/` also matches no folder at all."""
    return any(
        fnmatch(relative, each) and (each.count("/") == relative.count("/") or "**" in each)
        for each in _with_and_without(pattern)
    )


def _with_and_without(pattern: str) -> Iterator[str]:
    """The pattern with each of its `**/` there or not."""
    before, stars, after = pattern.partition("**/")
    if not stars:
        yield pattern
        return
    for rest in _with_and_without(after):
        yield before + stars + rest
        if not before or before.endswith("/"):
            yield before + rest
