"""Select the files of a folder by a source's glob and exclude.

excluded = Excluded(("tests", "*.test.jsonl"))
sorted(files_below(Path("corpus"), "wiki/**/*.jsonl", excluded))
excluded.idle           # entries that left out nothing
"""

import fnmatch
import functools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from r1hpc.base.errors import UsageError

_FOLDERS = "**"
_PIECES = re.compile(r"((?:^|(?<=/))\*\*/|\*\*|\*|\?|\[!?\]?[^\]]*\])")
_MEANINGS = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}


class Excluded:
    """Files and folders to leave out.

    An entry without `/` is the name of a file or folder anywhere, or a pattern of such names; one with `/`
    is a pattern of paths below the root. `/` at its end: folders alone.
    """

    def __init__(self, entries: Sequence[str]) -> None:
        self.idle = list(entries)
        """Entries that have left out nothing so far."""
        self._names = {entry for entry in entries if not set(entry) & set("*?[/")}
        self._patterns = [entry for entry in entries if entry not in self._names]

    def leaves_out(self, relative: str, *, is_folder: bool) -> bool:
        """True if an entry matches this path, relative to the root."""
        name = relative.rpartition("/")[2]
        found = [name] if name in self._names else []
        for entry in self._patterns:
            pattern = entry.rstrip("/")
            meant = relative if "/" in pattern else name
            is_of_kind = is_folder or not entry.endswith("/")
            if is_of_kind and (meant == pattern or _regex(pattern).fullmatch(meant)):
                found.append(entry)
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
            if _regex(pattern).fullmatch(above + name):
                yield above + name


def _refuse_unlistable(error: OSError) -> None:
    raise UsageError(
        f"{error.filename} cannot be listed ({error.strerror}): make it readable, or name it in the source's "
        "exclude"
    )


@functools.cache
def _regex(pattern: str) -> re.Pattern[str]:
    """Return the expression of a glob: `**/` is any number of folders; `*`, `?`, `[...]` stay in one name."""
    found = ""
    for piece in _PIECES.split(pattern):
        if piece in _MEANINGS:
            found += _MEANINGS[piece]
        elif piece.startswith("[") and piece.endswith("]"):
            found += "(?!/)" + fnmatch.translate(piece)[len("(?s:") : -len(r")\Z")]
        else:
            found += re.escape(piece)
    return re.compile(found, re.DOTALL)
