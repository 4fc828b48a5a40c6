"""The curve that trackers show, over attempts that lose steps."""

from pathlib import Path

from r1hpc.telemetry.records.metrics import MetricWriter, Step
from r1hpc.telemetry.trackers.feeder import Curve
from tests.recorded import RecordedRun


def numbers(steps: list[Step]) -> list[tuple[int, int]]:
    """(global_step, attempt) of each."""
    return [(step.global_step, step.attempt) for step in steps]


def test_steps_taken_again_are_given_out_once_as_they_lasted(tmp_path: Path) -> None:
    made = RecordedRun(tmp_path / "demo")
    made.submit("local-1")
    made.attempt(1, 25, "node_fail", committed=15)
    curve = Curve(made.run, attempt=2)
    assert curve.newer() == [], "which of the 25 last is not known before attempt 2 has taken a step"
    made.begin(resumed_from=15)
    made.steps(16, 17)
    assert numbers(curve.newer()) == [(n, 1 if n <= 15 else 2) for n in range(1, 18)]
    made.steps(18, 20)
    assert numbers(curve.newer()) == [(18, 2), (19, 2), (20, 2)]
    assert curve.newer() == []


def test_the_first_attempt_is_given_out_as_it_goes(tmp_path: Path) -> None:
    made = RecordedRun(tmp_path / "demo")
    curve = Curve(made.run, attempt=1)
    assert curve.newer() == []
    made.begin()
    made.steps(1, 2)
    assert numbers(curve.newer()) == [(1, 1), (2, 1)]


def test_ghosts_and_newer_attempts_are_others_to_show(tmp_path: Path) -> None:
    made = RecordedRun(tmp_path / "demo")
    made.attempt(1, 10, "node_fail", committed=5)
    made.begin(resumed_from=5)
    made.steps(6, 7)
    curve = Curve(made.run, attempt=2)
    assert len(curve.newer()) == 7
    MetricWriter(made.run, 1).step(global_step=11, loss=1.0)
    MetricWriter(made.run, 3).step(global_step=8, loss=1.0)
    made.steps(8, 8)
    assert numbers(curve.newer()) == [(8, 2)]


def test_an_attempt_that_finishes_the_run_without_a_step_gives_out_what_lasted(tmp_path: Path) -> None:
    made = RecordedRun(tmp_path / "demo")
    made.attempt(1, 10, "preempted", committed=10)
    curve = Curve(made.run, attempt=2)
    made.begin(resumed_from=10)
    assert curve.rest() == [], "which of them last is not known yet"
    made.end("finished", committed=10)
    assert numbers(curve.rest()) == [(n, 1) for n in range(1, 11)]
    assert curve.rest() == []
