"""Each rule fires on an attempt made for it, and keeps quiet on one that is nearly so."""

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from r1hpc.attempt import end
from r1hpc.telemetry.diagnosis.diagnose import QUICK_BYTES, as_lines, diagnose
from r1hpc.telemetry.diagnosis.rules import Severity
from r1hpc.telemetry.records.attempts import read_history
from r1hpc.telemetry.records.metrics import MetricWriter
from r1hpc.telemetry.records.ranks import RankTimeWriter, read_rank_times
from tests.recorded import bytes_read
from tests.telemetry.scenes import MOVING, SPINNING, Scene, codes, only, played


def test_a_silent_script_that_the_watchdog_ended_is_told_to_print(tmp_path: Path) -> None:
    scene = Scene(tmp_path, stage="script")
    scene.silence(20)
    (finding,) = [each for each in scene.end("hang").findings if each.code == "hang"]
    assert "rank 0 printed nothing for train.hang_timeout_s" in finding.advice


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def test_a_healthy_attempt_gets_one_line_of_figures(scene: Scene) -> None:
    scene.steps()
    scene.gpus({})
    scene.ranks([[0.8, 0.81, 0.79, 0.82]] * 5)
    found = scene.end()
    assert " ".join("".join(as_lines(found)).split()) == (
        "attempt 1: 30 steps, 1 s each (median), 1% of it waiting for data, MFU 40.0%, GPUs 97 % busy, "
        "at 360 W, nothing stands out"
    )


FOUND: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "busy GPUs at the power of idle ones": (
        {"steps": {}, "silence": 300, "gpus": {}, "after": SPINNING, "cause": "timeout"},
        "error: hang",
        ["no step for 5 min 00 s after step 30", "all 4 GPUs read 100 % busy at 70 W of 400 W"],
    ),
    "a GPU that does not wait with the others": (
        {
            "steps": {},
            "silence": 300,
            "gpus": {},
            "after": SPINNING,
            "odd": {"power_w": 330.0},
            "cause": "hang",
        },
        "error: hang",
        ["3 of 4 GPUs", "Look first at n2 GPU 1"],
    ),
    "a start without end": (
        {"silence": 700, "gpus": SPINNING, "cause": "timeout"},
        "error: hang",
        ["since the attempt began"],
    ),
    "a hang that the watchdog ended, without readings": (
        {"steps": {}, "silence": 30, "cause": "hang", "detail": "rank 1: 30 s in step 31"},
        "error: hang",
        ["no step for 30 s after step 30"],
    ),
    "waiting for data": (
        {"steps": {"data_time_s": 0.4}, "gpus": {"gpu_utilization_percent": 58}},
        "warning: input_bound",
        ["40% of each step is spent waiting for data, and the GPUs are busy only 58 %"],
    ),
    "moving data": (
        {"steps": {"mfu": 0.08}, "gpus": MOVING},
        "warning: communication_bound",
        ["99 % busy, but at 48% of their power limit and with an MFU of 8.0%"],
    ),
    "a straggler": (
        {"steps": {}, "ranks": [[0.5, 0.51, 0.9, 0.5]] * 8 + [[0.5, 0.5, 0.5, 0.5]]},
        "warning: straggler",
        ["rank 2 on n2: 0.856 s of own work a step where the median rank needs 0.5", "--exclude n2"],
    ),
    "heat": (
        {
            "steps": {},
            "gpus": {},
            "odd": {"throttle_reasons": ["hw_thermal_slowdown"], "temperature_c": 91},
        },
        "warning: throttled",
        ["n2 GPU 1 is slowed down: hw_thermal_slowdown 100% of the time, at up to 91 C"],
    ),
    "empty cards": (
        {"steps": {}, "gpus": {"memory_used_bytes": 20 * 2**30}},
        "info: memory_headroom",
        ["20.0 GiB of 80.0 GiB, 25%"],
    ),
    "an idle GPU among busy ones": (
        {"steps": {}, "gpus": {}, "odd": {"gpu_utilization_percent": 0}},
        "warning: idle_gpu",
        ["n2 GPU 1 did nothing, while the busiest GPU was busy 97 %"],
    ),
    "rollouts that leave the GPUs idle": (
        {"steps": {"rollout_time_s": 0.7}, "gpus": {"gpu_utilization_percent": 35}},
        "warning: rollout_idle",
        ["70% of each step goes into rollouts, and the GPUs are busy 35 %"],
    ),
    "rewards that hold up the GPUs": ({"steps": {"reward_time_s": 0.25}}, "warning: reward_bound", ["25%"]),
    "a lost GPU": (
        {"steps": {}, "gpus": {}, "odd": {"error": "gpu is lost"}, "cause": "crash"},
        "error: gpu_lost",
        ["n2 GPU 1 stopped answering: gpu is lost ("],
    ),
    "a rank that ended on a GPU fault": (
        {"steps": {}, "cause": "crash", "detail": "rank 3: CUDA error: uncorrectable ECC error encountered"},
        "error: xid",
        ["uncorrectable ECC error"],
    ),
}


