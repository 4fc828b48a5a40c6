"""One self-contained HTML page: what was spent, what is left, what was useful, what was planned.

    view = make_view(runs, run_root, now=time.time())
    write_page(view, run_root / "report.html")

No script, no font, no picture and no address outside of it: it opens from a mail, without a network. Names of
runs and users are escaped wherever they appear.
"""

from collections.abc import Iterator
from pathlib import Path

from r1hpc.accounting.ledger import RunLedger
from r1hpc.base.errors import R1hpcError
from r1hpc.base.files import write_atomic
from r1hpc.reporting import sections
from r1hpc.reporting.html import card, document, lines
from r1hpc.reporting.run_card import run_card
from r1hpc.reporting.view import View

_MOST_CARDS = 8
"""Runs that get a card each, those begun last; the table has the others too."""


def write_page(view: View, path: Path) -> None:
    """Write it whole or not at all."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomic(path, page(view))


def page(view: View) -> str:
    """The page as text."""
    charts = sections.charts_of_hours(view)
    parts = [draw(view, charts) for draw in (sections.budget, sections.estimates, sections.hours)]
    parts = [*parts, _cards(view)] if len(view.runs) > 1 else [_cards(view), *parts]
    bodies = [block for part in parts for block in part]
    top = [sections.head(view), sections.tiles(view), *sections.warnings(view)]
    blocks = [*top, *bodies, *sections.tables(view), sections.notes(view)]
    return document(view.title, blocks)


def _cards(view: View) -> Iterator[str]:
    runs, alone = view.begun, len(view.runs) == 1
    if runs:
        more = f": the newest {_MOST_CARDS} of {len(runs)}" if len(runs) > _MOST_CARDS else ""
        yield "<h2>The run</h2>" if alone else f"<h2>Runs{more}</h2>"
        newest = sorted(range(len(runs)), key=lambda i: runs[i].attempts[0].start)[-_MOST_CARDS:]
        yield from (_card(runs[i], alone) for i in sorted(newest))  # a chain stays in its order


def _card(run: RunLedger, alone: bool) -> str:
    """The run, or why it cannot be drawn: the page is about the others too."""
    try:
        return run_card(run, alone)
    except (R1hpcError, OSError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        return card(run.run_id, lines(f"It cannot be drawn: {why}"))
