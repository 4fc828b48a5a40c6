"""Lay out text for a terminal: tables, wrapped paragraphs, bars, colours.

>>> print(format_table(("#", "cause"), [("1", "preempted"), ("12", "finished")], right={0}))
 #  cause
 1  preempted
12  finished
"""

import os
import re
import sys
import textwrap
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import TextIO

from r1hpc.base.names import printable

_WIDTH = 100
"""Columns without a terminal: a log, a mail."""
ANY_WIDTH = 1000
"""For tables whose last column is never cut off."""
_NARROWEST, _WIDEST_TEXT = 40, 120
"""Limits of a paragraph's width that is still readable."""
_LONGEST_BAR, _BESIDE_BAR = 30, 50
"""Characters of a bar, and of the text beside it."""
_PAIR = "\N{NO-BREAK SPACE}"
_COLOURS = {
    **dict.fromkeys(("finished", "ok"), "32"),
    **dict.fromkeys(("running",), "36"),
    **dict.fromkeys(("queued", "requeued", "preempted", "stopped", "warn", "warning"), "33"),
    **dict.fromkeys(
        ("failed", "fail", "cancelled", "crash", "oom", "hang", "node_fail", "cluster", "error"), "31"
    ),
    **dict.fromkeys(("waiting", "unknown"), "2"),
}
_STATE = re.compile(rf"(?m)(?:^|(?<=  )|(?<=: ))(?:{'|'.join(_COLOURS)})(?=  |:|$)")


def terminal_width(out: TextIO | None = None) -> int:
    """Return $COLUMNS, else the columns of the terminal `out` (default: stdout), else 100."""
    out = sys.stdout if out is None else out
    given = os.environ.get("COLUMNS", "")
    columns = int(given) if given.isdecimal() and given.isascii() and len(given) < 5 else 0
    if not columns and out is not None and out.isatty():
        with suppress(OSError):  # a terminal that is gone
            columns = os.get_terminal_size(out.fileno()).columns
    return max(_NARROWEST, columns or _WIDTH)


def fit(text: str, out: TextIO | None) -> str:
    """Wrap lines that are wider than the terminal `out`; no change if it is none.

    Words are not broken. Lines that begin with a space belong to tables and tracebacks, and stay as they are.
    """
    if out is None or not out.isatty():
        return text
    fill = textwrap.TextWrapper(
        terminal_width(out), subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    ).fill
    return "\n".join(line if line.startswith(" ") else fill(line) for line in text.split("\n"))


def text_width() -> int:
    """Return the columns of a paragraph."""
    return min(terminal_width(), _WIDEST_TEXT)


def format_table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Collection[int] = (),
    width: int | None = None,
    indent: str = "",
) -> str:
    """Return aligned columns two spaces apart; columns in `right` are right-aligned.

    Only the last column is cut to fit `width` (default: the terminal's); if the others do not fit, each row
    becomes a paragraph. Control characters are replaced.
    """
    width = terminal_width() if width is None else width
    lines = [[printable(cell).replace("\n", " ") for cell in row] for row in (headings, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headings))]
    room = max(8, width - len(indent) - sum(widths[:-1]) - 2 * (len(widths) - 1))
    needed = len(indent) + sum(widths[:-1]) + min(8, widths[-1]) + 2 * (len(widths) - 1)
    if needed > width and width < _WIDTH:
        return "\n".join(_paragraph(lines[0], line, width, indent) for line in lines[1:])
    widths[-1] = min(widths[-1], room)
    return "\n".join(indent + _line(line, widths, right) for line in lines)


def wrap(text: str, indent: str = "", hanging: str = "      ") -> str:
    """Wrap `text` to the terminal's width, 120 columns at most; only a longer word sticks out."""
    return textwrap.fill(
        printable(text),
        text_width(),
        initial_indent=indent,
        subsequent_indent=hanging,
        break_long_words=False,
        break_on_hyphens=False,
    )


def has_colours(out: TextIO | None) -> bool:
    """True if `out` is a terminal with colours, and nobody has turned them off by NO_COLOR (no-color.org)."""
    is_plain = os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb"
    return out is not None and out.isatty() and not is_plain


def coloured(text: str) -> str:
    """Colour states and verdicts that stand alone in their place, if stdout is a terminal with colours."""
    if not has_colours(sys.stdout):
        return text
    return _STATE.sub(lambda found: f"\x1b[{_COLOURS[found[0]]}m{found[0]}\x1b[0m", text)


def cell(value: object, form: str = "", unit: str = "") -> str:
    """Return a value in this format, such as `93 %`; `-` for None."""
    return "-" if value is None else f"{value:{form}}{unit}"


def share(part: float, whole: float) -> str:
    """Return a share such as `12.5 %`."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def bar(part: float, whole: float) -> str:
    """Return a bar with the length of that share."""
    longest = max(8, min(_LONGEST_BAR, terminal_width() - _BESIDE_BAR))
    return "#" * round(longest * part / whole) if whole else ""


def _paragraph(headings: Sequence[str], cells: Sequence[str], width: int, indent: str) -> str:
    """Return `heading value` pairs, none of them broken."""
    pairs = [f"{heading} {cell}".strip() for heading, cell in zip(headings, cells, strict=True) if cell]
    text = "  ".join(pair.replace(" ", _PAIR) for pair in pairs)
    lines = textwrap.wrap(
        text, width, initial_indent=indent, subsequent_indent=indent + "    ", break_on_hyphens=False
    )
    return "\n".join(lines).replace(_PAIR, " ")


def _line(cells: Sequence[str], widths: Sequence[int], right: Collection[int]) -> str:
    cells = [*cells[:-1], cells[-1] if len(cells[-1]) <= widths[-1] else cells[-1][: widths[-1] - 1] + "…"]
    padded = (
        cell.rjust(width) if i in right else cell.ljust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join(padded).rstrip()
