"""Rungs compare settings: the seeds of one are kept or dropped together."""

from pathlib import Path

import pytest

from r1hpc.sweeps.definition import SweepDir, groups_of, points_of, read_words
from r1hpc.sweeps.plan import choose
from r1hpc.sweeps.table import read_table
from r1hpc.telemetry.records.metrics import MetricWriter
from r1hpc.telemetry.records.rungs import Halving
from tests.sweeps.test_sweep import write_sweep

_WORDS = ("train.lr=1,2,3", "train.seed=0..1")


@pytest.fixture
def sweep(tmp_path: Path) -> SweepDir:
    points = points_of(read_words(_WORDS)[0])
    rungs = Halving(steps=[1], keep=0.5, by="loss", lower=True, groups=groups_of(points))
    return write_sweep(tmp_path, *_WORDS, rungs=rungs)


def arrive(sweep: SweepDir, name: str, loss: float | None) -> None:
    """A point takes the first step, where the rung is, and the next one."""
    run = sweep.stage(name)
    run.create()
    run.config.write_text("stage: pretrain\n")
    fields = {} if loss is None else {"loss": loss}
    for step in (1, 2):
        MetricWriter(run, 1).step(global_step=step, **fields)


def stopped(sweep: SweepDir) -> list[str]:
    return sorted(path.parent.name for path in sweep.path.glob("*/STOP"))


def test_the_seeds_of_a_setting_are_judged_by_their_mean(sweep: SweepDir) -> None:
    for name, loss in (("lr_1-seed_0", 2.0), ("lr_2-seed_0", 1.0), ("lr_1-seed_1", 2.0)):
        arrive(sweep, name, loss)
    assert stopped(sweep) == [], "one seed of a setting decides nothing"
    arrive(sweep, "lr_3-seed_0", 9.0)  # bad luck, of the best setting
    arrive(sweep, "lr_2-seed_1", 9.0)
    assert stopped(sweep) == ["lr_2-seed_0", "lr_2-seed_1"], "the lucky seed too"
    arrive(sweep, "lr_3-seed_1", -9.0)
    assert stopped(sweep) == ["lr_2-seed_0", "lr_2-seed_1"]
    states = {each.step.point.name: each.state for row in read_table(sweep).rows for each in row.results}
    assert {name for name, state in states.items() if state == "stopped at a rung"} == set(stopped(sweep))


def test_a_seed_that_is_added_to_a_dropped_setting_is_not_run(sweep: SweepDir) -> None:
    for lr, loss in ((1, 1.0), (2, 2.0)):
        for seed in range(2):
            arrive(sweep, f"lr_{lr}-seed_{seed}", loss)
    more = points_of(read_words(("train.lr=1,2", "train.seed=0..2"))[0])
    actions = {step.point.name: step.action for step in choose(sweep, more, "local")}
    assert actions["lr_1-seed_2"] == "submitted"
    assert actions["lr_2-seed_2"] == "stopped at a rung"


def test_a_finished_seed_is_not_touched(sweep: SweepDir) -> None:
    for seed in range(2):
        arrive(sweep, f"lr_1-seed_{seed}", 1.0)
    arrive(sweep, "lr_2-seed_0", 2.0)
    sweep.stage("lr_2-seed_0").finished.write_text("{}")
    arrive(sweep, "lr_2-seed_1", 2.0)
    assert stopped(sweep) == ["lr_2-seed_1"]


def test_a_setting_without_the_number_goes_on_and_is_named(sweep: SweepDir) -> None:
    for seed in range(2):
        arrive(sweep, f"lr_1-seed_{seed}", 1.0)
        arrive(sweep, f"lr_2-seed_{seed}", None)
    assert stopped(sweep) == []
    assert (
        "2 points reached the rung at step 1 without its number: their settings go on"
        in read_table(sweep).text()
    )


def test_a_file_of_somebody_else_is_left_alone(sweep: SweepDir) -> None:
    (sweep.path / "rungs" / "1").mkdir(parents=True)
    for name in ("notes~", "a~b~c", "x"):
        (sweep.path / "rungs" / "1" / name).touch()
    for lr, loss in ((1, 1.0), (2, 2.0)):
        for seed in range(2):
            arrive(sweep, f"lr_{lr}-seed_{seed}", loss)
    assert stopped(sweep) == ["lr_2-seed_0", "lr_2-seed_1"]
    assert read_table(sweep).notes == []
