"""What diagnose says of stages in parts (traces, generate, evaluate), which take no steps."""

from pathlib import Path
from typing import Any

import pytest

from r1hpc.attempt import end
from r1hpc.base.files import write_json
from r1hpc.telemetry.diagnosis.diagnose import Diagnosis, as_lines, diagnose
from r1hpc.telemetry.records.attempts import read_history
from tests.telemetry.scenes import SPINNING, Scene, codes, only, played


@pytest.fixture
def asked(tmp_path: Path) -> Scene:
    """An attempt of an evaluation, which is made in 40 parts."""
    return Scene(tmp_path, stage="evaluate")


def in_words(diagnosis: Diagnosis) -> str:
    return " ".join(" ".join(as_lines(diagnosis)).split())


DECODING = {"gpu_utilization_percent": 99, "power_w": 90.0}
"""A small model, one token after the other: busy, at less than a quarter of the limit."""


def test_an_evaluation_that_finished_is_no_hang(asked: Scene, capfd: pytest.CaptureFixture[str]) -> None:
    asked.made.parts(0, 39, part_s=30.0)
    asked.silence(700)  # it sums up
    asked.gpus(DECODING)
    assert in_words(asked.end("finished")) == (
        "attempt 1: 40 parts made, GPUs 99 % busy, at 90 W, nothing stands out"
    )
    end.print_diagnosis(asked.made.run, 1)
    assert capfd.readouterr().out.startswith("run: diagnosis of attempt 1: 40 parts made, GPUs 99 % busy")


@pytest.mark.parametrize("cause", ["finished", "stopped"])
def test_an_attempt_that_got_through_was_no_hang(tmp_path: Path, cause: str) -> None:
    assert codes(played(Scene(tmp_path), steps={}, silence=300, gpus={}, after=SPINNING, cause=cause)) == []


def test_no_part_is_told_as_such(asked: Scene) -> None:
    asked.silence(16)
    assert in_words(asked.end()) == "attempt 1: no part in 16 s, nothing stands out"


def test_parts_of_another_attempt_are_not_its_own(asked: Scene) -> None:
    asked.made.parts(0, 2)
    asked.end()
    asked.made.clock += 2
    asked.made.begin(resumed_from=3)
    asked.made.parts(3, 3)
    found = asked.end()
    assert (found.figures["num_parts"], found.figures["num_steps"]) == (1, 0)
    assert in_words(found) == "attempt 2: 1 part made, nothing stands out"


@pytest.mark.parametrize(
    ("odd", "code"),
    [
        ({"gpu_utilization_percent": 0}, "idle_gpu"),
        ({"throttle_reasons": ["hw_thermal_slowdown"], "temperature_c": 91}, "throttled"),
    ],
)
def test_a_gpu_is_judged_while_parts_are_made(asked: Scene, odd: dict[str, Any], code: str) -> None:
    asked.made.parts(0, 9, part_s=3.0)
    asked.gpus({}, odd=odd)
    assert codes(asked.end()) == [code]


def test_memory_that_parts_leave_is_told_with_what_takes_more(asked: Scene) -> None:
    asked.made.parts(0, 9, part_s=3.0)
    asked.gpus({"memory_used_bytes": 20 * 2**30})
    found = only(asked.end())
    assert found.code == "memory_headroom"
    assert "rollout.prompts_per_batch" in found.advice
    assert "micro_batch" not in found.advice


def test_a_part_that_does_not_come_is_a_hang_by_the_longest_before(asked: Scene) -> None:
    asked.made.parts(0, 3, part_s=250.0)
    asked.silence(770)
    asked.gpus(DECODING)
    run, attempt = asked.made.run, read_history(asked.made.run).attempts[-1]
    assert codes(diagnose(run, attempt, end=asked.made.clock)) == [], "the first took 260 s"
    asked.silence(30)
    asked.gpus(DECODING)
    found = only(diagnose(run, attempt, end=asked.made.clock))
    assert found.sentence.startswith("no part for 13 min 20 s after the last of 4, while all 4 GPUs read")


def test_before_the_first_part_and_after_the_last_only_the_watchdog_knows_a_hang(asked: Scene) -> None:
    run, attempt = asked.made.run, read_history(asked.made.run).attempts[-1]
    asked.silence(3000)
    asked.gpus(DECODING)
    assert codes(diagnose(run, attempt, end=asked.made.clock)) == []
    write_json(run.plan, {"num_steps": 4})
    asked.made.parts(0, 3)
    asked.silence(10_000)
    asked.gpus(DECODING)
    assert codes(diagnose(run, attempt, end=asked.made.clock)) == [], "rank 0 sums up"
    assert "no part for 2 h 46 min after the last of 4" in only(asked.end("hang")).sentence
