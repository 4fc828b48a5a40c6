"""The report as files: one HTML page, and its charts as PNG beside it, for slides and mails.

path = publish(None, run_root, None, now=time.time())        # RUN_ROOT/report.html, of all runs
path = publish([run], run_root, None, now=time.time())       # RUN_DIR/report/index.html
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from r1hpc.accounting.hours import fold_hours
from r1hpc.accounting.ledger import RunLedger, clip
from r1hpc.accounting.open_ledger import open_ledgers, survey
from r1hpc.base.choose_run import full_name
from r1hpc.base.errors import UsageError
from r1hpc.base.rundir import RunDir
from r1hpc.reporting.drawing import save_png
from r1hpc.reporting.page import write_page
from r1hpc.reporting.run_card import draw_pngs
from r1hpc.reporting.sections import charts_of_hours
from r1hpc.reporting.view import View, make_view
from r1hpc.slurm.sacct import JobRecord

_SELECTED = "Only what was selected is counted here, so this page says nothing of the budget."
_GROUPS = ("user", "account", "stage", "partition", "state", "qos")


def publish(
    runs: Sequence[RunDir] | None,
    run_root: Path,
    out: Path | None,
    now: float,
    *,
    hours: Mapping[str, Any] | None = None,
    records: Sequence[JobRecord] = (),
    window: tuple[float | None, float | None] = (None, None),
    user: str | None = None,
    account: str | None = None,
    pictures: bool = True,
) -> Path:
    """Write the page; its path.

    Args:
        runs: those it is about; None: all under the run root.
        out: where it goes; None: RUN_DIR/report/index.html of a single run, else RUN_ROOT/report.html.
        hours: what fold_hours made of Slurm's records, which then are what was spent; as with `window` and
            `user` these are a selection, and the page leaves the budget out.
        records: those of the runs' jobs among Slurm's, from a file of sacct's output.
        window: (start, end), Unix seconds: what was held outside of it is left out.
        user: only runs of this user.
        account: only runs of this account, as far as it is known.
        pictures: draw the PNG files too.

    Raises:
        UsageError: the named runs hold nothing of what was selected.
    """
    is_selected = hours is not None or window != (None, None) or (user, account) != (None, None)
    if runs is None:
        ledgers, notes = survey(run_root, now, records)
    else:
        ledgers, notes = open_ledgers(runs, now, records)
    if window != (None, None):
        ledgers = clip(ledgers, *window)
    ledgers = [run for run in ledgers if user in (None, run.user) and account in (None, run.account)]
    if runs is not None and not ledgers:
        named = ", ".join(full_name(run) for run in runs)
        raise UsageError(". ".join([f"{named}: nothing was held of what is selected", *notes]))
    single = ledgers[0] if runs is not None and len(runs) == 1 else None
    if runs is not None and all(run.source == "sacct" for run in ledgers):
        hours = fold_hours(held for run in ledgers for held in run.allocations)
    notes += [_SELECTED] if runs is None and is_selected else []
    path = out or (single.run.report / "index.html" if single else run_root / "report.html")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    view = make_view(ledgers, run_root, now, notes=notes, whole=runs is None and not is_selected)
    if hours is not None:
        view = _by_slurm(view, hours)
    if pictures:
        view = replace(view, pictures=tuple(_draw(view, single, path)))
    write_page(view, path)
    return path


def _by_slurm(view: View, hours: Mapping[str, Any]) -> View:
    """The view with Slurm's hours as what was spent."""
    status = replace(view.status, spent=hours["total"], by_day=hours["by_day"], source="sacct")
    groups = {key: hours[f"by_{key}"] for key in _GROUPS if hours.get(f"by_{key}")}
    return replace(view, status=status, groups=groups)


def _draw(view: View, single: RunLedger | None, page: Path) -> Iterator[str]:
    """The PNG files beside the page, by their names."""
    prefix = "" if page.stem == "index" else f"{page.stem}-"
    if single is not None:
        yield from (path.name for path in draw_pngs(single.run, single.summary, page.parent, prefix))
    for name, chart in charts_of_hours(view).items():
        if chart is not None:
            save_png([chart], chart.title, page.with_name(f"{prefix}{name}.png"))
            yield f"{prefix}{name}.png"