@pytest.mark.parametrize("case", FOUND)
def test_what_is_wrong_is_found_with_its_figures(scene: Scene, case: str) -> None:
    played_so, found_as, fragments = FOUND[case]
    found = only(played(scene, **played_so))
    assert f"{found.severity.value}: {found.code}" == found_as
    for fragment in fragments:
        assert fragment in f"{found.sentence} {found.advice}"


FINE: dict[str, dict[str, Any]] = {
    "GPUs that work: an evaluation, a compilation": {
        "steps": {}, "silence": 300, "gpus": {}, "after": {"gpu_utilization_percent": 100, "power_w": 300.0},
        "cause": "timeout",
    },
    "GPUs that idle: the host saves or waits for a disk": {
        "steps": {}, "silence": 300, "gpus": {}, "after": {"gpu_utilization_percent": 0, "power_w": 60.0},
        "cause": "timeout",
    },
    "a short silence": {"steps": {}, "silence": 50, "gpus": {}, "after": SPINNING},
    "a start that takes its time": {"silence": 500, "gpus": SPINNING, "cause": "timeout"},
    "a little waiting": {"steps": {"data_time_s": 0.14}, "gpus": {"gpu_utilization_percent": 58}},
    "waiting beside busy GPUs": {"steps": {"data_time_s": 0.4}, "gpus": {"gpu_utilization_percent": 96}},
    "good MFU": {"steps": {"mfu": 0.35}, "gpus": MOVING},
    "full power": {"steps": {"mfu": 0.08}, "gpus": MOVING | {"power_w": 350.0}},
    "GPUs that pause": {"steps": {"mfu": 0.08}, "gpus": MOVING | {"gpu_utilization_percent": 60}},
    "a rank that is a little slower": {"steps": {}, "ranks": [[0.5, 0.5, 0.59, 0.5]] * 8},
    "a rank that is slow now and then": {
        "steps": {}, "ranks": [[0.5, 0.5, 0.9, 0.5]] * 5 + [[0.5, 0.5, 0.5, 0.5]] * 5
    },
    "two records of ranks": {"steps": {}, "ranks": [[0.5, 0.5, 0.9, 0.5]] * 2},
    "the power cap of a card at full load": {
        "steps": {}, "gpus": {"throttle_reasons": ["sw_power_cap", "gpu_idle", "applications_clocks_setting"]}
    },
    "one full GPU": {
        "steps": {}, "gpus": {"memory_used_bytes": 20 * 2**30}, "odd": {"memory_used_bytes": 41 * 2**30}
    },
    "GPUs that are all idle": {"steps": {}, "gpus": {"gpu_utilization_percent": 3}},
    "short rollouts": {"steps": {"rollout_time_s": 0.4}, "gpus": {"gpu_utilization_percent": 35}},
    "rollouts on busy GPUs": {"steps": {"rollout_time_s": 0.7}, "gpus": {"gpu_utilization_percent": 80}},
    "quick rewards": {"steps": {"reward_time_s": 0.15}},
    "a fault of the program": {"steps": {}, "cause": "crash", "detail": "rank 3: shapes do not match"},
    "warm-up": {"steps": {"count": 9, "data_time_s": 0.9, "mfu": 0.01}},
}  # fmt: skip


