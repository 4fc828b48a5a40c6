"""Sweeps without a job: plans, refusals, tables, rungs."""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from r1hpc import cancel, status
from r1hpc import sweep as sweep_command
from r1hpc.base.errors import ConfigError, UsageError
from r1hpc.base.run_dir import RunDir
from r1hpc.submission.order import Order, Purpose
from r1hpc.submission.plan_run import plan_new_run
from r1hpc.sweeps.definition import Definition, Point, SweepDir, points_of, read_words
from r1hpc.sweeps.plan import choose
from r1hpc.sweeps.submit import Chosen, _lanes, submit_sweep
from r1hpc.sweeps.table import read_table
from r1hpc.telemetry.records.metrics import MetricWriter
from r1hpc.telemetry.records.rungs import Halving, stopped_at
from tests.sweeps.sweeping import call


def dry_run(root: Path, *words: str, job: str = "smoke", halving: Any = None) -> dict[str, Any]:
    grid, fixed = read_words(words)
    order = Order(
        Purpose.dry_run, executor="local", job=job, overrides=tuple(fixed), run_root=root, run_name="s"
    )
    return submit_sweep(order, grid, halving=halving)


def read_points(*words: str) -> list[Point]:
    return points_of(read_words(words)[0])


def write_sweep(root: Path, *words: str, rungs: Halving | None = None) -> SweepDir:
    """The folder of a sweep of jobs/smoke.yaml, without its points."""
    sweep = SweepDir(root / "s")
    sweep.path.mkdir()
    grid, _ = read_words(words)
    sweep.save(
        Definition("smoke", [{"stage": "pretrain", "data": {"recipe": "smoke"}}], [], None, [grid], rungs)
    )
    return sweep


def write_point(sweep: SweepDir, name: str, losses: Sequence[float], finished: bool = True) -> RunDir:
    run = sweep.stage(name)
    run.create()
    run.config.write_text("stage: pretrain\n")
    metrics = MetricWriter(run, 1)
    for step, loss in enumerate(losses, start=1):
        metrics.step(global_step=step, loss=loss, step_time_s=0.5)
    if finished:
        run.finished.write_text("{}")
    return run


def test_ten_thousand_points_are_planned_in_seconds(tmp_path: Path) -> None:
    began = time.process_time()
    shown = dry_run(tmp_path, "train.lr=1e-3,2e-3", "train.num_steps=60,120", "train.seed=0..2499")
    assert time.process_time() - began < 60
    assert len(shown["points"]) == 10_000
    few = dry_run(tmp_path, "train.lr=1e-3", "train.num_steps=60,120", "train.seed=0..1")
    hours = [each["estimate"]["node_hours"]["p50"] for each in (shown, few)]
    assert hours[0] == pytest.approx(2500 * hours[1], rel=0.01)
    assert not list(tmp_path.iterdir())


def test_an_impossible_value_names_its_point(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"point lr_x: train\.lr is 'x'"):
        dry_run(tmp_path, "train.lr=1e-3,x")
    with pytest.raises(UsageError, match="batch"):
        dry_run(tmp_path, "train.micro_batch_size=2,7")
    with pytest.raises(UsageError, match=r"write \{lr\} where its value goes"):
        dry_run(tmp_path, "lr=1,2")


def test_what_differs_from_the_sweep_in_the_folder_is_refused(tmp_path: Path) -> None:
    write_sweep(tmp_path, "train.seed=0..1")
    with pytest.raises(UsageError, match="the job file and the settings of all points must be the same"):
        dry_run(tmp_path, "train.seed=0..1", "train.num_steps=7")
    with pytest.raises(UsageError, match="the varied settings"):
        dry_run(tmp_path, "train.lr=1,2")


@pytest.mark.parametrize("rungs", [1, 9])
def test_rungs_must_fit_the_steps(tmp_path: Path, rungs: int) -> None:
    with pytest.raises(UsageError, match="do not fit 60 steps"):
        dry_run(tmp_path, "train.seed=0..1", halving=Chosen(rungs, 1 / 3, "loss", True))


