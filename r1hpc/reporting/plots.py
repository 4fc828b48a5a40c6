"""PNG plots of a run: loss, throughput and GPUs, with its attempts as bands.

    paths = draw_all(run, summary, run.report)

matplotlib is imported here only (telemetry.plots_hours draws through this module), when something is drawn,
with the Agg backend, which needs no display.
"""

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from r1hpc.base.rundir import RunDir
from r1hpc.telemetry.gpu_series import GpuSeries, read_gpu_series
from r1hpc.telemetry.metrics import Step, read_events
from r1hpc.telemetry.summary import AttemptSummary, RunSummary

BLUE, RED, GREY, GREEN = "#2563a8", "#cc3311", "#667080", "#228833"
"""What lasted, what was lost, everything else, what is good."""
_BANDS = ("#eef2f7", "#dfe7f1")
_COLOURS = ("#2563a8", "#dd7711", "#228833", "#aa3377", "#66bbcc", "#998800", "#555555", "#ee6677")
_STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa4b0",
    "axes.grid": True,
    "grid.color": "#d5dae0",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "figure.dpi": 110,
    "savefig.facecolor": "white",
}
_MOST_LABELS = 12
_MOST_RAW = 300
"""Longer loss curves are drawn pale, with their moving mean on top."""
_MOST_LINES = 8
"""More GPUs than this are shown by node: the median and the range between the least and the most."""


def draw_all(run: RunDir, summary: RunSummary, folder: Path) -> list[Path]:
    """Draw what there is data for into `folder`; the paths of the files."""
    # It draws with what stands in this module.
    from r1hpc.reporting.plots_reward import draw_reward, has_rewards

    folder.mkdir(mode=0o700, exist_ok=True)
    paths = []
    if summary.steps.effective or summary.steps.lost:
        draw_loss(run.run_id, summary, folder / "loss.png")
        draw_throughput(run, summary, folder / "throughput.png")
        paths += [folder / "loss.png", folder / "throughput.png"]
    if has_rewards(summary):
        draw_reward(run, summary, folder / "reward.png")
        paths.append(folder / "reward.png")
    series = read_gpu_series(sorted(run.metrics.glob("gpu-*.jsonl")))
    if series:
        draw_gpus(run.run_id, summary, series, folder / "gpu.png")
        paths.append(folder / "gpu.png")
    return paths


def draw_loss(title: str, summary: RunSummary, path: Path) -> None:
    """Loss and learning rate over the steps; each attempt is a band with its cause."""
    steps = list(summary.steps.effective.values())
    with figure_of(2, (10, 5.6), (3.2, 1)) as (figure, (top, bottom)):
        numbers = [step.global_step for step in steps]
        losses = [_number(step.loss) for step in steps]
        _draw_loss_line(top, numbers, losses)
        for i, segment in enumerate(_segments(summary.steps.lost)):
            # Wide and pale: a step that is taken again has the same loss, and its line lies on top.
            xs, ys = [s.global_step for s in segment], [_number(s.loss) for s in segment]
            label = "lost: taken again" if i == 0 else None
            width, alpha, order = (7.0, 0.4, 2) if len(steps) <= _MOST_RAW else (0.8, 0.8, 4)
            how = {"color": RED, "lw": width, "alpha": alpha, "zorder": order, "label": label}
            top.plot(xs, ys, solid_capstyle="butt", **how)
            if len(xs) == 1:
                top.plot(xs, ys, "o", color=RED, ms=4, alpha=0.6, zorder=2)
        bottom.plot(numbers, [_number(step.lr) for step in steps], color=GREY, lw=1.4)
        bottom.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
        bottom.set_ylim(bottom=0)
        spans = step_spans(summary)
        for axes in (top, bottom):
            bands(axes, spans, labels=axes is top)
        top.set_ylabel("loss")
        bottom.set_ylabel("learning rate")
        bottom.set_xlabel("optimizer step")
        finish(figure, top, f"{title}: loss", path)


