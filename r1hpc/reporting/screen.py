"""Show one run on one screen for `watch`, with rich: redrawn on a terminal, line by line anywhere else.

It is as wide as the terminal, and plain ASCII if the terminal's encoding requires it.
"""

import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from r1hpc.base.names import printable
from r1hpc.base.tables import cell, terminal_width
from r1hpc.base.units import format_bytes, format_duration, format_hours
from r1hpc.config.stages import is_server
from r1hpc.reporting.progress import Shown
from r1hpc.telemetry.records.attempts import Attempt
from r1hpc.telemetry.records.metrics import is_number

_MOST_GPU_ROWS = 16
"""More GPUs are shown as one row for each node."""
_BARS, _ASCII_BARS = "▁▂▃▄▅▆▇█", "_.-~=+*#"
_CURVE_WIDTH = 40
_LINES_BESIDE_CURVES = 11
_NOISE = 1e-9
"""A relative difference this small comes from arithmetic, not from the run."""
_STYLES = {"running": "green", "finished": "bold green", "failed": "bold red", "cancelled": "red"}
_NAMES = {"grad_norm": "gradient norm", "lr": "learning rate", "tokens_per_second": "tokens/s", "mfu": "MFU"}
_FORMS = {"grad_norm": ".3g", "lr": ".3g", "tokens_per_second": ",.0f", "mfu": ".1%"}


def follow_screen(now: Callable[[], Shown], every_s: float, stopping: threading.Event) -> None:
    """Show the run repeatedly until it is over or `stopping` is set.

    On a terminal it uses the alternate screen, which a narrower window does not spoil; the last state stays.
    An event ends it: an exception could come while rich takes the terminal over.
    """
    if not sys.stdout.isatty() or Console().is_dumb_terminal:
        while True:
            shown = now()
            print(screen_text(shown), flush=True)
            if shown.is_over or stopping.wait(every_s):
                return
            print()
    console = Console(highlight=False)
    shown = now()
    try:
        with Live(_Screen(shown, is_cut=True), console=console, screen=True, auto_refresh=False) as live:
            while not (shown.is_over or stopping.wait(every_s)):
                shown = now()
                live.update(_Screen(shown, is_cut=True), refresh=True)
    finally:
        console.print(_Screen(shown))


def screen_text(shown: Shown) -> str:
    """Return the same as lines of text, as wide as the terminal or 100 columns."""
    console = Console(
        file=sys.stdout, width=terminal_width(), color_system=None, highlight=False, force_terminal=False
    )
    with console.capture() as captured:
        console.print(_Screen(shown))
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


class _Screen:
    """The complete screen, for the terminal's width at drawing time."""

    def __init__(self, shown: Shown, is_cut: bool = False) -> None:
        """`is_cut`: the terminal shows only as many lines as it has."""
        self._shown, self._is_cut = shown, is_cut

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown = self._shown
        if shown.chain:
            yield Text(printable(shown.chain))
        # On a low terminal the hours and the attempt matter more than the later curves.
        most = max(1, console.height - _LINES_BESIDE_CURVES) if self._is_cut else len(shown.curves)
        gap = [Text()] if most >= len(shown.curves) else []
        ledger = shown.ledger
        title = Text(printable(ledger.run_id), style="bold")
        title.append(f": {ledger.state}", style=_STYLES.get(ledger.state, "yellow"))
        if ledger.situation.detail:
            title.append(f"  ({printable(ledger.situation.detail)})", style="not bold")
        yield from (title, _bar(shown), *gap)
        if not shown.progress.in_parts:  # parts have no curves
            yield from (_curves(shown, most), *gap)
        yield _facts(shown)
        yield from (Text(f"note: {printable(note)}", style="yellow") for note in ledger.notes)
        yield from _gpus(shown, options.max_width)  # last, because a low terminal cuts there


def _bar(shown: Shown) -> RenderableType:
    if is_server(shown.ledger.stage):
        spells = shown.progress.recent
        return Text(f"{(spells[-1].number('requests') if spells else None) or 0:,.0f} requests answered")
    step, of, unit = shown.progress.global_step or 0, shown.progress.num_steps, shown.progress.unit
    if not of:
        return Text(f"{unit} {step:,}")
    row = Table.grid(padding=(0, 1), expand=True)
    row.add_column(no_wrap=True)
    row.add_column(ratio=1)
    row.add_column(no_wrap=True)
    share = 1.0 if step >= of else step / of
    done = ProgressBar(total=of, completed=min(step, of))
    row.add_row(f"{share:4.0%}", done, f"{unit} {step:,} of {of:,}")
    return row


def _curves(shown: Shown, most: int) -> RenderableType:
    rows: list[tuple[str, str, RenderableType]] = [
        (_NAMES.get(key, key), f"{values[-1]:{_FORMS.get(key, '.4f')}}", _Curve(values))
        for key, values in shown.curves.items()
        if values
    ]
    del rows[most:]
    if shown.held_out is not None:
        step, accuracy = shown.held_out
        rows.append(("held out", f"{accuracy:.3f}", f"greedy, step {step:,}"))
    if not rows:
        return Text("no step yet")
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, min_width=max(len(name) for name, _, _ in rows))
    table.add_column(no_wrap=True, min_width=max(len(value) for _, value, _ in rows), justify="right")
    table.add_column(no_wrap=True, overflow="crop")
    for row in rows:
        table.add_row(*row)
    return table