@pytest.mark.parametrize("case", FINE)
def test_what_is_nearly_wrong_is_not_told(scene: Scene, case: str) -> None:
    assert codes(played(scene, **FINE[case])) == []


def test_silence_is_counted_from_the_last_save(scene: Scene) -> None:
    scene.steps()
    scene.silence(280)
    MetricWriter(scene.made.run, 1).event("save", time=scene.made.clock, seconds=270.0)
    scene.silence(20)
    scene.gpus({}, {"gpu_utilization_percent": 100, "power_w": 70.0})
    assert codes(scene.end()) == []


def test_silence_is_counted_from_the_last_evaluation_too(tmp_path: Path) -> None:
    scene = Scene(tmp_path, stage="rl")
    scene.steps()
    for _ in range(4):  # its answers come batch by batch
        scene.silence(50)
        scene.made.finish(scene.made.run.rollouts / f"evaluation-00000030/part-{scene.made.clock:.0f}-8.json")
    scene.silence(50)
    scene.gpus(SPINNING)
    attempt = read_history(scene.made.run).attempts[-1]
    assert codes(diagnose(scene.made.run, attempt, end=scene.made.clock)) == [], "it is under way"
    shutil.rmtree(scene.made.run.rollouts)
    MetricWriter(scene.made.run, 1).event("evaluation", time=scene.made.clock, seconds=250.0)
    scene.silence(20)
    scene.gpus(SPINNING)
    assert codes(scene.end("preempted")) == []


def test_input_bound_on_cpu_ranks(tmp_path: Path) -> None:
    scene = Scene(tmp_path, num_gpus=0)
    scene.steps(mfu=None, data_time_s=0.2)
    assert codes(scene.end()) == ["input_bound"]