def draw_throughput(run: RunDir, summary: RunSummary, path: Path) -> None:
    """Tokens per second over wall time, with MFU where it is known and a mark for each save."""
    begin = summary.attempts[0].attempt.start if summary.attempts else 0.0
    effective = [step for step in summary.steps.effective.values() if step.time is not None]
    unit, seconds = _time_unit(max([s.end for s in summary.attempts] or [0.0]) - begin)
    with figure_of(1, (10, 4.2)) as (figure, (axes,)):
        for steps, colour, label in (
            (_segments(effective), BLUE, "steps that lasted"),
            (_segments(summary.steps.lost), RED, "lost: taken again"),
        ):
            for i, segment in enumerate(steps):
                xs = [((s.time or 0.0) - begin) / seconds for s in segment]
                ys = [_number(s.tokens_per_second) for s in segment]
                axes.plot(xs, ys, color=colour, lw=1.3, label=label if i == 0 else None, zorder=3)
        axes.set_ylim(bottom=0)
        saves = [e["time"] for e in read_events(run) if e.get("event") == "save" and "time" in e]
        xs = [(time - begin) / seconds for time in saves]
        axes.plot(
            xs,
            [0] * len(xs),
            "^",
            color="#228833",
            ms=6,
            clip_on=False,
            zorder=5,
            label="checkpoint" if xs else None,
        )
        bands(axes, _time_spans(summary, begin, seconds))
        _mfu_axis(axes, effective)
        axes.set_ylabel("tokens per second")
        axes.set_xlabel(f"wall time since the first attempt began ({unit})")
        finish(figure, axes, f"{run.run_id}: throughput", path)


def draw_gpus(title: str, summary: RunSummary, series: Sequence[GpuSeries], path: Path) -> None:
    """Utilisation, power and memory over wall time: a line for each GPU, or for each node of many."""
    begin = summary.attempts[0].attempt.start if summary.attempts else series[0].first_time
    unit, seconds = _time_unit(max(s.last_time for s in series) - begin)
    panels = ("utilisation (%)", "power (W)", "memory (GiB)")
    stub = any(s.source == "stub" for s in series)
    with figure_of(3, (10, 7.2)) as (figure, rows):
        for panel, (axes, ylabel) in enumerate(zip(rows, panels, strict=True)):
            if len(series) <= _MOST_LINES:
                _gpu_lines(axes, series, panel, begin, seconds)
            else:
                _node_ranges(axes, series, panel, begin, seconds)
            axes.set_ylabel(ylabel)
            axes.set_ylim(bottom=0, top=105 if panel == 0 else None)
            axes.margins(x=0.01)
            bands(axes, _time_spans(summary, begin, seconds), labels=panel == 0)
        rows[-1].set_xlabel(f"wall time since the first attempt began ({unit})")
        warning = "  (source=stub: made by a test library, these readings mean nothing)" if stub else ""
        finish(figure, rows[0], f"{title}: GPUs{warning}", path, legend_below=True)


