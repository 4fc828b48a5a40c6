"""Each rule fires on an attempt made for it, and keeps quiet on one that is nearly so."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from r1hpc.attempt import end
from r1hpc.telemetry.attempts import read_history
from r1hpc.telemetry.diagnose import QUICK_BYTES, Diagnosis, as_lines, diagnose
from r1hpc.telemetry.findings import Finding, Severity
from r1hpc.telemetry.metrics import MetricWriter
from r1hpc.telemetry.ranks import RankTimeWriter, read_rank_times
from tests.recorded import RecordedRun

CARD = 80 * 2**30
GOOD = {
    "gpu_utilization_percent": 97,
    "power_w": 360.0,
    "memory_used_bytes": 60 * 2**30,
    "temperature_c": 61,
    "ecc_uncorrected_volatile": 0,
    "throttle_reasons": ["sw_power_cap"],
}


class Scene:
    """An attempt on two nodes of two GPUs: first steps of one second, then perhaps silence."""

    def __init__(self, path: Path, num_gpus: int = 2) -> None:
        self.made = RecordedRun(path / "run", gpus=2 * num_gpus, nodes=2)
        self.made.submit("4711", "slurm")
        self.made.begin()
        self.num_gpus = num_gpus
        self.start = self.made.clock

    def steps(self, count: int = 30, step_time_s: float = 1.0, mfu: float | None = 0.4, **more: Any) -> None:
        writer = MetricWriter(self.made.run, self.made.attempts)
        self.made.clock += 10
        fields = {"data_time_s": 0.01, **more}
        for step in range(1, count + 1):
            self.made.clock += step_time_s
            times = {"time": self.made.clock, "step_time_s": step_time_s}
            writer.step(global_step=step, loss=2.0, mfu=mfu, **times, **fields)

    def silence(self, seconds: float) -> None:
        self.made.clock += seconds

    def gpus(
        self,
        during: dict[str, Any],
        after: dict[str, Any] | None = None,
        *,
        odd: dict[str, Any] | None = None,
    ) -> None:
        """A tick a second on each GPU; `odd` is what GPU 1 of n2 reads besides, all the time."""
        working_until = self.start + 10 + 30
        for node in ("n1", "n2"):
            uuids = [f"GPU-{node}-{i}" for i in range(self.num_gpus)]
            static = [
                {"uuid": u, "index": i, "name": "A100", "memory_total_bytes": CARD, "power_limit_w": 400.0}
                for i, u in enumerate(uuids)
            ]
            stamp = {"node": node, "attempt": 1, "source": "nvml"}
            lines: list[dict[str, Any]] = [
                {
                    "event": "devices",
                    "time": self.start,
                    "period_s": 1.0,
                    "driver": "550",
                    "gpus": static,
                    **stamp,
                }
            ]
            at = self.start
            while at <= self.made.clock:
                reading = GOOD | (during if at <= working_until or after is None else after)
                strange = {**reading, **(odd or {})}
                gpus = [{"uuid": u, **(strange if u == "GPU-n2-1" else reading)} for u in uuids]
                lines.append({"time": at, **stamp, "gpus": gpus})
                at += 1
            self.made.run.gpu_metrics(node).write_text("".join(json.dumps(line) + "\n" for line in lines))

    def ranks(self, busy_s: list[list[float]], step_time_s: float = 1.0) -> None:
        writer = RankTimeWriter(self.made.run, 1, ["n1", "n1", "n2", "n2"])
        for i, row in enumerate(busy_s):
            waits = [step_time_s - busy for busy in row]
            writer.write(global_step=i + 1, num_steps=1, step_time_s=[step_time_s] * len(row), wait_s=waits)

    def end(self, cause: str = "preempted", detail: str = "") -> Diagnosis:
        self.made.end(cause, detail=detail)
        attempt = read_history(self.made.run).attempts[-1]
        return diagnose(self.made.run, attempt, end=attempt.end, max_bytes=QUICK_BYTES)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def codes(diagnosis: Diagnosis) -> list[str]:
    return [finding.code for finding in diagnosis.findings]


def only(diagnosis: Diagnosis) -> Finding:
    assert len(diagnosis.findings) == 1, codes(diagnosis)
    return diagnosis.findings[0]


def test_a_healthy_attempt_gets_one_line_of_figures(scene: Scene) -> None:
    scene.steps()
    scene.gpus({})
    scene.ranks([[0.8, 0.81, 0.79, 0.82]] * 5)
    found = scene.end()
    assert " ".join("".join(as_lines(found)).split()) == (
        "attempt 1: 30 steps, 1 s each (median), 1% of it waiting for data, MFU 40.0%, GPUs 97 % busy, "
        "at 360 W, nothing stands out"
    )


def test_a_hang_is_told_by_busy_gpus_at_the_power_of_idle_ones(scene: Scene) -> None:
    scene.steps()
    scene.silence(300)
    scene.gpus({}, {"gpu_utilization_percent": 100, "power_w": 70.0})
    found = only(scene.end("timeout"))
    assert (found.code, found.severity) == ("hang", Severity.error)
    assert "no step for 5 min 00 s after step 30" in found.sentence
    assert "all 4 GPUs read 100 % busy at 70 W of 400 W" in found.sentence


def test_the_gpu_that_does_not_wait_with_the_others_is_named(scene: Scene) -> None:
    scene.steps()
    scene.silence(300)
    scene.gpus({}, {"gpu_utilization_percent": 100, "power_w": 70.0}, odd={"power_w": 330.0})
    found = only(scene.end("hang"))
    assert "3 of 4 GPUs" in found.sentence
    assert "n2 GPU 1" in found.advice


@pytest.mark.parametrize(
    "after",
    [
        {"gpu_utilization_percent": 100, "power_w": 300.0},  # works: an evaluation, a compilation
        {"gpu_utilization_percent": 0, "power_w": 60.0},  # idles: the host saves or waits for a disk
    ],
)
def test_silence_with_gpus_that_work_or_idle_is_no_hang(scene: Scene, after: dict[str, Any]) -> None:
    scene.steps()
    scene.silence(300)
    scene.gpus({}, after)
    assert codes(scene.end("timeout")) == []


def test_a_short_silence_is_no_hang(scene: Scene) -> None:
    scene.steps()
    scene.silence(50)
    scene.gpus({}, {"gpu_utilization_percent": 100, "power_w": 70.0})
    assert codes(scene.end()) == []


@pytest.mark.parametrize(("seconds", "expected"), [(500, []), (700, ["hang"])])
def test_a_start_may_take_its_time(scene: Scene, seconds: float, expected: list[str]) -> None:
    scene.silence(seconds)
    scene.gpus({"gpu_utilization_percent": 100, "power_w": 70.0})
    assert codes(scene.end("timeout")) == expected


def test_silence_is_counted_from_the_last_save(scene: Scene) -> None:
    scene.steps()
    scene.silence(280)
    MetricWriter(scene.made.run, 1).event("save", time=scene.made.clock, seconds=270.0)
    scene.silence(20)
    scene.gpus({}, {"gpu_utilization_percent": 100, "power_w": 70.0})
    assert codes(scene.end()) == []


def test_a_hang_that_the_watchdog_ended_needs_no_gpu_readings(scene: Scene) -> None:
    scene.steps()
    scene.silence(30)
    found = only(scene.end("hang", detail="rank 1: 30 s in step 31"))
    assert found.sentence == "no step for 30 s after step 30"


def test_input_bound(scene: Scene) -> None:
    scene.steps(data_time_s=0.4)
    scene.gpus({"gpu_utilization_percent": 58})
    found = only(scene.end())
    assert found.code == "input_bound"
    assert "40% of each step is spent waiting for data, and the GPUs are busy only 58 %" in found.sentence


def test_input_bound_on_cpu_ranks(tmp_path: Path) -> None:
    scene = Scene(tmp_path, num_gpus=0)
    scene.steps(mfu=None, data_time_s=0.2)
    assert codes(scene.end()) == ["input_bound"]


@pytest.mark.parametrize(("data_s", "utilization"), [(0.14, 58), (0.4, 96)])
def test_a_little_waiting_or_busy_gpus_are_not_input_bound(
    scene: Scene, data_s: float, utilization: int
) -> None:
    scene.steps(data_time_s=data_s)
    scene.gpus({"gpu_utilization_percent": utilization})
    assert codes(scene.end()) == []


def test_communication_bound(scene: Scene) -> None:
    scene.steps(mfu=0.08)
    scene.gpus({"gpu_utilization_percent": 99, "power_w": 190.0})
    found = only(scene.end())
    assert found.code == "communication_bound"
    assert "99 % busy, but at 48% of their power limit and with an MFU of 8.0%" in found.sentence


@pytest.mark.parametrize(
    ("mfu", "power_w", "utilization"), [(0.35, 190.0, 99), (0.08, 350.0, 99), (0.08, 190.0, 60)]
)
def test_good_mfu_full_power_or_idle_gpus_are_not_communication_bound(
    scene: Scene, mfu: float, power_w: float, utilization: int
) -> None:
    scene.steps(mfu=mfu)
    scene.gpus({"gpu_utilization_percent": utilization, "power_w": power_w})
    assert codes(scene.end()) == []


def test_a_straggler_is_named_with_its_node_and_its_cost(scene: Scene) -> None:
    scene.steps()
    scene.ranks([[0.5, 0.51, 0.9, 0.5]] * 8 + [[0.5, 0.5, 0.5, 0.5]])
    found = only(scene.end())
    assert found.code == "straggler"
    assert found.sentence.startswith(
        "rank 2 on n2: 0.856 s of own work a step where the median rank needs 0.5"
    )
    assert "--exclude n2" in found.advice
    assert found.evidence["ranks"] == [2]


def test_a_slow_node_is_one_finding(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.steps()
    writer = RankTimeWriter(scene.made.run, 1, ["n1", "n1", "n2", "n2", "n3", "n3"])
    for step in (1, 2, 3):
        waits = [0.5, 0.5, 0.1, 0.1, 0.5, 0.5]
        writer.write(global_step=step, num_steps=1, step_time_s=[1.0] * 6, wait_s=waits)
    assert only(scene.end()).sentence.startswith("all ranks of n2: 0.9 s of own work")


@pytest.mark.parametrize(
    "busy_s",
    [
        [[0.5, 0.5, 0.59, 0.5]] * 8,  # a little slower
        [[0.5, 0.5, 0.9, 0.5]] * 5 + [[0.5, 0.5, 0.5, 0.5]] * 5,  # slow now and then
        [[0.5, 0.5, 0.9, 0.5]] * 2,  # two records
    ],
)
def test_a_rank_that_is_slow_now_and_then_is_no_straggler(scene: Scene, busy_s: list[list[float]]) -> None:
    scene.steps()
    scene.ranks(busy_s)
    assert codes(scene.end()) == []


def test_records_of_another_attempt_or_of_another_length_are_left_out(scene: Scene) -> None:
    scene.ranks([[0.5, 0.5, 0.9, 0.5]])
    with (scene.made.run.metrics / "ranks.jsonl").open("a") as file:
        file.write('{"global_step": 2, "attempt": 1, "step_time_s": [1.0], "wait_s": [0.1, 0.2]}\n{"torn')
    times = read_rank_times(scene.made.run, 1)
    assert times is not None
    assert times.nodes == ("n1", "n1", "n2", "n2")
    assert times.busy_s == [pytest.approx((0.5, 0.5, 0.9, 0.5))]
    assert read_rank_times(scene.made.run, 2) is None


def test_throttled(scene: Scene) -> None:
    scene.steps()
    scene.gpus({}, odd={"throttle_reasons": ["hw_thermal_slowdown"], "temperature_c": 91})
    found = only(scene.end())
    assert found.code == "throttled"
    assert found.sentence.startswith(
        "n2 GPU 1 is slowed down: hw_thermal_slowdown 100% of the time, at up to 91 C"
    )


def test_the_power_cap_of_a_card_at_full_load_is_not_throttling(scene: Scene) -> None:
    scene.steps()
    scene.gpus({"throttle_reasons": ["sw_power_cap", "gpu_idle", "applications_clocks_setting"]})
    assert codes(scene.end()) == []


def test_memory_headroom(scene: Scene) -> None:
    scene.steps()
    scene.gpus({"memory_used_bytes": 20 * 2**30})
    found = only(scene.end())
    assert (found.code, found.severity) == ("memory_headroom", Severity.info)
    assert "20.0 GiB of 80.0 GiB, 25%" in found.sentence


def test_one_full_gpu_is_no_headroom(scene: Scene) -> None:
    scene.steps()
    scene.gpus({"memory_used_bytes": 20 * 2**30}, odd={"memory_used_bytes": 41 * 2**30})
    assert codes(scene.end()) == []


def test_an_idle_gpu_among_busy_ones(scene: Scene) -> None:
    scene.steps()
    scene.gpus({}, odd={"gpu_utilization_percent": 0})
    assert only(scene.end()).sentence.startswith("n2 GPU 1 did nothing, while the busiest GPU was busy 97 %")


def test_gpus_that_are_all_idle_are_not_told_one_by_one(scene: Scene) -> None:
    scene.steps()
    scene.gpus({"gpu_utilization_percent": 3})
    assert codes(scene.end()) == []


def test_rollouts_that_leave_the_gpus_idle(scene: Scene) -> None:
    scene.steps(rollout_time_s=0.7)
    scene.gpus({"gpu_utilization_percent": 35})
    found = only(scene.end())
    assert found.code == "rollout_idle"
    assert "70% of each step goes into rollouts, and the GPUs are busy 35 %" in found.sentence


@pytest.mark.parametrize(("rollout_s", "utilization"), [(0.4, 35), (0.7, 80)])
def test_short_rollouts_or_busy_gpus_are_fine(scene: Scene, rollout_s: float, utilization: int) -> None:
    scene.steps(rollout_time_s=rollout_s)
    scene.gpus({"gpu_utilization_percent": utilization})
    assert codes(scene.end()) == []


@pytest.mark.parametrize(("reward_s", "expected"), [(0.25, ["reward_bound"]), (0.15, [])])
def test_rewards_that_hold_up_the_gpus(scene: Scene, reward_s: float, expected: list[str]) -> None:
    scene.steps(reward_time_s=reward_s)
    assert codes(scene.end()) == expected


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


def test_a_gpu_that_is_lost(scene: Scene) -> None:
    scene.steps()
    scene.gpus({}, odd={"error": "gpu is lost"})
    assert only(scene.end("crash")).sentence.startswith("n2 GPU 1 stopped answering: gpu is lost (")


@pytest.mark.parametrize(
    ("detail", "expected"),
    [
        ("rank 3: RuntimeError: CUDA error: uncorrectable ECC error encountered", ["xid"]),
        ("rank 3: RuntimeError: shapes do not match", []),
    ],
)
def test_a_rank_that_ended_on_a_gpu_fault(scene: Scene, detail: str, expected: list[str]) -> None:
    scene.steps()
    assert codes(scene.end("crash", detail)) == expected


def test_warm_up_is_not_judged(scene: Scene) -> None:
    scene.steps(count=9, data_time_s=0.9, mfu=0.01)
    assert codes(scene.end()) == []


def test_the_stub_is_named(scene: Scene) -> None:
    scene.steps()
    scene.made.gpu_ticks(scene.start, 40, source="stub")
    found = scene.end()
    assert found.to_json()["source"] == "stub"
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
    scene.made.run.gpu_metrics("n1").write_text('{"time": 1, "attempt": 1, "gpus": [7]}\n')
    end.print_diagnosis(scene.made.run, 1)
    assert "diagnosis of attempt 1 failed: " in capfd.readouterr().out


def test_a_file_system_that_hangs_does_not_hold_up_the_end(
    scene: Scene, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(end, "_DIAGNOSIS_TIMEOUT_S", 1.0)
    os.mkfifo(scene.made.run.train_metrics)
    started = time.monotonic()
    end.print_diagnosis(scene.made.run, 1)
    assert time.monotonic() - started < 3
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


def test_eight_mebibytes_are_judged_within_a_second(scene: Scene) -> None:
    scene.steps(30)
    for node in ("n1", "n2"):
        scene.made.gpu_ticks(scene.start, 9000, node=node, gpus=4)
    assert sum(path.stat().st_size for path in scene.made.run.metrics.iterdir()) > QUICK_BYTES / 2
    attempt = read_history(scene.made.run).attempts[-1]
    started = time.process_time()
    diagnose(scene.made.run, attempt, end=scene.made.clock, max_bytes=QUICK_BYTES)
    assert time.process_time() - started < 1
