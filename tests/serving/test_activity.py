"""When a server answered, as its run's record says it."""

from itertools import pairwise
from pathlib import Path

import pytest

from r1hpc.base.run_dir import RunDir
from r1hpc.serving.life import Activity
from r1hpc.telemetry.records.metrics import MetricWriter, Step, last_steps


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path / "a")
    made.create()
    return made


def begin(run: RunDir, clock: Clock, number: int = 0, requests: int = 0) -> Activity:
    return Activity(MetricWriter(run, 1), number, requests, clock)


def spells(run: RunDir) -> list[tuple[int, float, float]]:
    """(number, begin, end) of what is on record."""

    def of(step: Step) -> tuple[int, float, float]:
        assert step.time is not None
        assert step.step_time_s is not None
        return step.global_step, step.time - step.step_time_s, step.time

    return [of(step) for step in last_steps(run, 99)]


def test_the_first_line_says_when_it_was_ready(run: RunDir, clock: Clock) -> None:
    begin(run, clock)
    assert spells(run) == [(1, 1000, 1000)]


def test_requests_that_follow_each_other_are_one_spell_and_waiting_is_none(run: RunDir, clock: Clock) -> None:
    activity = begin(run, clock, number=4)
    clock.now = 1100
    activity.hear(0, 0)
    activity.hear(1, 0)
    clock.now = 1101
    assert activity.idle_s() == 0
    clock.now = 1103
    activity.hear(0, 1)
    clock.now = 1108
    activity.hear(2, 2)  # both between two looks
    for clock.now in (1109, 1112, 1119):
        activity.hear(0, 0)
    assert spells(run) == [(5, 1000, 1000), (6, 1100, 1108)]
    assert activity.idle_s() == 11
    assert last_steps(run, 1)[0].number("requests") == 3


def test_answers_between_two_looks_took_their_time(run: RunDir, clock: Clock) -> None:
    activity = begin(run, clock)
    clock.now = 1000.25
    activity.hear(100, 100)
    activity.close()
    assert spells(run)[-1] == (2, 1000, 1000.25)


def test_a_long_answer_is_written_in_parts_and_loses_no_second(run: RunDir, clock: Clock) -> None:
    activity = begin(run, clock, requests=7)
    activity.hear(1, 0)
    for clock.now in range(1001, 1151):
        activity.hear(0, 0)
        assert activity.idle_s() == 0
    activity.close()
    found = spells(run)
    assert found[1][1] == 1000
    assert found[-1][2] == 1150
    assert all(a[2] == b[1] for a, b in pairwise(found))
    assert last_steps(run, 1)[0].number("requests") == 7


def test_a_suspension_is_neither_idleness_nor_an_answer(run: RunDir, clock: Clock) -> None:
    activity = begin(run, clock)
    clock.now = 1005
    activity.hear(1, 1)
    clock.now = 3005
    activity.hear(0, 0)
    assert activity.idle_s() == 0
    clock.now = 3010
    activity.hear(1, 0)
    clock.now = 5010
    activity.hear(0, 1)
    activity.close()
    assert spells(run)[1:] == [(2, 1000, 1005), (3, 3005, 3010), (4, 5010, 5010)]
