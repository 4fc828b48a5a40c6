"""The report as files: one HTML page, and the same plots as PNG beside it.

path = publish(None, run_root, None, now=time.time())        # RUN_ROOT/report.html, of all runs
path = publish([run], run_root, None, now=time.time())       # RUN_DIR/report/index.html
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from r1hpc.accounting.ledger import RunLedger, clip
from r1hpc.accounting.open_ledger import open_ledgers, survey
from r1hpc.base.rundir import RunDir
from r1hpc.reporting.page import write_page
from r1hpc.reporting.view import View, make_view
from r1hpc.slurm.sacct import JobRecord

_MOST_ROWS = 24
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
        pictures: draw the PNG files too.
    """
    is_selected = hours is not None or window != (None, None) or user is not None
    if runs is None:
        told, notes = survey(run_root, now, records)
    else:
        told, notes = open_ledgers(runs, now, records)
    if window != (None, None):
        told = clip(told, *window)
    told = [run for run in told if user in (None, run.user)]
    single = told[0] if runs is not None and len(told) == 1 else None
    notes += [_SELECTED] if runs is None and is_selected else []
    path = out or (single.run.report / "index.html" if single else run_root / "report.html")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    view = make_view(told, run_root, now, notes=notes, whole=runs is None and not is_selected)
    if hours is not None:
        view = _by_slurm(view, hours)
    if pictures:
        view = replace(view, pictures=tuple(_draw(view, single, path)))
    write_page(view, path)
    return path


def _by_slurm(view: View, hours: Mapping[str, Any]) -> View:
    """The view with Slurm's hours as what was spent."""
    standing = replace(view.standing, spent=hours["total"], by_day=hours["by_day"], source="sacct")
    groups = {key: hours[f"by_{key}"] for key in _GROUPS if hours.get(f"by_{key}")}
    return replace(view, standing=standing, groups=groups)


def _draw(view: View, single: RunLedger | None, page: Path) -> Iterator[str]:
    """The PNG files beside the page, by their names."""
    # Deferred: matplotlib takes a second that no other format should pay.
    from r1hpc.reporting import plots, plots_hours

    prefix = "" if page.stem == "index" else f"{page.stem}-"
    if single is not None:
        yield from (path.name for path in plots.draw_all(single.run, single.summary, page.parent))
    days = view.days
    if days:
        granted = view.budget.gpu_hours if view.budget else None
        plots_hours.draw_spent(days, granted, view.unit, page.with_name(f"{prefix}spent.png"))
        yield f"{prefix}spent.png"
    parts = {run.run_id: run.parts for run in view.counted if run.used > 0}
    if parts:
        told = dict(list(parts.items())[:_MOST_ROWS])
        plots_hours.draw_waste(told, view.unit, page.with_name(f"{prefix}waste.png"))
        yield f"{prefix}waste.png"
    rows = [
        (run.run_id, run.planned.p10, run.planned.p50, run.planned.p90, run.used, run.is_live)
        for run in view.counted
        if run.planned is not None and run.planned.p10 > 0
    ][:_MOST_ROWS]
    if rows:
        plots_hours.draw_planned(rows, view.unit, page.with_name(f"{prefix}planned.png"))
        yield f"{prefix}planned.png"
