"""The page: self-contained, escaped, and drawn by a real browser as wide as a desk and as a telephone."""

import html as entities
import json
import os
import re
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from r1hpc import report
from r1hpc.accounting.hours import Selection
from r1hpc.accounting.ledger import clip
from r1hpc.accounting.open_ledger import survey
from r1hpc.base.errors import UsageError
from r1hpc.base.files import append_record, write_json
from r1hpc.base.run_dir import RunDir
from r1hpc.base.units import format_hours
from r1hpc.reporting.page import publish
from r1hpc.reporting.view import make_view
from r1hpc.telemetry.gpu import history
from r1hpc.telemetry.records.metrics import MetricWriter
from tests.accounting.history import DAY, GroupRun, make_history
from tests.commands.test_samples import add_sample
from tests.recorded import RecordedRun

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--virtual-time-budget=4000",
)
HOSTILE = '<img src=x onerror="alert(1)">'
GROUP_CHARTS = (
    "What is left of the budget over time",
    "campaign: ",
    "planned against used: ",
    "where the hours went: ",
    "GPU-hours of each day",
    "lost and idle hours by cause: ",
)
RUN_CHARTS = (
    "loss over the optimizer steps",
    "mean reward over the optimizer steps",
    "% of dense bf16 peak over time",
    "% of time with a kernel running, 4 GPUs: median and range",
    "watts a GPU, 4 GPUs: median and range",
)
_MEASURE = """
<script>addEventListener("load", () => {
  const box = e => e.getBoundingClientRect(), all = q => [...document.querySelectorAll(q)];
  const shown = all("svg").filter(s => box(s).width > 0).map(s => ({label: s.getAttribute("aria-label"),
    width: box(s).width, height: box(s).height, drawn: [...s.querySelectorAll("path")].filter(
      e => box(e).width + box(e).height > 0 && !/--grid/.test(e.getAttribute("style"))).length}));
  const texts = all("text,td,th,p,li,.v,.d,.k").filter(e => box(e).width > 0);
  const size = e => parseFloat(getComputedStyle(e).fontSize) * (e.closest("svg") ?
    box(e.closest("svg")).width / e.closest("svg").viewBox.baseVal.width : 1);
  const outside = texts.filter(e => !e.closest(".scroll") &&
    (box(e).left < -1 || box(e).right > innerWidth + 1)).map(e => e.textContent);
  parent.postMessage({shown, outside, overflow: document.documentElement.scrollWidth - innerWidth,
    smallest: Math.min(...texts.map(size))}, "*");
})</script>
"""


@pytest.fixture(autouse=True)
def _no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("R1HPC_BUDGET", raising=False)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A group's run root with a budget and a campaign."""
    now = time.time()
    made = make_history(tmp_path / "runs", now)
    days = [time.strftime("%Y-%m-%d", time.localtime(now + n * DAY)) for n in (-60, 32)]
    text = f"gpu_hours: 16000\nstart: {days[0]}\nend: {days[1]}\ncampaign: hundred_days\n"
    (made / "budget.yaml").write_text(text)
    return made


def page_of(root: Path, runs: list[RunDir] | None = None, **how: Any) -> str:
    return publish(runs, root, None, time.time(), **how).read_text()


def labels(page: str) -> list[str]:
    return [entities.unescape(label) for label in re.findall(r'aria-label="([^"]*)"', page)]


# What it holds


def test_every_chart_of_the_group_is_there(root: Path) -> None:
    now = time.time()  # a run goes on
    page = publish(None, root, None, now).read_text()
    found = labels(page)
    wanted = (*GROUP_CHARTS, *RUN_CHARTS)
    assert [name for name in wanted if not any(label.startswith(name) for label in found)] == []
    spent = sum(run.used for run in survey(root, now)[0])
    assert f'<div class="v">{format_hours(spent)}</div>' in page
    assert "6 of 6 lie between P10 and P90" in page
    assert "the mark at 50 % is passed" in page


