"""The charts: numbers and names as text, colours of the palette, the largest of many, always alike."""

import math
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from r1hpc.plan.hours.spread import Spread
from r1hpc.reporting import hours_charts, style
from r1hpc.reporting.drawing import (
    FULL,
    HALF,
    NARROW,
    Axes,
    Chart,
    dot,
    inline,
    note,
    save_png,
    short,
    time_axis,
)
from r1hpc.reporting.run_charts import RunData, _limits, charts_of_run, gpu_range, thin, write_pngs
from r1hpc.telemetry.diagnosis.summary import AttemptSummary
from r1hpc.telemetry.diagnosis.timeline import Split
from r1hpc.telemetry.gpu.history import GpuSeries, Point
from r1hpc.telemetry.records.attempts import Attempt, Cause
from r1hpc.telemetry.records.metrics import Step

HOSTILE = '<img src=x onerror="alert(1)">$x^2$'
NOW = time.mktime((2026, 10, 8, 12, 0, 0, 0, 0, -1))
PARTS = {"useful": 90.0, "lost": 5.0, "start-up": 1.0, "save": 1.0, "idle": 3.0}


def svgs(html: str) -> list[ElementTree.Element]:
    """Every drawing in the HTML, parsed."""
    return [ElementTree.fromstring(found) for found in re.findall(r"<svg.*?</svg>", html, re.S)]


def texts(html: str) -> list[str]:
    return [node.text or "" for svg in svgs(html) for node in svg.iter("text")]


def planned(name: str, used: float) -> hours_charts.EstimatedRun:
    return hours_charts.EstimatedRun(name, Spread(80, 100, 150), used, False, True)


def attempt_of(
    number: int, cause: Cause | None, end: float, first: int | None = None, last: int | None = None
) -> AttemptSummary:
    start = NOW if number == 1 else NOW + 70
    return AttemptSummary(Attempt(number, cause, start, end, 1, 4, first, last, None), end, Split())


def steps_of(attempt: int, first: int, last: int, **more: float) -> list[Step]:
    return [
        Step(
            n,
            attempt,
            loss=3 - n / 100,
            lr=1e-4,
            tokens_per_second=50.0,
            mfu=0.4,
            time=NOW + n,
            extra=dict(more),
        )
        for n in range(first, last + 1)
    ]


def gpu(index: int, watts: float) -> GpuSeries:
    series = GpuSeries("n1", f"n1 GPU {index}")
    series.source = "stub"
    for second in range(40):
        series.add(1, Point(NOW + second, 95.0, watts, 40.0))
    return series


def two_attempts() -> RunData:
    attempts = [
        attempt_of(1, Cause.node_fail, NOW + 65, 1, 60),
        attempt_of(2, Cause.finished, NOW + 200, 51, 200),
    ]
    steps = [*steps_of(1, 1, 50, reward=0.5), *steps_of(2, 51, 200, reward=0.75)]
    tests = {100: {"value": 0.4, "low": 0.3, "high": 0.5}}
    return RunData(attempts, steps, steps_of(1, 51, 60), [NOW + 50], tests, [gpu(0, 300.0), gpu(1, 350.0)])


# One run


def test_a_run_is_drawn_with_its_attempts_causes_and_lost_steps() -> None:
    charts = charts_of_run(two_attempts())
    assert charts["reward"].label.startswith("mean reward over the optimizer steps: 0.75")
    assert set(charts) == {"loss", "lr", "reward", "throughput", "utilisation", "power", "memory"}
    loss = inline(charts["loss"])
    assert {"loss", "optimizer step", "#1", "#2", "redone", "last 1"} <= set(texts(loss))
    assert "#2 finished" not in texts(loss), (
        "attempts are named alike, and the first has no room for its cause"
    )
    assert "<title>#1 node fail</title>" in loss
    assert "<title>steps 51 to 60 were taken again</title>" in loss
    assert "held-out" in texts(inline(charts["reward"]))
    assert list(charts)[:2] == ["reward", "loss"]
    assert charts["throughput"].title == "MFU"
    assert "mean 40" in texts(inline(charts["throughput"]))
    for name, unit, number in (("loss", "loss", "last 1"), ("throughput", "% of dense bf16 peak", "mean 40")):
        for svg in svgs(inline(charts[name])):
            heights = {node.text: node.get("y") for node in svg.iter("text")}
            assert heights[unit] == heights[number], "the number is above the curve, and hides no step"
    assert charts["power"].label == "watts a GPU, 2 GPUs: median and range"


