"""One run on the page: its loss, reward, MFU, utilisation and power, with its attempts as bands."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from r1hpc.accounting.budget import format_hours
from r1hpc.accounting.ledger import RunLedger
from r1hpc.reporting.html import text
from r1hpc.reporting.series import Band, Curve, by_time, gpu_band, rewards, thin
from r1hpc.reporting.svg import Plot, Scale, short
from r1hpc.telemetry.diagnose import QUICK_BYTES, diagnose
from r1hpc.telemetry.gpu_series import GpuSeries, read_gpu_series
from r1hpc.telemetry.metrics import Step

_STUB = "source=stub: a test library, not readings"

_LABEL_WIDTH = 0.3
"""Of the plot: two causes closer than this are written on two lines."""
_NOTHING = "<p class=muted>It has taken no step yet.</p>"


@dataclass(frozen=True)
class _Figure:
    title: str
    body: str
    note: str = ""


def run_card(run: RunLedger) -> str:
    """The HTML of one run."""
    series = read_gpu_series(sorted(run.run.metrics.glob("gpu-*.jsonl")))
    drawn = [each for each in (*_by_step(run), *_over_time(run), *_gpus(run, series)) if each.body]
    figures = "".join(
        f"<figure><figcaption>{text(each.title)}"
        + (f' <span class="stub">{text(each.note)}</span>' if each.note else "")
        + f"</figcaption>{each.body}</figure>"
        for each in drawn
    )
    columns = "" if len(drawn) in (1, 2, 4) else " n3"
    return (
        f'<section class="card run" id="run-{text(run.run_id)}"><h3>{text(run.run_id)} '
        f'<span class="badge {text(run.state)}">{text(run.state)}</span></h3>'
        f'<p class="facts">{" · ".join(text(fact) for fact in _facts(run))}</p>'
        f"{_findings(run)}"
        f'<div class="figures{columns}">{figures or _NOTHING}</div></section>'
    )


def _facts(run: RunLedger) -> list[str]:
    planned = f" of {format_hours(run.planned.p50)} planned" if run.planned else ""
    whole = run.used
    facts = [
        f"{format_hours(whole)} {run.unit}{planned}",
        f"{100 * run.parts['useful'] / whole:.0f} % useful" if whole else "nothing used yet",
        f"{len(run.attempts)} attempt{'s' * (len(run.attempts) != 1)}",
        f"stage {run.stage}",
        run.user,
    ]
    if run.mfu is not None:
        facts.insert(2, f"MFU {100 * run.mfu:.1f} %")
    return facts


def _findings(run: RunLedger) -> str:
    """What stands out in the newest attempt, from telemetry.diagnose; nothing where nothing does."""
    if not run.attempts:
        return ""
    newest = run.summary.attempts[-1]
    told = diagnose(run.run, newest.attempt, end=newest.end, max_bytes=QUICK_BYTES).findings
    first = {finding.code: finding for finding in reversed(told)}
    items = "".join(
        f'<li class="{each.severity.value}"><b>{text(each.code.replace("_", " "))}</b> '
        f'{text(each.sentence)} <span class="muted">Try: {text(each.advice)}</span></li>'
        for each in reversed(first.values())
    )
    return f'<ul class="findings">{items}</ul>' if items else ""


def _by_step(run: RunLedger) -> list[_Figure]:
    steps = list(run.summary.steps.effective.values())
    if not steps:
        return []
    numbers = [float(step.global_step) for step in steps]
    lost = [(float(s.global_step), s.loss) for s in run.summary.steps.lost]
    found = [
        _Figure("Loss", _step_plot("loss", thin(numbers, [s.loss for s in steps]), _attempt_edges(run), lost))
    ]
    reward = rewards(steps)
    if reward:
        curve = thin(numbers, reward)
        found.append(_Figure("Reward", _step_plot("mean reward", curve, _attempt_edges(run), [], "good")))
    return found


def _step_plot(
    unit: str,
    curve: Curve,
    edges: Sequence[tuple[float, str]],
    lost: Sequence[tuple[float, float | None]],
    css: str = "useful",
) -> str:
    known = curve.finite
    if not known:
        return ""
    low, high = min(known), max(known)
    pad = 0.08 * (high - low) or max(abs(high), 1.0) * 0.05
    x = Scale(min(curve.xs[0], 0.0), max(curve.xs[-1], 1.0))
    y = Scale(low - pad, high + 2 * pad)
    plot = Plot(f"{unit} over the optimizer steps", x, y, 200)
    plot.axes(x.ticks(5), y.ticks(5), unit, "optimizer step")
    for begin, end in _stretches([step for step, _ in lost]):
        plot.bar(
            begin - 0.5, end + 0.5, y.low, y.high, "lost pale", f"steps {begin:g} to {end:g} were redone"
        )
        plot.label((begin + end) / 2, y.low, "redone", "middle", "up small lost")
    lower, before = False, -1.0
    for step, cause in edges:
        lower = not lower and x.at(step) - before < _LABEL_WIDTH
        before = x.at(step)
        plot.rule(step, "edge")
        place = f"down{2 if lower else ''} muted small"
        plot.label(step, y.high, cause, "end" if before > 0.2 else "start", place)
    plot.line(curve.xs, curve.ys, f"{css} thick")
    last = next(v for v in reversed(curve.ys) if math.isfinite(v))
    plot.dot(curve.xs[-1], last, css, f"{unit} {last:.4g}")
    plot.label(curve.xs[-1], last, f"{last:.3g}", "end", "up strong")
    return plot.render()


def _attempt_edges(run: RunLedger) -> list[tuple[float, str]]:
    """Where an attempt ended that was not the last, by the step after which the next one went on."""
    found = []
    attempts = run.summary.attempts
    for each, following in pairwise(attempts):
        resumed = following.attempt.resumed_from or following.attempt.first_step
        if resumed is not None and each.attempt.cause is not None:
            found.append((float(resumed), each.attempt.cause.value.replace("_", " ")))
    return found if len(found) <= 6 else [(step, "") for step, _ in found]


def _over_time(run: RunLedger) -> list[_Figure]:
    steps: list[Step] = [s for s in run.summary.steps.effective.values() if s.time is not None]
    mfu = [None if s.mfu is None else 100 * s.mfu for s in steps]
    if any(value is not None for value in mfu):
        curve = by_time(steps, mfu)
        return [
            _Figure("MFU", _time_plot("% of dense bf16 peak, without recomputation", curve, run, "useful"))
        ]
    rate = [s.tokens_per_second for s in steps]
    if any(value is not None for value in rate):
        curve = by_time(steps, rate)
        return [_Figure("Throughput", _time_plot("tokens per second", curve, run, "useful"))]
    return []


def _time_plot(unit: str, curve: Curve, run: RunLedger, css: str) -> str:
    known = curve.finite
    if not known:
        return ""
    x, y = Scale(run.start, max(run.end, run.start + 1)), Scale(0, 1.15 * max(known) or 1.0)
    plot = Plot(f"{unit} over time", x, y, 200)
    plot.axes(x.time_ticks(5), y.ticks(5), unit)
    _shade(plot, run, y)
    plot.line(curve.xs, curve.ys, f"{css} thick")
    mean = sum(known) / len(known)
    plot.label(x.high, y.high, f"mean {short(round(mean, 1))}", "end", "down strong")
    return plot.render()


def _gpus(run: RunLedger, series: Sequence[GpuSeries]) -> list[_Figure]:
    if not series or not any(each.segments for each in series):
        return []
    note = _STUB if any(each.source == "stub" for each in series) else ""
    count = f"{len(series)} GPU{'s' * (len(series) != 1)}"
    many = ": median, and the range over them" if len(series) > 1 else ""
    found = []
    for title, field, unit, top in (
        ("Utilisation", "utilization_percent", f"% of time with a kernel running, {count}{many}", 100.0),
        ("Power", "power_w", f"watts a GPU, {count}{many}", 0.0),
    ):
        band = gpu_band(series, field)
        if band.parts:
            found.append(_Figure(title, _band_plot(unit, band, run, top), note))
    return found


def _band_plot(unit: str, band: Band, run: RunLedger, top: float) -> str:
    first, last = band.parts[0][0][0], band.parts[-1][0][-1]
    x = Scale(min(run.start, first), max(run.end, last, first + 1))
    y = Scale(0, max(top, band.top, 1.0) * 1.06)
    plot = Plot(unit, x, y, 200)
    plot.axes(x.time_ticks(5), y.ticks(5), unit)
    _shade(plot, run, y)
    for xs, least, median, most in band.parts:
        plot.area(xs, least, most, "save pale")
        plot.line(xs, list(median), "save")
    return plot.render()


def _shade(plot: Plot, run: RunLedger, y: Scale) -> None:
    """Bands of the attempts; their gaps are time in the queue."""
    for i, each in enumerate(run.attempts):
        if len(run.attempts) > 1:
            told = f"attempt {each.attempt}: {each.cause}"
            plot.bar(each.start, each.end, y.low, y.high, f"band{i % 2}", told)


def _stretches(steps: Sequence[float]) -> list[tuple[float, float]]:
    found: list[tuple[float, float]] = []
    for step in sorted(set(steps)):
        if found and step <= found[-1][1] + 1:
            found[-1] = (found[-1][0], step)
        else:
            found.append((step, step))
    return found
