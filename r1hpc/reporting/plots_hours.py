"""PNG plots of a group's GPU-hours, for slides and mails: the same as on the report's page.

    draw_spent(days, granted, path);  draw_waste(parts_by_run, path);  draw_planned(rows, path)

As in telemetry.plots, matplotlib is imported when something is drawn.
"""

from collections.abc import Mapping, Sequence
from datetime import date
from itertools import accumulate
from pathlib import Path

from r1hpc.reporting.plots import BLUE, GREY, RED, figure_of, finish

COLOURS = {"useful": BLUE, "lost": RED, "start-up": "#dd9a2f", "save": "#7c62a9", "idle": "#aab3bd"}
_PALE = "#cfd7df"


def draw_spent(days: Mapping[str, float], granted: float | None, unit: str, path: Path) -> None:
    """Hours over the days (YYYY-MM-DD): what is left of `granted`, or what was spent where it is None."""
    dates = [date.fromisoformat(day) for day in days]
    spent = list(accumulate(days.values()))
    values = spent if granted is None else [granted - hours for hours in spent]
    with figure_of(1, (10, 4.2)) as (figure, (axes,)):
        axes.step(dates, values, where="post", color=BLUE, lw=2)
        axes.fill_between(dates, values, step="post", color=BLUE, alpha=0.12, lw=0)
        axes.plot(dates[-1:], values[-1:], "o", color=BLUE, ms=5)
        axes.annotate(
            f"{values[-1]:,.1f}", (dates[-1], values[-1]), xytext=(-6, 8), textcoords="offset points"
        )
        axes.set_ylabel(f"{unit} {'spent' if granted is None else 'left'}")
        axes.set_ylim(bottom=min(0.0, *values), top=granted)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        figure.autofmt_xdate()
        finish(figure, axes, "Spent so far" if granted is None else "What is left of the budget", path)


def draw_waste(parts: Mapping[str, Mapping[str, float]], unit: str, path: Path) -> None:
    """Hours of each run by what they were, as shares; `parts` by the run's name."""
    names = list(parts)[::-1]
    with figure_of(1, (10, 1.6 + 0.34 * len(names))) as (figure, (axes,)):
        base = [0.0] * len(names)
        for part, colour in COLOURS.items():
            whole = [sum(parts[name].values()) or 1.0 for name in names]
            shares = [100 * parts[name][part] / w for name, w in zip(names, whole, strict=True)]
            axes.barh(names, shares, left=base, color=colour, height=0.7, label=part)
            base = [a + b for a, b in zip(base, shares, strict=True)]
        axes.set_xlim(0, 100)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(f"share of the run's {unit} (%)")
        finish(figure, axes, "Where the hours went", path, legend_below=True)


def draw_planned(rows: Sequence[tuple[str, float, float, float, float, bool]], unit: str, path: Path) -> None:
    """(name, P10, P50, P90, used, whether it still runs) of each run, on a logarithmic axis."""
    told = list(rows)[::-1]
    with figure_of(1, (10, 1.6 + 0.34 * len(told))) as (figure, (axes,)):
        for name, p10, p50, p90, used, is_live in told:
            axes.barh(name, p90 - p10, left=p10, color=_PALE, height=0.5)
            axes.plot([p50], [name], "|", color=GREY, ms=14, mew=2)
            if used > 0:
                over = "#dd9a2f" if is_live else BLUE if p10 <= used <= p90 else RED
                axes.plot([used], [name], "o", color=over, ms=6)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(f"{unit}: P10 to P90, P50 and what was used")
        finish(figure, axes, "Planned against used", path)