def test_the_newest_runs_get_cards_in_the_order_of_their_chain(tmp_path: Path) -> None:
    runs = []
    for number in range(9):
        made = RecordedRun(tmp_path / "runs" / f"stage{number}")
        made.clock += 3600 * number
        made.submit("local-1")
        made.attempt(1, 5, "finished", committed=5)
        runs.append(made.run)
    page = page_of(tmp_path / "runs", runs)
    assert "Runs: the newest 8 of 9" in page
    assert re.findall(r'id="run-(stage\d)"', page) == [f"stage{number}" for number in range(1, 9)]


def test_it_needs_nothing_from_outside(root: Path) -> None:
    page = page_of(root)
    for word in ("http:", "https:", "//", "src=", "<script", "@import", "url(", "<link rel=stylesheet"):
        assert word not in page.replace("<!doctype html>", ""), word
    assert len(page) < 500_000


def test_readings_of_the_stub_are_called_that(root: Path) -> None:
    page = page_of(root)
    cards = dict(re.findall(r'id="run-([^"]+)">(.*?)</section>', page, re.S))
    assert "source=stub" in cards["grpo-long-context-with-a-rather-long-name"]
    assert "source=stub" not in cards["grpo-pilot"]


def test_a_hostile_name_stays_text(tmp_path: Path) -> None:
    made = GroupRun(tmp_path / "runs" / HOSTILE.replace("/", "|"), time.time() - 3600)
    made.estimate(1, 2, 3)
    made.submit("1")
    made.begin()
    made.work(1, 20, 0.5)
    made.end("finished", 20)
    text = made.run.config.read_text().replace("job_name: null", f"job_name: '{HOSTILE}'")
    made.run.config.write_text(text)
    append_record(made.run.attempts, {"event": "end", "attempt": 1, "cause": "finished", "time": time.time()})
    for page in (page_of(tmp_path / "runs"), page_of(tmp_path / "runs", [made.run])):
        assert "<img" not in page
        assert "&lt;img src=x onerror=&quot;alert(1)&quot;&gt;" in page


def test_a_single_run_comes_first_and_without_the_groups_budget(root: Path) -> None:
    run = RunDir(root / "pretrain-1b")
    path = publish([run], root, None, time.time())
    assert path == run.report / "index.html"
    page = path.read_text()
    assert page.index("The run") < page.index("Planned against used")
    assert "Burn-down" not in page
    assert "redone" in page
    assert "Learning rate" in page, "a page about one run has all of its charts"
    assert "#3 node fail" in page