@pytest.mark.parametrize(
    ("losses", "least"),
    [([2.0, 2.0 + 1e-9] * 5, 1e-3), ([0.0, 1e-10] * 5, 1e-5), ([2.0, 1.5] * 5, 0.5)],
)
def test_rounding_is_not_drawn_as_a_curve(losses: list[float], least: float) -> None:
    steps = [Step(i + 1, 1, loss=loss, time=NOW + i) for i, loss in enumerate(losses)]
    (curve,) = [thin([step.global_step for step in steps], losses)]
    low, high = _limits([curve], None, ())
    assert low < min(losses) <= max(losses) < high
    assert least <= high - low <= 2 * max(least, 1e-3) * 2
    assert _limits([thin([1.0, 2.0], [0.0, 0.0])], 0.0, ()) == (0.0, 0.2), "a reward that stays 0"


def test_a_legend_lies_above_the_values() -> None:
    """Where it covers no error bar."""
    for svg in svgs(inline(charts_of_run(two_attempts())["reward"])):
        heights = {node.text: float(node.get("y") or 0) for node in svg.iter("text")}
        assert heights["held-out"] < heights["#1"]


def test_what_a_run_has_no_data_for_is_not_drawn() -> None:
    attempt = attempt_of(1, None, NOW + 10)
    assert charts_of_run(RunData([attempt], [], [])) == {}
    steps = [Step(1, 1, loss=math.nan, time=NOW), Step(2, 1, loss=None, tokens_per_second=7.0, time=NOW + 1)]
    charts = charts_of_run(RunData([attempt], steps, []))
    assert set(charts) == {"throughput"}
    assert charts["throughput"].title == "Throughput"
    assert "tokens per second" in texts(inline(charts["throughput"]))


def test_one_wild_step_does_not_flatten_the_loss() -> None:
    losses = {n: 1e9 if n == 700 else 2 + 5 * math.exp(-n / 4000) for n in range(1, 20_001)}
    steps = [step._replace(loss=losses[step.global_step]) for step in steps_of(1, 1, 20_000)]
    data = RunData([attempt_of(1, Cause.finished, NOW + 9, 1, 20_000)], steps, [])
    drawn = inline(charts_of_run(data)["loss"])
    assert {"2", "4", "6"} <= set(texts(drawn))
    (height,) = [float(svg.get("viewBox", "").split()[3]) for svg in svgs(drawn)]
    ys = [float(y) for y in re.findall(r"[ML][\d.]+ (-?[\d.]+)", re.sub("<defs>.*?</defs>", "", drawn))]
    assert 0 <= min(ys) <= max(ys) <= height, "what goes beyond an axis ends at it"


