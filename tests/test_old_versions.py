"""Runs and datasets of earlier versions are read by every command.

tests/old_runs: `submit rl_smoke train.num_steps=4`, then `--resume train.num_steps=6`, with 0.1.0 and with
edc0a14, before the code moved to two floors. Weights, code and rollouts are left out.
tests/old_data: the dataset that 0.1.0 built from tiny.yaml.
"""

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from r1hpc import (
    budget,
    calibrate,
    cancel,
    compare,
    diagnose,
    export_metrics,
    logs,
    report,
    shard,
    status,
    watch,
)
from r1hpc.base.run_dir import RunDir
from r1hpc.checkpoint.store import CheckpointStore
from r1hpc.config import load
from r1hpc.data.read.reader import open_dataset
from tests.commands.commands import as_json, as_text

_HERE = Path(__file__).resolve().parent
_RUNS = ("0.1.0", "edc0a14")
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run root with the runs, where there is no Slurm."""
    shutil.copytree(_HERE / "old_runs", tmp_path / "runs")
    monkeypatch.setenv("R1HPC_RUN_ROOT", str(tmp_path / "runs"))
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path / "runs"


@pytest.mark.parametrize("run", _RUNS)
def test_its_state_attempts_and_hours(run: str, capsys: Capture) -> None:
    found = as_json(status, [run], capsys)
    assert (found["state"], found["global_step"]) == ("finished", 6)
    assert [attempt["cause"] for attempt in found["attempts"]] == ["finished", "finished"]
    reported = as_json(report, [run], capsys)
    assert reported["gpu_hours"]["node_hours"] == pytest.approx(0.0185, abs=0.0005)
    assert report.main([run]) == 0
    assert "Steps  6 useful, 0 lost" in capsys.readouterr().out
    assert "2 steps" in as_text(diagnose, [run], capsys)


@pytest.mark.parametrize("run", _RUNS)
def test_its_metrics_logs_and_evaluations(run: str, root: Path, capsys: Capture) -> None:
    assert "gradient norm     2.08" in as_text(watch, [run, "--once"], capsys)
    assert logs.main([run]) == 0
    assert "finished after step 6" in capsys.readouterr().out
    assert "16 questions in both" in as_text(compare, [f"{run}@0", f"{run}@6"], capsys)
    assert export_metrics.main([run, "--to", "prometheus"]) == 0
    assert "r1hpc" in (root / run / "metrics" / "r1hpc.prom").read_text()


@pytest.mark.parametrize("run", _RUNS)
def test_its_settings_and_checkpoints(run: str, root: Path) -> None:
    folder = RunDir(root / run)
    assert load.read(folder.config).train.num_steps == 6
    assert [each.step for each in CheckpointStore(folder.checkpoints).list()] == [6, 4]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (status, ["--all"]),
        (budget, []),
        (calibrate, []),
        (report, []),
        (compare, list(_RUNS)),
        (cancel, ["0.1.0"]),
    ],
)
def test_runs_of_several_versions_together(command: ModuleType, words: list[str], capsys: Capture) -> None:
    assert command.main(words) == 0
    assert capsys.readouterr().out


def test_a_page_of_all_of_them(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page = tmp_path / "report.html"
    assert report.main(["--format", "html", "--out", str(page)]) == 0
    assert all(run in page.read_text() for run in _RUNS)


def test_a_dataset_is_read_and_would_be_built_alike(tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("zarr")
    shutil.copytree(_HERE / "old_data", tmp_path / "data")
    old, new = str(tmp_path / "data" / "0.1.0"), str(tmp_path / "new")

    def answer(*words: str) -> dict[str, Any]:
        assert shard.main([*words, "--json"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    assert answer("verify", old)["ok"]
    assert "Document 7:" in answer("inspect", old, "--doc", "7")["document"]["text"]
    assert answer("trace", old, "--seq-len", "16", "--seed", "0", "--sample", "3")["documents"]
    assert answer("status", old)
    assert answer("audit", old)
    answer("build", str(tmp_path / "data" / "tiny.yaml"), "--out", new)
    read = [open_dataset(path) for path in (old, new)]
    tokens = [list(dataset.read(0, dataset.num_tokens)) for dataset in read]
    assert tokens[0] == tokens[1]