class _Curve:
    """Values as a line of bars, each the mean of some in a row."""

    def __init__(self, values: Sequence[float]) -> None:
        self._values = [value for value in values if abs(value) < float("inf")]  # excludes nan too

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, min(_CURVE_WIDTH, len(self._values)))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        bars = _ASCII_BARS if options.ascii_only else _BARS
        values, count = self._values, min(_CURVE_WIDTH, options.max_width, len(self._values))
        parts = [values[i * len(values) // count : (i + 1) * len(values) // count] for i in range(count)]
        means = [sum(part) / len(part) for part in parts]
        low, high = min(means, default=0.0), max(means, default=0.0)
        is_flat = high - low <= _NOISE * max(abs(high), abs(low))
        scale = 0.0 if is_flat else (len(bars) - 1) / (high - low)
        yield Text("".join(bars[round((each - low) * scale)] for each in means), style="cyan", no_wrap=True)


def _gpus(shown: Shown, width: int) -> list[RenderableType]:
    if not shown.gpus:
        return []
    rows: list[tuple[str, ...]] = [("node", "GPU", "busy", "memory", "power", "temp")]
    if len(shown.gpus) <= _MOST_GPU_ROWS:
        for gpu in shown.gpus:
            rows.append(_gpu_row(gpu["node"], cell(gpu.get("index")), [gpu]))
    else:
        for node in dict.fromkeys(gpu["node"] for gpu in shown.gpus):
            of_node = [gpu for gpu in shown.gpus if gpu["node"] == node]
            rows.append(_gpu_row(node, f"all {len(of_node)}", of_node))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    while sum(widths) + 2 * len(widths) > width and len(widths) > 3:
        del widths[-1]  # the least important is last
    table = Table.grid(padding=(0, 2))
    for i in range(len(widths)):
        table.add_column(no_wrap=True, overflow="crop", justify="right" if i else "left")
    for row in rows:
        table.add_row(*row[: len(widths)])
    stub = [Text("These readings come from the stub library: they mean nothing.", style="yellow")]
    return [Text(), table, *(stub if any(gpu["source"] == "stub" for gpu in shown.gpus) else [])]


def _gpu_row(node: str, number: str, gpus: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return means, and the hottest temperature; `-` if no GPU reports it."""
    used, total = _mean(gpus, "memory_used_bytes"), _mean(gpus, "memory_total_bytes")
    of = "" if total is None else f" of {format_bytes(int(total))}"
    return (
        printable(node),
        number,
        cell(_mean(gpus, "gpu_utilization_percent"), ".0f", " %"),
        "-" if used is None else f"{format_bytes(int(used))}{of}",
        cell(_mean(gpus, "power_w"), ".0f", " W"),
        cell(max(_known(gpus, "temperature_c"), default=None), ".0f", " C"),
    )


def _known(gpus: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [float(gpu[key]) for gpu in gpus if is_number(gpu.get(key))]


def _mean(gpus: Sequence[Mapping[str, Any]], key: str) -> float | None:
    known = _known(gpus, key)
    return sum(known) / len(known) if known else None


def _facts(shown: Shown) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    ledger = shown.ledger
    wall_s = ledger.wall().allocated / 1000
    left = "" if shown.progress.eta_s is None else f", {format_duration(shown.progress.eta_s)} left"
    limit = shown.job_ends_at
    until = "" if limit is None else f"; the time limit is in {format_duration(max(0.0, limit - shown.time))}"
    table.add_row("time", Text(f"{format_duration(wall_s)} so far{left}{until}"))
    hours = [f"{format_hours(ledger.used)} used"]
    rest = ledger.to_come
    if rest.p50 > 0:
        p10, p50, p90 = map(format_hours, (rest.p10, rest.p50, rest.p90))
        hours.append(f"{p50} to come (P10 {p10}, P90 {p90})")
    if ledger.planned is not None:
        hours.append(f"{format_hours(ledger.planned.p50)} planned")
    table.add_row(ledger.unit, Text(", ".join(hours)))
    if shown.saved is not None:
        step, at = shown.saved
        ago = format_duration(max(0.0, shown.time - at))
        table.add_row("saved", Text(f"step {step:,}, {ago} ago"))
    if ledger.situation.history.attempts:
        table.add_row("attempt", Text(_attempts(ledger.situation.history.attempts)))
    return table


def _attempts(attempts: Sequence[Attempt]) -> str:
    last, causes = attempts[-1], [a.cause.value for a in attempts[:-1] if a.cause is not None]
    before = ", ".join(f"{causes.count(cause)} {cause}" for cause in dict.fromkeys(causes))
    nodes = f"{last.nodes} node{'s' if last.nodes != 1 else ''}"
    gpus = f", {last.gpus} GPU{'s' if last.gpus != 1 else ''}" if last.gpus else ""
    return f"{last.attempt} on {nodes}{gpus}" + (f"; before: {before}" if before else "")
