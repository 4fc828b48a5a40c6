"""Select the files of a folder by a source's glob and exclude.

excluded = Excluded(("tests", "*.test.jsonl"))
sorted(files_below(Path("corpus"), "wiki/**/*.jsonl", excluded))
excluded.idle           # entries that left out nothing
"""

import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

from r1hpc.base.errors import UsageError

_FOLDERS = "**"


class Excluded:
    """Files and folders to leave out.

    An entry without `/` is the name of a file or folder anywhere, or a pattern of such names; one with `/`
    is a pattern of paths below the root. `/` at its end: folders alone.
    """

    def __init__(self, entries: Sequence[str]) -> None:
        self.idle = list(entries)
        """Entries that have left out nothing so far."""
        self._names = {entry for entry in entries if not set(entry) & set("*?[/")}
        patterns = [entry for entry in entries if entry not in self._names]
        self._patterns = [(entry, _alternatives(entry.rstrip("/"))) for entry in patterns]

    def leaves_out(self, relative: str, *, is_folder: bool) -> bool:
        """True if an entry matches this path, relative to the root."""
        path = relative.split("/")
        found = [path[-1]] if path[-1] in self._names else []
        found += [
            entry
            for entry, patterns in self._patterns
            if _is_meant(path, entry, patterns, is_folder=is_folder)
        ]
        if found:
            self.idle = [entry for entry in self.idle if entry not in found]
        return bool(found)


def files_below(root: Path, pattern: str, excluded: Excluded) -> Iterator[str]:
    """Yield the relative POSIX paths of matching files, in no order.

    In a pattern `**/` is any number of folders, also none; other wildcards stay within one name. Links to
    folders are not followed, so a loop of links ends.

    Raises:
        UsageError: a folder cannot be listed; its files would be left out silently.
    """
    deepest = None if _FOLDERS in pattern else pattern.count("/")
    patterns = _alternatives(pattern)
    for folder, subfolders, files in os.walk(root, onerror=_refuse_unlistable):
        above = "" if Path(folder) == root else f"{Path(folder).relative_to(root).as_posix()}/"
        subfolders[:] = [
            name
            for name in subfolders
            if not name.startswith(".") and not excluded.leaves_out(above + name, is_folder=True)
        ]
        if deepest is not None and above.count("/") >= deepest:
            subfolders.clear()  # nothing below could match
        for name in files:
            if name.startswith(".") or excluded.leaves_out(above + name, is_folder=False):
                continue
            if any(_matches((above + name).split("/"), each) for each in patterns):
                yield above + name


def _refuse_unlistable(error: OSError) -> None:
    raise UsageError(
        f"{error.filename} cannot be listed ({error.strerror}): make it readable, or name it in the source's "
        "exclude"
    )


def _is_meant(path: list[str], entry: str, patterns: list[list[str]], *, is_folder: bool) -> bool:
    if entry.endswith("/") and not is_folder:
        return False
    entry = entry.rstrip("/")
    if "/" not in entry:
        path = path[-1:]
    return "/".join(path) == entry or any(_matches(path, each) for each in patterns)


def _matches(names: Sequence[str], pattern: Sequence[str]) -> bool:
    """True if each name matches its part of the pattern."""
    if not pattern:
        return not names
    if pattern[0] == _FOLDERS:
        return any(_matches(names[start:], pattern[1:]) for start in range(len(names) + 1))
    return bool(names) and fnmatch(names[0], pattern[0]) and _matches(names[1:], pattern[1:])


def _alternatives(pattern: str) -> list[list[str]]:
    """Return the names of a pattern, in which `**` stands alone and never last.

    Within a name (`wiki**.jsonl`) it means a part of that name and also any number of folders.
    """
    found: list[list[str]] = [[]]
    for name in pattern.split("/"):
        found = [[*before, *after] for before in found for after in _name_alternatives(name)]
    return [[*names, "*"] if names[-1] == _FOLDERS else names for names in found]


def _name_alternatives(name: str) -> Iterator[list[str]]:
    before, stars, after = name.partition(_FOLDERS)
    if not stars or name == _FOLDERS:
        yield [name]
        return
    for first, *rest in _name_alternatives(f"*{after}"):
        yield [f"{before}{first}", *rest]
        yield [f"{before}*", _FOLDERS, first, *rest]
