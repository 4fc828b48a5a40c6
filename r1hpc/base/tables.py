"""Plain tables for a terminal.

>>> print(format_table(("#", "cause"), [("1", "preempted"), ("12", "finished")], right={0}))
 #  cause
 1  preempted
12  finished
"""

import textwrap
from collections.abc import Collection, Sequence

from r1hpc.base.names import printable

WIDTH = 100
_BAR_WIDTH = 30


def format_table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Collection[int] = (),
    width: int = WIDTH,
    indent: str = "",
) -> str:
    """Aligned columns two spaces apart; columns in `right` are right-aligned.

    The last column is cut to fit `width`, the others never are. Control characters are replaced.
    """
    lines = [[printable(cell).replace("\n", " ") for cell in row] for row in (headings, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headings))]
    room = max(8, width - len(indent) - sum(widths[:-1]) - 2 * (len(widths) - 1))
    widths[-1] = min(widths[-1], room)
    return "\n".join(indent + _line(line, widths, right) for line in lines)


def wrap(text: str, indent: str = "", hanging: str = "      ") -> str:
    """`text` in lines of at most WIDTH columns; only a word longer than that, a path, stands out."""
    return textwrap.fill(
        printable(text),
        WIDTH,
        initial_indent=indent,
        subsequent_indent=hanging,
        break_long_words=False,
        break_on_hyphens=False,
    )


def share(part: float, whole: float) -> str:
    """`12.5 %`."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def bar(part: float, whole: float) -> str:
    """A bar whose length is that share."""
    return "#" * round(_BAR_WIDTH * part / whole) if whole else ""


def _line(cells: Sequence[str], widths: Sequence[int], right: Collection[int]) -> str:
    cells = [*cells[:-1], cells[-1] if len(cells[-1]) <= widths[-1] else cells[-1][: widths[-1] - 1] + "…"]
    padded = (
        cell.rjust(width) if i in right else cell.ljust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join(padded).rstrip()
