"""The page of named runs: what is selected of them, where it goes, and in what unit it counts."""

import time
from pathlib import Path

import pytest

from r1hpc import report
from r1hpc.accounting.open_ledger import open_ledger
from r1hpc.base.errors import UsageError
from r1hpc.base.files import write_json
from r1hpc.reporting.page import publish
from r1hpc.reporting.view import make_view
from tests.recorded import EPOCH, RecordedRun


@pytest.fixture
def two(tmp_path: Path) -> tuple[RecordedRun, RecordedRun]:
    """A run, and another of the same name elsewhere."""
    found = []
    for folder in ("runs", "backup"):
        made = RecordedRun(tmp_path / folder / "a", gpus=2)
        made.submit("local-1")
        made.attempt(1, 20, "finished", committed=20, step_s=90)
        found.append(made)
    return found[0], found[1]


def test_a_selection_that_leaves_nothing_of_a_run_overwrites_no_page(
    two: tuple[RecordedRun, RecordedRun],
) -> None:
    root = two[0].run.path.parent
    (root / "report.html").write_text("the page of all runs")
    words = [str(two[0].run.path), "--run-root", str(root), "--format", "html"]
    with pytest.raises(UsageError, match="a: nothing was held in the selection"):
        report.main([*words, "--end", "2001-01-01"])
    assert (root / "report.html").read_text() == "the page of all runs"


def test_runs_of_one_name_count_both(two: tuple[RecordedRun, RecordedRun], tmp_path: Path) -> None:
    ledgers = [open_ledger(made.run, time.time()) for made in two]
    view = make_view(ledgers, tmp_path, time.time(), whole=False)
    assert len(view.parts_by_run) == 2
    assert sum(sum(parts.values()) for parts in view.parts_by_run.values()) == pytest.approx(view.spent)


def test_the_same_run_named_twice_counts_once(
    two: tuple[RecordedRun, RecordedRun], capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(two[0].run.path)
    report.main([path, "--format", "csv"])
    once = capsys.readouterr().out
    report.main([path, f"{path}/", "--format", "csv"])
    assert capsys.readouterr().out == once


def test_gpu_hours_to_come_are_not_node_hours(tmp_path: Path) -> None:
    """A run on GPUs that waits, beside one on CPUs that is over."""
    waits = RecordedRun(tmp_path / "waits", gpus=8)
    waits.submit("4711", "slurm")
    write_json(waits.run.estimate, {"gpu_hours": {"p10": 500.0, "p50": 1000.0, "p90": 2000.0}})
    over = RecordedRun(tmp_path / "over")
    over.submit("local-1")
    over.attempt(1, 40, "finished", committed=40, step_s=90)
    ledgers = [open_ledger(made.run, EPOCH + 1e5) for made in (waits, over)]
    view = make_view(ledgers, tmp_path, EPOCH + 1e5, whole=False)
    assert (view.unit, view.spent, view.planned.p50) == ("GPU-hours", 0.0, 1000.0)


@pytest.mark.parametrize("out", [".", "folder"])
def test_a_folder_is_no_page(two: tuple[RecordedRun, RecordedRun], out: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    where = out if out == "." else str(tmp_path / out)
    with pytest.raises(UsageError, match=r"is a folder: name a file, .*report\.html"):
        report.main([str(two[0].run.path), "--format", "html", "--out", where])


def test_a_day_without_hyphens_is_no_time(two: tuple[RecordedRun, RecordedRun]) -> None:
    with pytest.raises(UsageError, match="20260501 would be seconds since 1970: write it as 2026-05-01"):
        report.main([str(two[0].run.path), "--start", "20260501"])


def test_two_runs_without_steps_are_not_the_same(tmp_path: Path) -> None:
    paths = [str(RecordedRun(tmp_path / name).run.path) for name in ("a", "b")]
    with pytest.raises(UsageError, match=r"a and b report no steps: .*attempt"):
        report.main(["--compare", *paths])


def test_a_run_that_cannot_be_drawn_costs_the_others_no_page(
    two: tuple[RecordedRun, RecordedRun], tmp_path: Path
) -> None:
    (two[0].run.metrics / "gpu-n1.jsonl").mkdir(parents=True)
    page = publish([made.run for made in two], tmp_path, tmp_path / "both.html", time.time())
    text = page.read_text()
    assert "It cannot be drawn: " in text
    assert "loss over the optimizer steps" in text, "the other one is"


def test_pages_of_different_runs_are_different_files(
    two: tuple[RecordedRun, RecordedRun], capsys: pytest.CaptureFixture[str]
) -> None:
    root = two[0].run.path.parent
    for name in ("b", "c", "chain/sft", "chain/grpo"):
        made = RecordedRun(root / name)
        made.submit("local-1")
        made.attempt(1, 20, "finished", committed=20)
    (root / "chain" / "chain.yaml").write_text("{}")
    pages = []
    chain = [str(root / "chain" / name) for name in ("sft", "grpo")]
    for words in ([], ["a"], ["a", "b"], ["b", "c"], chain):
        named = [str(root / word) for word in words]
        assert report.main([*named, "--run-root", str(root), "--format", "html"]) == 0
        pages.append(capsys.readouterr().out.strip())
    assert len(set(pages)) == 5
    assert pages[-1] == str(root / "chain" / "report" / "index.html")
