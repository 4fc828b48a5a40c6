"""Define the colours of all charts and of the page around them, light and dark, and build the page's parts.

A picture for a slide has the light colours. A chart inlined in the page names the variable instead of the
colour, so that it follows the reader's scheme. Therefore no two names share a light colour. Cards, keys and
tables escape all text here.
"""

import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from r1hpc.base.names import printable

_COLOURS = {
    # name: (light, dark)
    "useful": ("#2468a8", "#5fa5e4"),
    "lost": ("#c8452c", "#f0735a"),
    "start-up": ("#dd9a2f", "#e8b45c"),
    "save": ("#7c62a9", "#a98fd6"),
    "idle": ("#aab3bd", "#66717d"),
    "other": ("#d6dbe0", "#38424d"),
    "good": ("#2c8a5b", "#5cc08d"),
    "planned": ("#cfd7df", "#3a4653"),
    "median": ("#66727f", "#a7b2be"),
    "band": ("#f3f5f7", "#20272f"),
    "band2": ("#e9edf1", "#28313a"),
    "grid": ("#e4e8eb", "#29313a"),
    "ink": ("#1b2430", "#e4e8ed"),
    "muted": ("#647080", "#98a3af"),
    "card": ("#ffffff", "#1a2027"),
    "page": ("#f6f7f8", "#12161b"),
    "shade": ("#b7c0c9", "#000000"),
    "edge": ("#e2e6ea", "#2a323b"),
}
_NAMES = {light: name for name, (light, _) in _COLOURS.items()}
_COLOUR = re.compile("|".join(_NAMES))
NONE = "\N{EN DASH}"
"""Shown in a cell without a value."""


def colour(name: str) -> str:
    """Return the light colour of this name, #rrggbb."""
    return _COLOURS[name][0]


def with_variables(style: str) -> str:
    """Replace each colour of the palette in CSS by its variable; others stay."""
    return _COLOUR.sub(lambda found: f"var(--{_NAMES[found[0]]})", style)


def as_css() -> str:
    """Return the variables. Paper is always light."""
    light, dark = ("".join(f"--{name}:{pair[i]};" for name, pair in _COLOURS.items()) for i in (0, 1))
    return f":root{{{light}}}@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}"


def document(title: str, blocks: Iterable[str]) -> str:
    """Return a page of these blocks; empty ones are left out."""
    style = as_css() + Path(__file__).with_name("page.css").read_text()
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{text(title)}</title><style>{style}</style></head>\n<body><main>\n"
        + "\n".join(block for block in blocks if block)
        + "\n</main></body></html>\n"
    )


def text(value: str) -> str:
    """Escape any text, even an untrusted one, as HTML."""
    return escape(printable(value))


def lines(value: str) -> str:
    """Escape any text, with its line breaks."""
    return f"<pre>{chr(10).join(text(line) for line in value.splitlines())}</pre>"


def card(title: str, body: str, words: str = "") -> str:
    """Return a box with a title, a sentence and a body; empty without a body."""
    if not body:
        return ""
    sub = f'<p class="sub">{text(words)}</p>' if words else ""
    return f'<section class="card"><h3>{text(title)}</h3>{sub}{body}</section>'


def keys(items: Sequence[tuple[str, str]]) -> str:
    """Return (colour of the palette, meaning) for each; empty without any."""
    cells = "".join(
        f'<li><i style="background:var(--{name})"></i>{text(words)}</li>' for name, words in items
    )
    return f'<ul class="legend">{cells}</ul>' if cells else ""


def side_by_side(cards: Sequence[str]) -> str:
    """Return cards in two columns, on a telephone in one."""
    shown = [each for each in cards if each]
    return f'<div class="grid">{"".join(shown)}</div>' if shown else ""


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], numbers_from: int) -> str:
    """Return a table with right-aligned columns from `numbers_from` on; empty without rows."""
    if not rows:
        return ""
    body = "".join(f"<tr>{_cells(row, 'td', numbers_from)}</tr>" for row in rows)
    head = f"<thead><tr>{_cells(headings, 'th', numbers_from)}</tr></thead>"
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def _cells(cells: Sequence[str], tag: str, numbers_from: int) -> str:
    return "".join(
        f"<{tag}{' class=r' if i >= numbers_from else ''}>{text(cell)}</{tag}>"
        for i, cell in enumerate(cells)
    )
