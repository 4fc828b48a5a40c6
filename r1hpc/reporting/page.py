"""One self-contained HTML page: what was spent, what is left, what was useful, what was planned.

    view = make_view(runs, run_root, now=time.time())
    write_page(view, run_root / "report.html")

No script, no font, no picture and no address outside of it: it opens from a mail, without a network. Names of
runs and users are escaped wherever they appear.
"""

from collections.abc import Iterator
from pathlib import Path

from r1hpc.base.files import write_atomic
from r1hpc.reporting import sections
from r1hpc.reporting.html import text
from r1hpc.reporting.palette import as_css
from r1hpc.reporting.run_card import run_card
from r1hpc.reporting.view import View

_MOST_CARDS = 8
"""Runs drawn by themselves, newest first; the others are in the table."""


def write_page(view: View, path: Path) -> None:
    """Write it whole or not at all."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomic(path, page(view))


def page(view: View) -> str:
    """The page as text."""
    parts = [sections.budget(view), sections.estimates(view), sections.hours(view)]
    parts = [*parts, _cards(view)] if len(view.runs) > 1 else [_cards(view), *parts]
    bodies = [block for part in parts for block in part]
    top = [sections.head(view), sections.tiles(view), *sections.warnings(view)]
    blocks = [*top, *bodies, *sections.tables(view), sections.notes(view)]
    title = text(view.title)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{title}</title><style>{_style()}</style></head>\n<body><main>\n"
        + "\n".join(block for block in blocks if block)
        + "\n</main></body></html>\n"
    )


def _style() -> str:
    return as_css() + Path(__file__).with_name("page.css").read_text()


def _cards(view: View) -> Iterator[str]:
    runs, alone = view.begun, len(view.runs) == 1
    if runs:
        more = f": the newest {_MOST_CARDS} of {len(runs)}" if len(runs) > _MOST_CARDS else ""
        yield "<h2>The run</h2>" if alone else f"<h2>Runs{more}</h2>"
        yield from (run_card(run, alone) for run in runs[:_MOST_CARDS])
