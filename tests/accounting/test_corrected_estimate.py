"""The next estimate, corrected by the finished runs of a run root: short runs, long runs and a submission."""

import json
from pathlib import Path

import pytest

from r1hpc import estimate as estimate_command
from r1hpc.accounting.calibrate import finished_runs
from r1hpc.accounting.correction import correction
from r1hpc.base.files import write_json
from r1hpc.config.load import load
from r1hpc.plan.run import make_plan
from r1hpc.submission.plan_run import estimate_for
from tests.accounting.history import GroupRun
from tests.recorded import RecordedRun

SEVEN_B = "--params 7B --tokens 1T --gpu a100-80gb --num-gpus 256 --json"


def smoke_run(root: Path, number: int, startup_s: float, seconds: float = 75) -> None:
    """On eight A100s, estimated at a sixth of what it took."""
    made = GroupRun(root / f"smoke{number}", 1.79e9 + 1000 * number, gpus=8)
    hours_taken = seconds / 3600
    made.estimate(*(8 * hours_taken / 5.7 * factor for factor in (1 / 1.5, 1, 1.5)))
    made.submit(f"local-{number}")
    made.begin()
    made.gpu_log(made.clock, 1.0)
    made.work(1, 60, hours_taken, startup_h=startup_s / 3600)
    made.end("finished", 60)


@pytest.mark.parametrize("startup_s", [5, 60])
def test_five_smoke_runs_leave_a_large_estimate_alone(
    tmp_path: Path, startup_s: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """7 B on 1 T tokens on 256 A100s."""
    words = [*SEVEN_B.split(), "--run-root", str(tmp_path)]
    assert estimate_command.main(words) == 0
    before = json.loads(capsys.readouterr().out)["gpu_hours"]
    for number in range(5):
        smoke_run(tmp_path, number, startup_s)
    assert len(finished_runs(tmp_path).of("A100-SXM4-80GB")) == 5
    assert estimate_command.main(words) == 0
    after = json.loads(capsys.readouterr().out)["gpu_hours"]
    assert after["p50"] == pytest.approx(before["p50"], rel=0.15)
    assert after["p90"] / after["p10"] >= 0.999 * before["p90"] / before["p10"]


def test_smoke_runs_correct_the_next_smoke_run(tmp_path: Path) -> None:
    for number in range(6):
        smoke_run(tmp_path, number, startup_s=60)
    *before, last = finished_runs(tmp_path).of("A100-SXM4-80GB")
    assert last.is_startup
    assert last.stage == "pretrain"
    found = correction(last, before).corrected
    assert abs(found.p50 / last.hours - 1) < 0.5 * abs(last.estimate.p50 / last.hours - 1)


def test_long_runs_correct_a_large_estimate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What must not happen for smoke runs does for runs of 20,000 GPU-hours, all half as long again."""
    for number in range(5):
        made = GroupRun(tmp_path / f"run{number}", 1.79e9 + 1e6 * number, gpus=64)
        made.estimate(14_000, 20_000, 29_000)
        made.submit(f"local-{number}")
        made.begin()
        made.gpu_log(made.clock, 1.0)
        made.work(1, 200, 1.5 * 20_000 / 64)
        made.end("finished", 200)
    words = [*SEVEN_B.split(), "--run-root", str(tmp_path)]
    assert estimate_command.main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["correction"]["num_runs"] == 5
    assert 1.2 < found["gpu_hours"]["p50"] / found["uncorrected"]["gpu_hours"]["p50"] < 1.5
    wall, hours = found["wall_hours"]["256"]["p50"], found["gpu_hours"]["p50"]
    assert wall == pytest.approx(hours / 256)


def test_a_submission_is_corrected_and_keeps_what_was_estimated(tmp_path: Path) -> None:
    """The same job again: five runs took twice their estimate."""
    config = load("smoke")
    plan = make_plan(config, gpus_per_node=0, vocab_size=512)
    first, _ = estimate_for(tmp_path / "none", config, plan)
    assert first is not None
    assert "correction" not in first
    estimated_s = 3600 * first["node_hours"]["p50"]
    for number in range(5):
        made = RecordedRun(tmp_path / "runs" / f"run{number}")
        made.submit(f"local-{number}")
        made.attempt(1, 10, "finished", committed=10, step_s=(2 * estimated_s - 12) / 10)
        write_json(made.run.path / "estimate.json", first)
    again, _ = estimate_for(tmp_path / "runs", config, plan)
    assert again is not None
    assert again["uncorrected"]["node_hours"] == first["node_hours"]
    assert again["correction"]["num_runs"] == 5
    assert 1.8 < again["node_hours"]["p50"] / first["node_hours"]["p50"] < 2.1