def test_a_slow_node_is_one_finding(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.steps()
    writer = RankTimeWriter(scene.made.run, 1, ["n1", "n1", "n2", "n2", "n3", "n3"])
    for step in (1, 2, 3):
        waits = [0.5, 0.5, 0.1, 0.1, 0.5, 0.5]
        writer.write(global_step=step, num_steps=1, step_time_s=[1.0] * 6, wait_s=waits)
    assert only(scene.end()).sentence.startswith("all ranks of n2: 0.9 s of own work")


def test_records_of_another_attempt_or_of_another_length_are_left_out(scene: Scene) -> None:
    scene.ranks([[0.5, 0.5, 0.9, 0.5]])
    with (scene.made.run.metrics / "ranks.jsonl").open("a") as file:
        file.write('{"global_step": 2, "attempt": 1, "step_time_s": [1.0], "wait_s": [0.1, 0.2]}\n{"torn')
    times = read_rank_times(scene.made.run, 1)
    assert times is not None
    assert times.nodes == ("n1", "n1", "n2", "n2")
    assert times.busy_s == [pytest.approx((0.5, 0.5, 0.9, 0.5))]
    assert read_rank_times(scene.made.run, 2) is None


def test_ecc_errors_count_from_the_attempts_begin(scene: Scene) -> None:
    scene.steps()
    scene.gpus({"ecc_uncorrected_volatile": 3})
    path = scene.made.run.gpu_metrics("n2")
    assert codes(scene.end()) == [], "three that the driver has had since it was loaded"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[-1]["gpus"][1]["ecc_uncorrected_volatile"] = 5
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    attempt = read_history(scene.made.run).attempts[-1]
    found = only(diagnose(scene.made.run, attempt, end=attempt.end))
    assert (found.code, found.severity) == ("ecc", Severity.error)
    assert found.sentence.startswith("n2 GPU 1 had 2 memory errors")
    assert "--exclude n2" in found.advice


def test_the_stub_is_named(scene: Scene) -> None:
    scene.steps()
    scene.made.gpu_ticks(scene.start, 40, source="stub")
    found = scene.end()
    assert found.source == "stub"
    assert "source=stub" in as_lines(found)[-1]


def test_a_long_record_costs_no_more_than_the_budget(scene: Scene) -> None:
    scene.made.clock += 10
    scene.steps(2000)
    for node in ("n1", "n2"):
        scene.made.gpu_ticks(scene.start, 2000, node=node)
    attempt = read_history(scene.made.run).attempts[-1]
    whole = diagnose(scene.made.run, attempt, end=scene.made.clock)
    part = diagnose(scene.made.run, attempt, end=scene.made.clock, max_bytes=2**17)
    assert (whole.is_partial, part.is_partial) == (False, True)
    assert 20 < (part.figures["num_steps"] or 0) < 2000 == whole.figures["num_steps"]
    assert part.figures["gpu_power_w"] == pytest.approx(whole.figures["gpu_power_w"], rel=0.05), (
        "the limits and names of the cards come from the head of the file"
    )


def test_eighty_hot_gpus_are_not_eighty_paragraphs(tmp_path: Path) -> None:
    scene = Scene(tmp_path, num_gpus=8)
    scene.steps()
    scene.gpus({"throttle_reasons": ["hw_slowdown"]})
    found = scene.end()
    assert codes(found) == ["throttled"] * 16
    assert as_lines(found)[-1] == "  and 13 more of throttled (--json lists all)"


# The end of an attempt


def test_the_batch_log_gets_it(scene: Scene, capfd: pytest.CaptureFixture[str]) -> None:
    scene.steps(data_time_s=0.4)
    scene.end()
    end.print_diagnosis(scene.made.run, 1)
    text = capfd.readouterr().out
    assert text.startswith("run: diagnosis of attempt 1: 30 steps, 1 s each (median), 40% of it waiting")
    assert "input_bound" in text


def test_records_that_break_it_do_not_break_the_end(scene: Scene, capfd: pytest.CaptureFixture[str]) -> None:
    scene.steps()
    scene.made.run.gpu_metrics("n1").mkdir()
    end.print_diagnosis(scene.made.run, 1)
    assert "diagnosis of attempt 1 failed: " in capfd.readouterr().out


def test_a_file_system_that_hangs_does_not_hold_up_the_end(
    scene: Scene, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(end, "_DIAGNOSIS_TIMEOUT_S", 1.0)
    stuck = scene.made.run.path / "python"
    stuck.write_text("#!/bin/sh\nexec sleep 60\n")
    stuck.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(stuck))
    started = time.monotonic()
    end.print_diagnosis(scene.made.run, 1)
    assert time.monotonic() - started < 30
    assert "no diagnosis of attempt 1" in capfd.readouterr().err


def test_an_attempt_without_an_end_counts_until_its_last_sign_of_life(scene: Scene) -> None:
    scene.steps()
    scene.silence(300)
    scene.gpus({}, {"gpu_utilization_percent": 100, "power_w": 70.0})
    attempt = read_history(scene.made.run).attempts[-1]
    assert codes(diagnose(scene.made.run, attempt, end=None)) == ["hang"]


@pytest.mark.parametrize("line", ['{"time": 1, "attempt": 1, "gpus": [', "[]", "null", '{"attempt": 1}'])
def test_torn_and_foreign_lines_do_not_stop_it(scene: Scene, line: str) -> None:
    scene.steps()
    scene.gpus({})
    for path in (scene.made.run.gpu_metrics("n1"), scene.made.run.metrics / "events.jsonl"):
        with path.open("a") as file:
            file.write(line + "\n")
    assert codes(scene.end()) == []


def test_of_a_long_attempt_its_budget_is_read_and_no_more(scene: Scene) -> None:
    scene.steps(30)
    for node in ("n1", "n2"):
        scene.made.gpu_ticks(scene.start, 18_000, node=node, gpus=4)
    assert sum(path.stat().st_size for path in scene.made.run.metrics.iterdir()) > 3 * QUICK_BYTES
    attempt = read_history(scene.made.run).attempts[-1]
    before = bytes_read()
    diagnosis = diagnose(scene.made.run, attempt, end=scene.made.clock, max_bytes=QUICK_BYTES)
    # /proc itself and the first line of each file are read too: 64 KiB besides.
    assert QUICK_BYTES / 4 < bytes_read() - before < QUICK_BYTES + 2**16
    assert diagnosis.is_partial
