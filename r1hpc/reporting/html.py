"""Pieces of the page: cards, keys, tables. All text is escaped here."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from r1hpc.base.names import printable
from r1hpc.reporting.palette import as_css

NONE = "\N{EN DASH}"
"""In a cell that has no value."""


def document(title: str, blocks: Iterable[str]) -> str:
    """A whole page of these blocks; empty ones are left out."""
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
    """Any text, a stranger's too, as HTML."""
    return escape(printable(value))


def lines(value: str) -> str:
    """Any text, its line breaks kept."""
    return f"<pre>{chr(10).join(text(line) for line in value.splitlines())}</pre>"


def card(title: str, body: str, words: str = "") -> str:
    """A box with a title, a sentence and what is drawn; empty where nothing is."""
    if not body:
        return ""
    sub = f'<p class="sub">{text(words)}</p>' if words else ""
    return f'<section class="card"><h3>{text(title)}</h3>{sub}{body}</section>'


def keys(items: Sequence[tuple[str, str]]) -> str:
    """(colour of the palette, what it means) for each; empty without any."""
    cells = "".join(
        f'<li><i style="background:var(--{name})"></i>{text(words)}</li>' for name, words in items
    )
    return f'<ul class="legend">{cells}</ul>' if cells else ""


def side_by_side(cards: Sequence[str]) -> str:
    """Cards in two columns, on a telephone in one."""
    shown = [each for each in cards if each]
    return f'<div class="grid">{"".join(shown)}</div>' if shown else ""


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], numbers_from: int) -> str:
    """A table whose columns from `numbers_from` on are right-aligned; empty without rows."""
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
