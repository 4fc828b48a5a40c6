"""The table of a sweep: which number is compared, which way it is better, and what is said beside it."""

import json
from pathlib import Path

import pytest

from r1hpc import sweep as sweep_command
from r1hpc.base.errors import UsageError
from r1hpc.sweeps.definition import SweepDir
from r1hpc.sweeps.table import read_table
from r1hpc.telemetry.records.metrics import MetricWriter
from r1hpc.telemetry.records.rungs import Halving
from tests.sweeps.test_sweep import write_point, write_sweep


def write_logged(sweep: SweepDir, name: str, values: dict[int, float], by: str = "val") -> None:
    """A finished point of two steps whose script logged these values."""
    run = write_point(sweep, name, [1.0, 1.0])
    for step, value in values.items():
        MetricWriter(run, 1).logged(step, {by: value})


@pytest.fixture
def sweep(tmp_path: Path) -> SweepDir:
    swept = write_sweep(tmp_path, "train.lr=1,2,3")
    for lr, value in (("1", 0.5), ("2", 0.1), ("3", 0.9)):
        write_logged(swept, f"lr_{lr}", {1: 7.0, 2: value})
    return swept


@pytest.mark.parametrize(("flag", "order"), [("--lower", ["2", "1", "3"]), ("--higher", ["3", "1", "2"])])
def test_the_best_is_first_by_a_number_that_only_the_script_logged(
    sweep: SweepDir, flag: str, order: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    sweep_command.main([str(sweep.path), "--by", "val", flag, "--json"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["settings"]["train.lr"] for row in rows] == order
    with pytest.raises(UsageError, match="is val better if lower or higher"):
        sweep_command.main([str(sweep.path), "--by", "val"])


def test_both_flags_are_refused(sweep: SweepDir, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sweep_command.main([str(sweep.path), "--by", "val", "--lower", "--higher"])
    assert "not allowed with" in capsys.readouterr().err


def test_a_name_that_nobody_recorded_names_the_nearest(sweep: SweepDir) -> None:
    with pytest.raises(UsageError, match="no point has recorded vall; nearest: val, "):
        read_table(sweep, "vall", lower=True)


def test_a_number_of_points_that_still_run_is_known(tmp_path: Path) -> None:
    swept = write_sweep(tmp_path, "train.seed=0..1")
    run = write_point(swept, "seed_0", [1.0], finished=False)
    MetricWriter(run, 1).logged(1, {"val": 1.0})
    (row,) = read_table(swept, "val", lower=True).rows
    assert row.shown == "-"


def test_an_evaluation_before_the_last_step_is_named(tmp_path: Path) -> None:
    swept = write_sweep(tmp_path, "train.seed=0..1")
    write_logged(swept, "seed_0", {1: 3.0}, "eval_loss")
    write_logged(swept, "seed_1", {2: 4.0}, "eval_loss")
    assert (
        "note: the newest eval_loss is from step 1 of 2, step 2 of 2" in read_table(swept, "eval_loss").text()
    )


def test_without_a_direction_nothing_is_the_best(tmp_path: Path) -> None:
    swept = write_sweep(tmp_path, "train.lr=3,1,2")
    for lr in "312":
        run = write_point(swept, f"lr_{lr}", [])
        MetricWriter(run, 1).logged(1, {"val": float(lr)})
    table = read_table(swept)
    assert [row.settings["train.lr"] for row in table.rows] == ["3", "1", "2"]
    assert "nothing tells which way val is better: add --lower or --higher" in table.text()
    assert [row.settings["train.lr"] for row in read_table(swept, lower=False).rows] == ["3", "2", "1"]


def test_the_number_of_the_rungs_is_compared(tmp_path: Path) -> None:
    rungs = Halving(steps=[9], keep=0.5, by="val", lower=False, groups=[])
    swept = write_sweep(tmp_path, "train.lr=1,2", rungs=rungs)
    for lr, value in (("1", 0.5), ("2", 0.9)):
        write_logged(swept, f"lr_{lr}", {2: value})
    table = read_table(swept)
    assert (table.by, table.rows[0].settings["train.lr"]) == ("val", "2")


@pytest.mark.parametrize("lower", [True, False])
def test_what_diverged_is_last(tmp_path: Path, lower: bool) -> None:
    swept = write_sweep(tmp_path, "train.lr=1,2,3")
    for lr, value in (("1", "inf"), ("2", "nan"), ("3", "1.0")):
        write_logged(swept, f"lr_{lr}", {2: float(value)})
    table = read_table(swept, "val", lower)
    assert table.rows[0].settings["train.lr"] == "3"
    assert json.loads(json.dumps(table.to_json(), allow_nan=False))["rows"][1]["mean"] is None
    table.draw(tmp_path / "chart.png")


def test_equal_numbers_of_all_seeds_have_no_interval(tmp_path: Path) -> None:
    swept = write_sweep(tmp_path, "train.seed=0..2")
    for seed in range(3):
        write_logged(swept, f"seed_{seed}", {2: 0.188}, "accuracy")
    (row,) = read_table(swept, "accuracy").rows
    assert (row.shown, row.half_width) == ("0.188", None)