def _draw_loss_line(axes: Any, numbers: list[int], losses: list[float]) -> None:
    if len(numbers) <= _MOST_RAW:
        axes.plot(numbers, losses, color=BLUE, lw=1.5, label="loss", zorder=3)
        return
    axes.plot(numbers, losses, color=BLUE, lw=0.5, alpha=0.35, zorder=3)
    width = max(5, len(numbers) // 100)
    axes.plot(
        numbers, _smooth(losses, width), color=BLUE, lw=1.8, label=f"loss (mean of {width} steps)", zorder=5
    )
    finite = sorted(x for x in losses if math.isfinite(x))
    if finite:  # one wild step must not flatten the curve
        low, high = finite[0], finite[min(len(finite) - 1, int(0.998 * len(finite)))]
        axes.set_ylim(low - 0.05 * (high - low), high + 0.12 * (high - low))


def _smooth(values: list[float], width: int) -> list[float]:
    """Mean of the finite values within width / 2 on either side; fewer towards the ends."""
    sums, counts = [0.0], [0]
    for value in values:
        finite = math.isfinite(value)
        sums.append(sums[-1] + (value if finite else 0.0))
        counts.append(counts[-1] + finite)
    smooth = []
    for i in range(len(values)):
        half = min(width // 2, i, len(values) - 1 - i)
        count = counts[i + half + 1] - counts[i - half]
        smooth.append((sums[i + half + 1] - sums[i - half]) / count if count else math.nan)
    return smooth


def _gpu_lines(axes: Any, series: Sequence[GpuSeries], panel: int, begin: float, seconds: float) -> None:
    for i, each in enumerate(series):
        xs, ys = _with_gaps(each, panel, begin, seconds)
        axes.plot(xs, ys, color=_COLOURS[i % len(_COLOURS)], lw=1.1, alpha=0.9, label=each.name, zorder=3)


def _node_ranges(axes: Any, series: Sequence[GpuSeries], panel: int, begin: float, seconds: float) -> None:
    for i, node in enumerate(sorted({each.node for each in series})):
        members = [each for each in series if each.node == node]
        columns = [_with_gaps(each, panel, begin, seconds) for each in members]
        rows = list(zip(*(ys for _, ys in columns), strict=False))
        xs = columns[0][0][: len(rows)]
        colour = _COLOURS[i % len(_COLOURS)]
        axes.fill_between(
            xs, [min(r) for r in rows], [max(r) for r in rows], color=colour, alpha=0.2, lw=0, zorder=2
        )
        label = f"{node} (median and range of {len(members)})" if i < _MOST_LINES else None
        axes.plot(xs, [statistics.median(r) for r in rows], color=colour, lw=1.1, label=label, zorder=3)


def _with_gaps(
    series: GpuSeries, panel: int, begin: float, seconds: float
) -> tuple[list[float], list[float]]:
    """x and y of one panel, with a nan between two attempts."""
    xs, ys = [], []
    for segment in series.segments:
        xs += [(point.time - begin) / seconds for point in segment]
        ys += [point[panel + 1] for point in segment]
        xs.append(xs[-1])
        ys.append(math.nan)
    return xs, ys


def bands(axes: Any, spans: list[tuple[float, float, str]], labels: bool = True) -> None:
    """Shade the attempts by turns; name each by its number and cause, above, where there is room."""
    if not spans:
        return
    left, right = min(s[0] for s in spans), max(s[1] for s in spans)
    width = max(right - left, 1e-9)
    axes.set_xlim(left - 0.01 * width, right + 0.01 * width)
    for i, (start, end, label) in enumerate(spans):
        axes.axvspan(start, end, color=_BANDS[i % 2], lw=0, zorder=0)
        if labels and len(spans) <= _MOST_LABELS:
            wide = (end - start) / width > 0.0078 * len(label)
            axes.annotate(
                label if wide else label.split(" ")[0],
                ((start + end) / 2, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=8.5,
                color=GREY,
            )


def step_spans(summary: RunSummary) -> list[tuple[float, float, str]]:
    """From an attempt's first step to that of the next one that took any."""
    taken = [a for a in summary.attempts if a.attempt.first_step is not None]
    spans = []
    for i, each in enumerate(taken):
        first, last = each.attempt.first_step, each.attempt.last_step
        follower = taken[i + 1].attempt.first_step if i + 1 < len(taken) else None
        end = last if follower is None else follower - 1
        if first is not None and end is not None and end >= first:
            spans.append((first - 0.5, end + 0.5, _label(each)))
    return spans


def _time_spans(summary: RunSummary, begin: float, seconds: float) -> list[tuple[float, float, str]]:
    return [
        ((a.attempt.start - begin) / seconds, (a.end - begin) / seconds, _label(a)) for a in summary.attempts
    ]


def _label(each: AttemptSummary) -> str:
    cause = each.attempt.cause
    return f"#{each.attempt.attempt} {cause.value if cause else 'running'}"


def _mfu_axis(axes: Any, steps: list[Step]) -> None:
    """MFU is proportional to tokens per second: the same line, read on the right."""
    known = [(s.mfu, s.tokens_per_second) for s in steps if s.mfu and s.tokens_per_second]
    if known:
        factor = statistics.median(100 * mfu / rate for mfu, rate in known)
        right = axes.secondary_yaxis("right", functions=(lambda y: y * factor, lambda y: y / factor))
        right.set_ylabel("MFU (%), without recomputation")


def _segments(steps: Iterable[Step]) -> list[list[Step]]:
    """Runs of steps in a row within one attempt: a line is drawn through each, and none between them."""
    segments: list[list[Step]] = []
    for step in sorted(steps, key=lambda s: (s.attempt, s.global_step)):
        last = segments[-1][-1] if segments else None
        if last is not None and (last.attempt, last.global_step + 1) == (step.attempt, step.global_step):
            segments[-1].append(step)
        else:
            segments.append([step])
    return segments


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _time_unit(span_s: float) -> tuple[str, float]:
    for unit, seconds in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if span_s >= 2 * seconds:
            return unit, seconds
    return "seconds", 1.0


@contextmanager
def figure_of(
    rows: int, size: tuple[float, float], heights: Sequence[float] | None = None
) -> Iterator[tuple[Any, Any]]:
    """A figure of stacked panels that share their x axis; closed at the end, whatever happens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    grid = {"height_ratios": heights} if heights else None
    with matplotlib.rc_context(_STYLE):
        figure, axes = pyplot.subplots(
            rows, 1, figsize=size, sharex=True, squeeze=False, gridspec_kw=grid, layout="constrained"
        )
        try:
            yield figure, axes[:, 0]
        finally:
            pyplot.close(figure)


def finish(figure: Any, axes: Any, title: str, path: Path, legend_below: bool = False) -> None:
    """Title, legend where there is more than one line, and the file, whole or not at all."""
    axes.set_title(title, loc="left", pad=20, fontweight="bold")
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) > 1 and legend_below:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(handles)), fontsize=9)
    elif len(handles) > 1:
        axes.legend(loc="best", fontsize=9)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png")
    temporary.chmod(0o600)
    temporary.replace(path)