def test_its_charts_are_of_one_reading(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, paths = history.read_gpu_history, []

    def counted(path: Path) -> history.GpuHistory:
        paths.append(path)
        return whole(path)

    monkeypatch.setattr(history, "read_gpu_history", counted)
    run = next(each for each in map(RunDir, sorted(root.iterdir())) if each.all_gpu_metrics)
    publish([run], root, None, time.time())
    assert paths == run.all_gpu_metrics


def test_slurms_hours_take_the_place_of_the_folders(root: Path) -> None:
    today = time.strftime("%Y-%m-%d")
    hours = {"total": 1234.5, "by_day": {today: 1234.5}, "by_user": {"ada": 1000.0, HOSTILE: 234.5}}
    page = page_of(root, hours=hours)
    assert '<div class="v">1,234</div>' in page or '<div class="v">1,235</div>' in page
    assert "Slurm&#x27;s accounting" in page or "Slurm's accounting" in page
    assert "&lt;img" in page
    assert "<td class=r>81.0 %</td>" in page


def test_the_command_writes_the_page_and_says_where(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--run-root", str(root), "--format", "html"]) == 0
    assert capsys.readouterr().out == f"{root / 'report.html'}\n"
    assert [path.name for path in root.glob("report*")] == ["report.html"]
    out = root / "pages" / "one.html"
    assert report.main(["--run-root", str(root), "eval-math", "--format", "html", "--out", str(out)]) == 0
    assert "<h1>eval-math</h1>" in out.read_text()
    with pytest.raises(UsageError, match="--out FILE goes with --format html"):
        report.main(["--run-root", str(root), "--out", str(out)])


def test_a_window_counts_only_what_was_held_in_it(root: Path) -> None:
    now = time.time()
    runs = survey(root, now)[0]
    middle = now - 43 * DAY  # in the middle of pretrain-1b
    before, after = clip(runs, None, middle), clip(runs, middle, None)
    both = [run for run in before if run.run_id in {other.run_id for other in after}]
    assert [run.run_id for run in both] == ["pretrain-1b"]
    assert sum(run.used for run in [*before, *after]) == pytest.approx(sum(run.used for run in runs))
    page = page_of(root, selection=Selection(start=now - 10 * DAY))
    assert "grpo-long-context" in page
    assert "smoke-first" not in page
    assert "Forecast with running and queued" in page_of(root)
    assert "Forecast with running and queued" not in page  # the hours of a window and all to come make no sum


@pytest.mark.parametrize(
    "how",
    [
        {"selection": Selection(user="nobody")},
        {"selection": Selection(start=time.time() - 10 * DAY)},
        {"hours": {"total": 100.0, "by_day": {"2026-11-01": 100.0}, "by_user": {}}},
    ],
)
def test_a_selection_is_not_taken_for_all_that_is_spent_of_the_budget(
    root: Path, how: dict[str, Any]
) -> None:
    page = page_of(root, **how)
    assert 'class="k">Left<' in page_of(root)
    for words in ('class="k">Left<', "What is left of the budget", "warning mark", "all runs</h1>"):
        assert words not in page
    assert "says nothing of the budget" in page
    assert publish(None, root, None, time.time(), **how) == root / "report.html"


def test_what_a_run_used_after_the_budgets_end_is_not_in_its_curve(root: Path) -> None:
    now = time.time()
    runs = survey(root, now)[0]
    view = make_view(runs, root, now)
    assert view.budget is not None
    short = replace(view, budget=replace(view.budget, end=now - 30 * DAY))
    assert max(x for x, _ in short.curve) <= now - 30 * DAY
    assert short.curve[-1][1] == pytest.approx(sum(run.used for run in clip(runs, None, now - 30 * DAY)))


def test_hours_of_a_quick_save_are_no_power_of_ten(tmp_path: Path) -> None:
    made = RecordedRun(tmp_path / "runs" / "quick")
    made.submit("local-1")
    made.begin()
    made.steps(1, 40)
    made.clock += 0.25
    MetricWriter(made.run, 1).event("save", time=made.clock, global_step=40, seconds=0.25, bytes=1)
    made.end("finished", committed=40)
    page = page_of(tmp_path / "runs")
    assert ", 0.000069 save, " in page
    assert not re.search(r">[^<]*\de-\d\d[^<]*<", page.partition("<svg")[0])


def test_a_run_without_gpus_is_told_in_node_hours(tmp_path: Path) -> None:
    made = RecordedRun(tmp_path / "runs" / "cpu", gpus=0, nodes=2)
    made.submit("local-1")
    estimate = {"gpu_hours": None, "node_hours": {"p10": 0.01, "p50": 0.02, "p90": 0.04}}
    write_json(made.run.path / "estimate.json", estimate)
    made.attempt(1, 40, "finished", committed=40)
    page = page_of(tmp_path / "runs")
    assert "<h2>Node-hours</h2>" in page
    assert "planned against used: cpu: 0.029 of 0.020" in " ".join(labels(page))
    assert "where the hours went: cpu: " in " ".join(labels(page))


def test_node_hours_are_not_taken_off_a_budget_of_gpu_hours(tmp_path: Path) -> None:
    made = RecordedRun(tmp_path / "runs" / "cpu", gpus=0, nodes=2)
    made.submit("local-1")
    made.attempt(1, 40, "finished", committed=40)
    (tmp_path / "runs" / "budget.yaml").write_text("gpu_hours: 100\n")
    view = make_view(survey(tmp_path / "runs", time.time())[0], tmp_path / "runs", time.time())
    assert (view.unit, view.spent) == ("GPU-hours", 0)


def test_an_empty_run_root_still_makes_a_page(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    assert "0 runs" in page
    assert "no budget is set" in page


def test_a_run_that_never_began_and_one_without_steps(tmp_path: Path) -> None:
    waiting = GroupRun(tmp_path / "runs" / "waiting", time.time() - 60)
    waiting.submit("12", "slurm")
    started = GroupRun(tmp_path / "runs" / "started", time.time() - 60)
    started.submit("13", "slurm")
    started.begin()
    page = page_of(tmp_path / "runs")
    assert "It has taken no step yet." in page
    assert page.count("waiting") >= 1


def test_of_a_stage_in_parts_the_finished_ones_are_counted(tmp_path: Path) -> None:
    made = RecordedRun(tmp_path / "runs" / "asked", num_steps=12, gpus=1, stage="evaluate")
    made.submit("13", "slurm")
    made.begin()
    made.parts(0, 6)
    page = page_of(tmp_path / "runs")
    assert "part 7 of 12" in page
    assert "no step" not in page


# In a browser


def in_browser(page: Path, width: int, tmp_path: Path) -> tuple[dict[str, Any], str]:
    """What the page measures of itself in a frame of this width, and what the browser had to say."""
    copy = tmp_path / f"measured-{width}.html"
    copy.write_text(page.read_text().replace("</body>", _MEASURE + "</body>"))
    frame = tmp_path / f"frame-{width}.html"
    frame.write_text(
        f'<body><iframe src="{copy.as_uri()}" style="width:{width}px;height:812px;border:0"></iframe>'
        "<pre></pre>"
        "<script>onmessage = e => document.querySelector('pre').textContent = JSON.stringify(e.data)</script>"
    )
    profile = tmp_path / f"profile-{width}"
    assert CHROMIUM is not None
    done = subprocess.run(
        [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "--dump-dom", frame.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={**os.environ, "PATH": os.defpath},
    )
    found = re.search(r"<pre>(.*?)</pre>", done.stdout, re.S)
    assert found is not None
    assert found[1], f"the page never finished:\n{done.stderr[-2000:]}"
    measured: dict[str, Any] = json.loads(entities.unescape(found[1]))
    return measured, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
@pytest.mark.parametrize("width", [375, 1280])
def test_a_browser_draws_every_chart_and_complains_of_nothing(width: int, root: Path, tmp_path: Path) -> None:
    path = publish(None, root, None, time.time())
    measured, console = in_browser(path, width, tmp_path)
    assert console == ""
    shown = measured["shown"]
    page = path.read_text()
    assert len(shown) == page.count('<svg class="any"') + page.count('<svg class="wide"'), "one of two widths"
    empty = [s["label"] for s in shown if s["width"] < 50 or s["height"] < 10 or s["drawn"] == 0]
    assert empty == []
    assert measured["overflow"] <= 0, "it must not scroll sideways"
    assert measured["outside"] == []
    assert measured["smallest"] >= 11


def test_the_page_of_an_rl_run_opens_with_results_and_shows_reward_before_loss(tmp_path: Path) -> None:
    made = RecordedRun(tmp_path / "runs" / "grpo", stage="rl")
    made.submit("local-1")
    made.attempt(1, 40, "finished", committed=40, reward=0.5, accuracy=0.25)
    whole = {"value": 0.5, "low": 0.4, "high": 0.6}
    line = {
        "greedy": whole,
        "pass_at": {"1": whole},
        "num_items": 9,
        "num_samples": 1,
        "response_length": 3.0,
    }
    append_record(made.run.rl_evaluations, {"global_step": 40, "attempt": 1, "time": 1.0, **line})
    add_sample(made.run, 30, 1, "<b>5</b>")
    path = publish([made.run], tmp_path / "runs", None, time.time())
    page = path.read_text()
    order = (
        "<h1>grpo</h1>",
        "<h3>Results",
        "95 % interval",
        "Reward and accuracy",
        "<figcaption>Loss",
        "Spent",
    )
    places = [page.index(words) for words in order]
    assert places == sorted(places)
    assert "By user" not in page
    assert "By stage" not in page
    assert "All runs" not in page
    assert "&lt;b&gt;5&lt;/b&gt;" in page, "a completion is text, never HTML"
    assert "expected 4" in page
