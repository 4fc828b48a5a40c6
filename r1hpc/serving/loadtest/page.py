"""Write a load test as a picture or a page.

save_picture(report, Path("load.png"));  write_page(report, Path("load.html"))
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from r1hpc.base.files import write_atomic
from r1hpc.base.units import format_bytes
from r1hpc.reporting.drawing import (
    FULL,
    Axes,
    Chart,
    inline,
    listed,
    log_axis,
    note,
    number_axis,
    save_png,
    short,
    tip,
)
from r1hpc.reporting.style import card, colour, document, lines, table, text
from r1hpc.serving.loadtest.load import PERCENTILES, Distribution, Level
from r1hpc.serving.loadtest.report import HEADINGS, LoadReport, name_of, row

_COLOURS = ("useful", "start-up", "lost")
"""Colours of p50, p95 and p99."""
_TICKS_MS = [each * 10.0**power for power in range(-2, 7) for each in (1, 2, 5)]
_MEANING = {
    "rates": "In a closed loop so many clients ask, each again once it is answered; in an open one requests "
    "come at a rate, answered or not.",
    "first": "From when a request was due to its first token.",
    "gap": "From one token of an answer to the next.",
    "memory": "Of the host, over the soak.",
}


def save_picture(report: LoadReport, path: Path) -> None:
    """Write all charts under each other, atomically."""
    drawn, known = [], set[tuple[str, str]]()
    for chart in charts(report):
        drawn.append(replace(chart, keys=[key for key in chart.keys if key not in known]))
        known |= {*chart.keys}
    save_png(drawn, f"Load test of {report.about.name}", path)


def write_page(report: LoadReport, path: Path) -> None:
    """Write the findings, the charts and the table, atomically."""
    about = report.about
    title = f"Load test of {about.name}"
    sub = (
        f"{about.model} at {about.url}, {about.begun}. {about.prompts}, {about.max_tokens} tokens an answer."
    )
    body = table(HEADINGS, [row(level) for level in report.levels], numbers_from=1)
    blocks = [
        f'<header><h1>{text(title)}</h1><p class="sub">{text(sub)}</p></header>',
        card("Found", lines("\n".join(report.findings()))),
        *(card(chart.title, inline(chart, FULL), _MEANING[chart.name]) for chart in charts(report)),
        card("Every level", body, "Times in milliseconds."),
    ]
    write_atomic(path, document(title, blocks))


def charts(report: LoadReport) -> list[Chart]:
    """Return rates, time to the first token, time between tokens, memory of a soak; those with data."""
    levels = [level for level in report.levels if level.begun]
    found = [_rates(levels)] if levels else []
    found += _times("first", "Time to the first token", [(level, level.first_s) for level in levels])
    found += _times("gap", "Time between tokens", [(level, level.gap_s) for level in levels])
    soaks = [level for level in levels if level.kind == "soak" and len(level.memory) > 1]
    return [*found, *map(_memory, soaks)]


def _rates(levels: Sequence[Level]) -> Chart:
    """Draw what was finished of what was offered, level by level."""
    most = max(max(level.finished_per_s + _lost_per_s(level), level.offered_per_s) for level in levels)

    def draw(axes: Axes, width: int) -> None:
        _level_axis(axes, levels)
        number_axis(axes.yaxis, 0, 1.15 * most or 1.0)
        axes.set_title("requests/s")
        for x, level in enumerate(levels):
            good, lost = level.finished_per_s, _lost_per_s(level)
            tip(axes.bar(x, good, 0.6, color=colour("useful"))[0], f"{name_of(level)}: {good:.3g}/s finished")
            if lost:
                bar = axes.bar(x, lost, 0.6, bottom=good, color=colour("lost"))[0]
                tip(bar, f"{name_of(level)}: {level.failed} failed, {level.unfinished} unfinished")
            if level.kind != "closed":
                axes.plot([x - 0.38, x + 0.38], [level.offered_per_s] * 2, color=colour("ink"), lw=2)
            top = good + lost if level.kind == "closed" else max(good + lost, level.offered_per_s)
            note(axes, x, top, short(round(good, 2)), "muted")

    meanings = [("useful", "finished"), ("lost", "failed or unfinished"), ("ink", "offered")]
    rows = [f"{name_of(level)}: {level.finished_per_s:.3g}/s" for level in levels]
    return Chart("rates", "Throughput", listed("Finished requests/s", rows), draw, 250, keys=meanings)


def _lost_per_s(level: Level) -> float:
    return (level.failed + level.unfinished) / level.span_s


def _times(name: str, title: str, measured: Sequence[tuple[Level, Distribution]]) -> list[Chart]:
    """Draw the percentiles, level by level, in milliseconds on a logarithmic axis; no chart without data."""
    levels = [level for level, times in measured if len(times)]
    if not levels:
        return []
    values = [
        [1000 * (times.percentile(p) or 0.0) for p in PERCENTILES] for _, times in measured if len(times)
    ]
    low, high = 0.8 * min(map(min, values)), 1.25 * max(map(max, values))

    def draw(axes: Axes, width: int) -> None:
        _level_axis(axes, levels)
        axes.set_title(title)
        log_axis(axes.yaxis, low, high, [each for each in _TICKS_MS if low <= each <= high], " ms")
        for k, (percent, which) in enumerate(zip(PERCENTILES, _COLOURS, strict=True)):
            for kind in ("closed", "open", "soak"):
                at = [x for x, level in enumerate(levels) if level.kind == kind]
                axes.plot(at, [values[x][k] for x in at], color=colour(which))
            for x, level in enumerate(levels):
                bar = axes.plot([x - 0.08, x + 0.08], [values[x][k]] * 2, color=colour(which), lw=4)[0]
                tip(bar, f"{name_of(level)}: p{percent} {values[x][k]:.3g} ms")

    meanings = [(which, f"p{percent}") for percent, which in zip(PERCENTILES, _COLOURS, strict=True)]
    rows = [
        f"{name_of(level)}: {' / '.join(f'{each:.3g}' for each in found)}"
        for level, found in zip(levels, values, strict=True)
    ]
    label = listed(f"{title} in ms, p50 / p95 / p99", rows)
    return [Chart(name, title, label, draw, 250, keys=meanings)]


def _memory(level: Level) -> Chart:
    minutes, sizes = [t / 60 for t, _ in level.memory], [value / 2**20 for _, value in level.memory]

    def draw(axes: Axes, width: int) -> None:
        number_axis(axes.xaxis, 0, max(minutes) or 1.0)
        number_axis(axes.yaxis, 0, 1.15 * max(sizes))
        axes.set_title("MiB")
        axes.set_xlabel("minutes", loc="right")
        axes.plot(minutes, sizes, color=colour("save"))

    first, last = (format_bytes(level.memory[i][1]) for i in (0, -1))
    label = f"Memory over the soak, from {first} to {last}"
    return Chart("memory", "Memory of the server", label, draw, 200)


def _level_axis(axes: Axes, levels: Sequence[Level]) -> None:
    """Set a place for each level, with the loops apart."""
    axes.set_xlim(-0.6, len(levels) - 0.4)
    axes.set_xticks(range(len(levels)), [name_of(level).replace(" ", "\n") for level in levels])
    axes.grid(axis="x", visible=False)
    for x in range(1, len(levels)):
        if levels[x].kind != levels[x - 1].kind:
            axes.axvline(x - 0.5, color=colour("idle"), lw=1)
