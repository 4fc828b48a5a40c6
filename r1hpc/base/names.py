"""Which names may become part of a path, a Slurm field or a line of a terminal."""

import difflib
import re
from collections.abc import Iterable

from r1hpc.base.errors import UsageError

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")


def check_name(value: str, what: str) -> str:
    """Return `value` if it is a plain file name (at most 64 of A-Z a-z 0-9 . _ -); raise otherwise.

    Such a name cannot leave its folder (`..`, `/`), start an option (`-x`) or hide (`.x`).
    """
    if not _NAME.fullmatch(value):
        raise UsageError(
            f"{what} {printable(value)!r} is not a usable name: take at most 64 letters, digits, "
            "'.', '_' or '-', and begin with a letter, a digit or '_'"
        )
    return value


def printable(text: str) -> str:
    """`text` without control characters, so that a hostile name cannot drive a terminal."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def nearest(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the closest known word, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
