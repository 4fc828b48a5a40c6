"""A run whose Slurm record and own record differ has one number, whoever is asked and in whatever form."""

import csv
import io
import json
import re
import time
from pathlib import Path

import pytest

from r1hpc import budget, calibrate, report, status
from r1hpc.base.files import write_json
from tests.recorded import EPOCH, RecordedRun

GPUS = 16
SLURM_S = (130, 95)
"""What Slurm charges for the two attempts; the run's own clock says 112 and 82 seconds."""
HOURS, OWN_HOURS = GPUS * sum(SLURM_S) / 3600, GPUS * (112 + 82) / 3600


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RecordedRun:
    """Preempted once, then finished; its node's clock was ahead of Slurm's when the second attempt ended."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("R1HPC_BUDGET", raising=False)
    run = RecordedRun(tmp_path / "runs" / "demo", gpus=GPUS, nodes=2)
    run.submit("77", "slurm")
    run.attempt(1, 50, "preempted", committed=40, step_s=2)
    run.attempt(41, 75, "finished", committed=75, step_s=2)
    plan = {"p10": HOURS / 2, "p50": HOURS, "p90": 2 * HOURS}
    write_json(
        run.run.path / "estimate.json", {"gpu_hours": plan, "assumptions": {"gpu": "a100", "gpu_given": True}}
    )
    return run


@pytest.fixture
def dump(made: RecordedRun, tmp_path: Path) -> Path:
    """sacct's records: the second one ends before the run's own last line."""
    path = tmp_path / "sacct.txt"
    starts = (EPOCH - 30, EPOCH + 102)
    lines = [
        f"77|ada|lab|{state}|{start:.0f}|{seconds}|gres/gpu={GPUS},node=2|2"
        for start, seconds, state in zip(starts, SLURM_S, ("PREEMPTED", "COMPLETED"), strict=True)
    ]
    path.write_text("\n".join(["JobID|User|Account|State|Start|ElapsedRaw|AllocTRES|NNodes", *lines]) + "\n")
    return path


def said(capsys: pytest.CaptureFixture[str], command: object, *argv: str) -> str:
    capsys.readouterr()
    assert command.main(list(argv)) == 0  # type: ignore[attr-defined]
    return capsys.readouterr().out


def one(found: dict[str, float], hours: float) -> bool:
    return list(found.values()) == [pytest.approx(hours)] * len(found)


def page_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    return Path(said(capsys, report, *argv, "--format", "html").strip()).read_text()


def everywhere(capsys: pytest.CaptureFixture[str], made: RecordedRun) -> dict[str, float]:
    """GPU-hours by each command that needs no file of sacct's."""
    root = ["--run-root", str(made.run.path.parent)]
    run = json.loads(said(capsys, report, str(made.run.path), "--json"))
    site = json.loads(said(capsys, calibrate, *root, "--json"))["resources"]["A100-SXM4-80GB"]
    return {
        "report": run["gpu_hours"]["total"],
        "split": run["split"]["allocated"],
        "status": json.loads(said(capsys, status, str(made.run.path), "--json"))["gpu_hours"],
        "status --all": json.loads(said(capsys, status, "--all", *root, "--json"))["runs"][0]["gpu_hours"],
        "budget": json.loads(said(capsys, budget, *root, "--json"))["spent"],
        "calibrate": site["runs"][0]["actual"],
    }