@pytest.mark.parametrize("share", ["1/0", "1e400", "2", "nan", "x", "1e-999"])
def test_a_share_is_between_0_and_1(share: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sweep_command.main(["smoke", "train.seed=0..1", "--rungs", "5000", "--keep", share])
    assert "give a share between 0 and 1" in capsys.readouterr().err


def test_a_job_waits_for_the_one_that_is_k_before_it() -> None:
    waits = []
    lanes = _lanes(["1", "2", "3"], 2)
    for job in ("4", "5", "6", "7"):
        lane = next(lanes)
        waits.append(list(lane))
        lane[:] = [job]
    assert waits == [["2"], ["1", "3"], ["4"], ["5"]]
    assert next(_lanes(["1"], None)) == []


def test_the_table_has_means_and_intervals_over_seeds(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path, "train.lr=1e-3,1e-2", "train.seed=0..2")
    for seed, loss in enumerate((1.0, 2.0, 3.0)):
        write_point(sweep, f"lr_1e-3-seed_{seed}", [9.0, loss])
    write_point(sweep, "lr_1e-2-seed_0", [9.0, 0.5])
    write_point(sweep, "lr_1e-2-seed_1", [0.1], finished=False)
    best, other = read_table(sweep).rows
    assert (best.settings, list(best.values)) == ({"train.lr": "1e-2"}, [0.5])
    assert other.mean == 2.0
    assert other.half_width == pytest.approx(4.303 / math.sqrt(3))  # Student, two degrees of freedom
    text = read_table(sweep).text()
    assert "1e-3      3 of 3    2 ± 2.5" in text
    assert "1e-2      1 of 3    0.5" in text
    assert "1 not submitted" in text
    read_table(sweep).draw(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match="no point has recorded pass@1; nearest: "):
        read_table(sweep, "pass@1")
    assert read_table(sweep, "step_time_s").rows[0].mean == 0.5
    assert read_table(sweep).by == "loss"


def write_program(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o700)


def test_a_point_that_waits_is_known_through_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    point = write_point(write_sweep(tmp_path / "real", "train.seed=0..1"), "seed_0", [1.0], finished=False)
    write_program(tmp_path / "bin", "sbatch", "echo slurm 24")
    write_program(tmp_path / "bin", "squeue", f"echo 12 {point.path}")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    steps = choose(SweepDir(tmp_path / "link" / "s"), read_points("train.seed=0..1"), "slurm")
    assert [(step.action, step.job_id) for step in steps] == [("at work", "12"), ("submitted", None)]


def test_a_sweep_that_slurm_refuses_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_program(tmp_path / "bin", "sbatch", '[ "$1" = --version ] || { echo Invalid account >&2; exit 1; }')
    write_program(tmp_path / "bin", "squeue", ":")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    words = ["train.seed=0..1", "resources.gpus_per_node=0"]
    done = call(tmp_path, "smoke", *words, "--executor", "slurm", "--run-name", "s")
    assert "Invalid account" in done.stderr
    assert not (tmp_path / "runs" / "s").exists()


def test_what_is_no_sweep_or_number_is_said(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path, "train.seed=0..1")
    with pytest.raises(UsageError, match="recorded nope; no point has recorded a number yet"):
        read_table(sweep, "nope", lower=True)
    write_point(sweep, "seed_0", [])
    with pytest.raises(UsageError, match="no finished point has a number"):
        read_table(sweep).draw(tmp_path / "a.png")
    with pytest.raises(ConfigError, match="no sweep or job 'nothere'"):
        sweep_command.main(["nothere"])
    with pytest.raises(UsageError, match="--by, --lower and --higher go with --rungs"):
        sweep_command.main(["smoke", "train.seed=0..1", "--by", "nope"])
    with pytest.raises(UsageError, match="s is a sweep: choose another --run-name"):
        plan_new_run(Order(job="smoke", run_root=tmp_path, run_name="s"))
    shown = sweep_command.as_text(dry_run(tmp_path / "new", "train.seed=0..1"))
    assert "points   2: 2 to submit" in shown


def test_status_knows_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_point(write_sweep(tmp_path, "train.seed=0..1"), "seed_0", [1.0])
    assert status.main(["--all", "--run-root", str(tmp_path)]) == 0
    assert capsys.readouterr().out.split()[-9:-1] == ["s", "(sweep)", "unfinished", "-", "1", "2", "-", "-"]
    with pytest.raises(UsageError, match="s is a sweep: see it by"):
        status.main(["--run-root", str(tmp_path)])


def test_with_run_root_its_sweep_is_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        write_sweep(tmp_path / name, "train.seed=0..1")
    monkeypatch.chdir(tmp_path / "here")
    cancel.main(["s", "--run-root", str(tmp_path / "there"), "--json"])
    assert json.loads(capsys.readouterr().out)["sweep_dir"] == str(tmp_path / "there" / "s")


def test_a_point_is_stopped_at_a_rung_if_too_many_are_better(tmp_path: Path) -> None:
    sweep = write_sweep(
        tmp_path, "train.seed=0..5", rungs=Halving(steps=[2], keep=1 / 3, by="loss", lower=True, groups=[])
    )
    losses = (5.0, 4.0, 6.0, 4.5, 3.0, math.nan)
    runs = [write_point(sweep, f"seed_{n}", [1.0, loss, loss], False) for n, loss in enumerate(losses)]
    assert [run.stop.exists() for run in runs] == [False, False, True, True, False, True]
    assert stopped_at(sweep.path) == {"seed_2": 2, "seed_3": 2, "seed_5": 2}
    runs[0].train_metrics.unlink()
    MetricWriter(runs[0], 2).step(global_step=2, loss=99.0)  # a repeated step decides nothing anew
    assert not runs[0].stop.exists()
    assert [each.state for row in read_table(sweep).rows for each in row.results][2] == "stopped at a rung"


def test_accuracy_at_a_rung_is_better_if_higher(tmp_path: Path) -> None:
    sweep = write_sweep(
        tmp_path, "train.seed=0..1", rungs=Halving(steps=[1], keep=0.5, by="reward", lower=False, groups=[])
    )
    runs = [sweep.stage(f"seed_{n}") for n in range(2)]
    for run, reward in zip(runs, (0.2, 0.1), strict=True):
        run.create()
        MetricWriter(run, 1).step(global_step=1, loss=1.0, reward=reward)
    assert [run.stop.exists() for run in runs] == [False, True]
    assert json.loads(sweep.definition.read_text())["rungs"]["by"] == "reward"


@pytest.mark.parametrize("lower", [True, False])
def test_a_rung_compares_what_the_script_logged(tmp_path: Path, lower: bool) -> None:
    rungs = Halving(steps=[1], keep=0.5, by="val", lower=lower, groups=[])
    sweep = write_sweep(tmp_path, "train.lr=1,2,3", rungs=rungs)
    runs = [sweep.stage(f"lr_{lr}") for lr in "123"]
    for run, value in zip(runs, (0.5, 0.1, 0.9), strict=True):
        run.create()
        writer = MetricWriter(run, 1)
        writer.step(global_step=1, loss=1.0)
        writer.logged(1, {"val": value})  # an evaluation follows the step
        assert not run.stop.exists()
        writer.step(global_step=2, loss=1.0)
    assert [run.stop.exists() for run in runs] == [False, not lower, lower]


def test_rungs_by_a_doubtful_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is val better if lower or higher"):
        sweep_command.main(["smoke", "train.seed=0..1", "--rungs", "2", "--by", "val", "--dry-run"])


def test_a_dry_run_lists_points_and_what_rungs_leave(tmp_path: Path) -> None:
    words = ("train.lr=1,2,3,4,5,6,7,8,9", "train.seed=0..1", "train.num_steps=900")
    shown = dry_run(tmp_path, *words, halving=Chosen(3, 1 / 3, "loss", True))
    text = sweep_command.as_text(shown)
    assert "lr_9-seed_1  train.lr=9 train.seed=1  to submit" in text
    assert shown["rungs"]["expected"] == [
        {"step": 100, "settings": 9},
        {"step": 300, "settings": 3},
        {"step": 900, "settings": 2},
    ]
    assert shown["rungs"]["share"] == pytest.approx((9 * 100 + 3 * 200 + 2 * 600) / 8100)
    assert "9 to step 100, 3 to step 300, 2 to step 900" in text


def test_a_long_dry_run_is_cut_and_says_so(tmp_path: Path) -> None:
    assert "and 50 more points: --json lists all" in sweep_command.as_text(
        dry_run(tmp_path, "train.seed=0..249")
    )