def test_the_files_of_a_run(tmp_path: Path) -> None:
    paths = write_pngs("a run", charts_of_run(two_attempts()), tmp_path, "source=stub")
    assert [path.name for path in paths] == ["loss.png", "throughput.png", "reward.png", "gpu.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_the_line_of_a_gpu_keeps_its_dips() -> None:
    series = gpu(0, 300.0)
    for second in range(1000, 1300):
        series.add(2, Point(NOW + second, 0.0 if second == 1100 else 95.0, 300.0, 40.0))
    (first, second_part) = gpu_range([series], "utilization_percent", 1500)
    assert min(first[2]) == 95.0
    assert min(second_part[2]) == 0.0


# Hours


def test_numbers_stand_in_the_chart_as_text() -> None:
    drawn = inline(hours_charts.waste({"a": PARTS, "b": {**PARTS, "useful": 40.0}}, "GPU-hours"), FULL)
    assert {"all runs", "86.7 % of 150.0", "90.0 % of 100.0", "80.0 % of 50.00"} <= set(texts(drawn))
    assert "useful 130.0 (86.7 %)" in drawn
    drawn = inline(
        hours_charts.lost_by_cause({"node_fail": 12.5, "crash": 2.0, "finished": 0.0}, "GPU-hours", 100.0),
        HALF,
    )
    assert {"node fail", "12.50", "crash"} <= set(texts(drawn))
    assert "finished" not in texts(drawn)


def test_few_lost_hours_make_a_short_bar() -> None:
    from matplotlib.figure import Figure

    chart = hours_charts.lost_by_cause({"finished": 0.0005}, "node-hours", 0.2)
    assert chart is not None
    axes = Figure().subplots()
    chart.draw(axes, HALF)
    assert axes.dataLim.xmax < 0.05 * axes.get_xlim()[1]


def test_of_many_runs_the_largest_are_drawn_and_the_others_summed() -> None:
    runs = {f"small-{i}": {"useful": 1.0} for i in range(40)} | {
        "big-and-old": {"useful": 500.0, "lost": 500.0}
    }
    assert {"big-and-old", "17 others", "100.0 % of 17.00"} <= set(
        texts(inline(hours_charts.waste(runs, "GPU-hours")))
    )
    rows = [*(planned(f"run-{i}", 1.0) for i in range(40)), planned("big-and-old", 1000.0)]
    drawn = texts(inline(hours_charts.planned_against_used(rows, "GPU-hours")))
    assert "big-and-old" in drawn
    assert any("the 24 largest of 41 runs" in words for words in drawn)


@pytest.mark.parametrize(("days", "per"), [(30, "day"), (200, "week"), (1200, "30 days")])
def test_columns_of_days_say_how_long_they_are(days: int, per: str) -> None:
    held = {time.strftime("%Y-%m-%d", time.localtime(NOW - n * 86400)): PARTS for n in range(days)}
    chart = hours_charts.by_day(held, "GPU-hours")
    assert chart is not None
    assert f"GPU-hours per {per}" in texts(inline(chart, FULL))
    assert f"useful {days * 90:,} (90.0 %)" in inline(chart)


def test_the_error_of_the_estimates() -> None:
    rows = [planned("inside", 120.0), planned("outside", 300.0)]
    assert "1 of 2 lie between P10 and P90" in hours_charts.error_words(rows)


def test_where_there_is_nothing_there_is_no_chart() -> None:
    nothing = [hours_charts.waste({}, "h"), hours_charts.by_day({}, "h"), hours_charts.campaign([])]
    nothing += [hours_charts.planned_against_used([], "h"), hours_charts.lost_by_cause({}, "h", 0.0)]
    assert nothing == [None] * 5
    assert inline(None) == ""


# The drawing


def test_every_colour_is_a_variable_that_knows_the_dark() -> None:
    drawn = inline(hours_charts.waste({"a": PARTS}, "h"), HALF)
    drawn += "".join(map(inline, charts_of_run(two_attempts()).values()))
    assert re.findall(r"#[0-9a-fA-F]{3,8}\b(?!\")", drawn) == [], "a colour that is not in the palette"
    light, dark = style.as_css().split("@media")
    assert "prefers-color-scheme:dark" in dark
    for name in set(re.findall(r"var\((--[\w-]+)\)", drawn)):
        assert f"{name}:" in light
        assert f"{name}:" in dark


def test_the_same_chart_is_the_same_picture(tmp_path: Path) -> None:
    def draw() -> tuple[str, bytes]:
        charts = charts_of_run(two_attempts())
        save_png([charts["loss"]], "loss", tmp_path / "loss.png")
        return inline(charts["loss"], FULL), (tmp_path / "loss.png").read_bytes()

    assert draw() == draw()


def test_points_are_drawn_in_a_picture_too(tmp_path: Path) -> None:
    from matplotlib.image import imread

    def picture(num: int) -> Any:
        def draw(axes: Axes, _: int) -> None:
            axes.set(xlim=(0, 1), ylim=(0, 1))
            for _ in range(num):
                dot(axes, 0.5, 0.5, "useful", "half")

        save_png([Chart("a", "A", "A", draw)], "", tmp_path / "a.png")
        return imread(tmp_path / "a.png")

    assert (picture(1) != picture(0)).any(axis=2).sum() > 60, "it is 8 points wide"


def test_names_stay_text(tmp_path: Path) -> None:
    chart = hours_charts.planned_against_used([planned(HOSTILE, 120.0)], "GPU-hours")
    assert chart is not None
    for width in (NARROW, FULL):
        drawn = inline(chart, width)
        assert "<img" not in drawn
        assert len(svgs(drawn)) == (1 if width == NARROW else 2)
    save_png([chart], HOSTILE, tmp_path / "hostile.png")

    def named(axes: Axes, width: int) -> None:
        note(axes, 0.5, 0.5, HOSTILE)

    words = texts(inline(Chart("x", "x", HOSTILE, named)))
    assert HOSTILE in words, "neither HTML nor a formula"


def test_labels_of_numbers_and_times() -> None:
    assert (short(0.25), short(12000), short(0), short(-1e-15), short(3e-4)) == (
        "0.25",
        "12,000",
        "0",
        "0",
        "3e-04",
    )

    def half_a_day(axes: Axes, width: int) -> None:
        time_axis(axes, NOW - 18 * 3600, NOW - 5 * 3600, width)

    found = texts(inline(Chart("x", "x", "x", half_a_day)))
    assert "8 Oct" in found, "midnight is the day"
    assert "21:00" in found or "20:00" in found, "local time"


def test_matplotlib_is_imported_when_something_is_drawn() -> None:
    code = (
        "import sys, r1hpc.report, r1hpc.status, r1hpc.reporting.page\n"
        "assert not {'matplotlib', 'numpy', 'dateutil'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