@pytest.mark.parametrize("names_the_run", [True, False])
def test_a_file_of_sacct_counts_everywhere(
    made: RecordedRun, dump: Path, names_the_run: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    root = ["--run-root", str(made.run.path.parent)]
    assert one(everywhere(capsys, made), OWN_HOURS), "nobody has asked Slurm yet"
    which = ["demo"] if names_the_run else []
    asked = [*which, *root, "--sacct-file", str(dump)]
    answer = json.loads(said(capsys, report, *asked, "--json"))
    assert answer["gpu_hours"]["total"] == pytest.approx(HOURS)
    lines = csv.reader(io.StringIO(said(capsys, report, *asked, "--format", "csv")))
    table = {row[0]: row[2] for row in lines}
    assert float(table["total"]) == pytest.approx(HOURS)
    assert re.search(rf"\b{HOURS:.2f}\d*\b", said(capsys, report, *asked))
    others = [root, ["demo", *root]] if names_the_run else []
    for page in [page_of(capsys, *argv) for argv in (asked, *others)]:
        assert f'<div class="k">Spent</div><div class="v">{HOURS:.2f}</div>' in page
        card = page[page.index('id="run-demo"') :]
        assert f"{HOURS:.2f} GPU-hours of" in card
    assert one(everywhere(capsys, made), HOURS)
    assert f"{HOURS:.2f} GPU-hours so far" in said(capsys, status, "demo", *root)


def test_how_the_hours_were_spent_is_one_answer_too(
    made: RecordedRun, dump: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = json.loads(said(capsys, report, str(made.run.path), "--sacct-file", str(dump), "--json"))
    split, (run,) = answer["split"], answer["runs"]
    useful = split["useful"] / split["allocated"]
    assert run["split"]["useful"] == split["useful"]
    assert run["time"]["useful_s"] / run["time"]["wall_s"] == pytest.approx(useful)
    assert sum(each["gpu_hours"] for each in run["attempts"]) == pytest.approx(HOURS)
    page = page_of(capsys, str(made.run.path), "--sacct-file", str(dump))
    assert f'<div class="k">Useful</div><div class="v">{100 * useful:.1f} %</div>' in page
    assert f"{100 * useful:.0f} % useful" in page[page.index('id="run-demo"') :]


def test_what_was_learnt_stays_when_the_run_folder_cannot_be_asked_again(
    made: RecordedRun, dump: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Summaries may be removed, and damaged ones are made again; a damaged allocations.json is forgotten."""
    said(capsys, report, str(made.run.path), "--sacct-file", str(dump))
    (made.run.path / "summary.json").write_text('{"version": 1')
    assert one(everywhere(capsys, made), HOURS)
    (made.run.path / "allocations.json").write_text('{"version": 1, "records": [{"job_id": 7}]}')
    assert one(everywhere(capsys, made), OWN_HOURS)


def test_an_older_file_takes_nothing_back(
    made: RecordedRun, dump: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Taken while the second attempt ran, and of the jobs of another cluster with the same number."""
    said(capsys, report, str(made.run.path), "--sacct-file", str(dump))
    old = tmp_path / "old.txt"
    rows = ["JobID|State|Start|End|ElapsedRaw|AllocTRES"]
    rows += [f"77|RUNNING|{EPOCH + 102:.0f}|Unknown|40|gres/gpu={GPUS}"]
    rows += [f"77|COMPLETED|{EPOCH - 30 * 86400:.0f}|{EPOCH - 29 * 86400:.0f}|86400|gres/gpu={GPUS}"]
    old.write_text("\n".join(rows) + "\n")
    answer = json.loads(said(capsys, report, str(made.run.path), "--sacct-file", str(old), "--json"))
    assert answer["gpu_hours"]["total"] == pytest.approx(HOURS)
    assert one(everywhere(capsys, made), HOURS)


def test_a_run_at_work_counts_on_from_what_slurm_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    live = RecordedRun(tmp_path / "runs" / "live", gpus=GPUS)
    live.clock = time.time() - 1000
    live.submit("78", "slurm")
    live.begin()
    live.steps(1, 50, step_s=2)
    dump = tmp_path / "sacct.txt"
    row = f"78|RUNNING|{time.time() - 1200:.0f}|Unknown|1200|gres/gpu={GPUS}"
    dump.write_text(f"JobID|State|Start|End|ElapsedRaw|AllocTRES\n{row}\n")
    answer = json.loads(said(capsys, report, str(live.run.path), "--sacct-file", str(dump), "--json"))
    assert answer["gpu_hours"]["total"] == pytest.approx(GPUS * 1200 / 3600)
    shown = json.loads(said(capsys, status, str(live.run.path), "--json"))
    assert shown["gpu_hours"] == pytest.approx(answer["gpu_hours"]["total"], abs=GPUS * 30 / 3600)
    assert shown["gpu_hours"] >= answer["gpu_hours"]["total"]
