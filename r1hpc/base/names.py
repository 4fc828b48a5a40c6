"""Make names safe for paths and terminals, expand ~/, and suggest the known name nearest to a typo."""

import difflib
import os
import re
from collections.abc import Iterable

from r1hpc.base.errors import UsageError

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_LONGEST = 80
"""Characters of a name that an error shows."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")


def check_name(value: str, what: str) -> str:
    """Return `value` if it is a plain file name (at most 64 of A-Z a-z 0-9 . _ -); raise otherwise.

    It then cannot leave its folder (`..`, `/`), start an option (`-x`) or hide (`.x`).
    """
    if not _NAME.fullmatch(value):
        shown = printable(value[:_LONGEST]) + "..." * (len(value) > _LONGEST)
        raise UsageError(
            f"{what} {shown!r} is not a usable name: take at most 64 letters, digits, "
            "'.', '_' or '-', and begin with a letter, a digit or '_'"
        )
    return value


def at_home(path: str) -> str:
    """Return a path with a leading ~/ replaced by the home folder; raise UsageError if there is none."""
    if not path.startswith("~/"):
        return path
    found = path if os.environ.get("HOME") == "" else os.path.expanduser(path)  # noqa: PTH111
    if found.startswith("~"):
        raise UsageError(f"{printable(path)} cannot be found, since HOME is empty: write the full path")
    return found


def is_among(name: str, names: str | None) -> bool:
    """True if a comma-separated list has this user or account, upper case or lower; None stands for all.

    Slurm's own flags take such lists, and Slurm ignores case in account names.
    """
    return names is None or name.strip().lower() in (each.strip().lower() for each in names.split(","))


def printable(text: str) -> str:
    """Return `text` without control characters, so that a hostile name cannot drive a terminal."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the known word nearest to `word`, or an empty string.

    Dashes and a common section are ignored: `--gres` is not near `--resume`, nor train.foo near train.lr.
    """
    best, most = "", 0.7
    for other in known:
        mine, theirs = _own_parts(word, other)
        likeness = difflib.SequenceMatcher(None, mine, theirs).ratio()
        if sorted(mine) == sorted(theirs):  # letters swapped
            likeness = max(likeness, 0.9)
        # resources.gpus for resources.gpus_per_node; one wrong letter in a short word
        elif (len(mine) >= 3 and theirs.startswith(f"{mine}_")) or _differ_by_a_letter(mine, theirs):
            likeness = max(likeness, 0.75)
        if likeness > most:
            best, most = other, likeness
    return f" (did you mean {best!r}?)" if best else ""


def _differ_by_a_letter(mine: str, theirs: str) -> bool:
    return len(mine) == len(theirs) > 1 and sum(map(str.__ne__, mine, theirs)) == 1


def _own_parts(word: str, other: str) -> tuple[str, str]:
    section, _, name = word.rpartition(".")
    if section and other.startswith(f"{section}."):
        return name, other.removeprefix(f"{section}.")
    return word.lstrip("-").replace("-", "_"), other.lstrip("-").replace("-", "_")


def one_of(where: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise UsageError naming the nearest value unless `value` is allowed."""
    if value not in allowed:
        raise UsageError(
            f"{where} must be one of {', '.join(allowed)}, not {value!r}{nearest(value, allowed)}"
        )
