"""gpu-<node>.jsonl folded into a few numbers per GPU."""

import itertools
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.telemetry.scenes import summarise

UUID = "GPU-1"


def header(attempt: int = 0, source: str = "nvml", **more: Any) -> dict[str, Any]:
    static = {"uuid": UUID, "index": 0, "name": "A100", "memory_total_bytes": 80, "power_limit_w": 400.0}
    about = {"event": "devices", "time": 0.0, "node": "n1", "attempt": attempt, "source": source}
    return {**about, "driver": "550", "period_s": 1.0, "gpus": [static], **more}


def tick(at: float, attempt: int = 0, **reading: Any) -> dict[str, Any]:
    return {
        "time": at,
        "node": "n1",
        "attempt": attempt,
        "source": "nvml",
        "gpus": [{"uuid": UUID, **reading}],
    }


def summary(path: Path, *lines: dict[str, Any]) -> dict[str, Any]:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return summarise(path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "gpu-n1.jsonl"


def gpu(path: Path, *lines: dict[str, Any]) -> dict[str, Any]:
    value: dict[str, Any] = summary(path, *lines)["gpus"][UUID]
    return value


def test_means_and_maxima(path: Path) -> None:
    found = gpu(
        path,
        header(),
        tick(1, gpu_utilization_percent=100, memory_used_bytes=10, power_w=300.0, temperature_c=60),
        tick(2, gpu_utilization_percent=50, memory_used_bytes=30, power_w=100.0, temperature_c=50),
        tick(3, gpu_utilization_percent=None, memory_used_bytes=20, power_w=None, temperature_c=None),
    )
    assert (found["mean_gpu_utilization_percent"], found["max_memory_used_bytes"]) == (75, 30)
    assert (found["mean_power_w"], found["max_power_w"], found["max_temperature_c"]) == (200, 300, 60)
    assert (found["ticks"], found["name"]) == (3, "A100")


def test_what_was_never_read_is_none(path: Path) -> None:
    found = gpu(path, header(), tick(1, power_w=None))
    for key in (
        "mean_gpu_utilization_percent",
        "mean_power_w",
        "energy_j",
        "energy_source",
        "max_temperature_c",
    ):
        assert found[key] is None
    assert found["throttle_fraction"] == {}


def test_no_file_and_no_ticks(path: Path) -> None:
    assert summarise(path)["gpus"] == {}
    assert summary(path, header())["gpus"][UUID]["ticks"] == 0


def test_energy_without_a_counter_is_power_over_time(path: Path) -> None:
    found = gpu(path, header(), tick(10, power_w=100.0), tick(12, power_w=300.0), tick(13, power_w=300.0))
    assert (found["energy_j"], found["energy_source"]) == (700.0, "power")


def test_no_energy_is_made_up_across_a_gap_or_between_attempts(path: Path) -> None:
    lines = [header(), tick(1, power_w=100.0), tick(2, power_w=100.0), tick(60, power_w=100.0)]
    again = [header(1), tick(61, 1, power_w=100.0), tick(62, 1, power_w=100.0)]
    assert gpu(path, *lines, *again)["energy_j"] == 200.0


def test_the_counter_of_another_attempt_is_not_subtracted(path: Path) -> None:
    first = [header(), tick(1, energy_j=1000.0), tick(2, energy_j=1400.0)]
    second = [header(1), tick(90, 1, energy_j=9000.0), tick(91, 1, energy_j=9100.0)]
    found = gpu(path, *first, *second)
    assert (found["energy_j"], found["energy_resets"]) == (500.0, 0)


@given(st.lists(st.floats(0, 1e9), min_size=2, max_size=20))
def test_energy_is_never_negative_and_exact_for_a_growing_counter(
    tmp_path_factory: pytest.TempPathFactory, counters: list[float]
) -> None:
    path = tmp_path_factory.mktemp("energy") / "gpu.jsonl"
    found = gpu(path, header(), *(tick(i, energy_j=value) for i, value in enumerate(counters)))
    assert found["energy_j"] >= 0
    falls = sum(later < earlier for earlier, later in itertools.pairwise(counters))
    assert found["energy_resets"] == falls
    if not falls:
        assert found["energy_j"] == pytest.approx(counters[-1] - counters[0], abs=1e-3)


def test_one_stub_start_marks_the_whole_file(path: Path) -> None:
    assert summary(path, header(0, "stub"), header(1, "nvml"))["source"] == "stub"


def test_no_driver_leaves_its_message(path: Path) -> None:
    found = summary(
        path, {"event": "no_driver", "time": 1.0, "node": "n1", "attempt": 0, "message": "no driver"}
    )
    assert (found["message"], found["source"], found["gpus"]) == ("no driver", None, {})


def test_errors_ecc_and_throttling_are_counted(path: Path) -> None:
    found = gpu(
        path,
        header(),
        tick(1, throttle_reasons=["sw_power_cap"], ecc_uncorrected_volatile=0),
        tick(2, throttle_reasons=[], ecc_uncorrected_volatile=3),
        tick(3, throttle_reasons=None, ecc_uncorrected_volatile=None, error="gpu is lost"),
    )
    assert found["throttle_fraction"] == {"sw_power_cap": 0.5}
    assert found["ecc_uncorrected_volatile"] == 3
    assert found["errors"] == {"gpu is lost": 1}


@pytest.mark.parametrize(
    ("utilization", "power", "fraction"), [(100, 70.0, 1), (100, 300.0, 0), (0, 60.0, 0), (None, 70.0, 0)]
)
def test_busy_at_low_power_looks_like_a_hang(
    path: Path, utilization: int | None, power: float, fraction: int
) -> None:
    found = gpu(path, header(), tick(1, gpu_utilization_percent=utilization, power_w=power))
    assert found["busy_low_power_fraction"] == fraction


def test_a_torn_line_is_left_out(path: Path) -> None:
    summary(path, header(), tick(1, power_w=100.0), tick(2, power_w=100.0))
    path.write_bytes(path.read_bytes()[:-20])
    assert summarise(path)["ticks"] == 1


def test_memory_does_not_grow_with_the_file(path: Path) -> None:
    def peak(ticks: int) -> int:
        with path.open("w") as file:
            file.write(json.dumps(header()) + "\n")
            file.writelines(
                json.dumps(tick(at, power_w=100.0, energy_j=at * 100.0)) + "\n" for at in range(ticks)
            )
        tracemalloc.start()
        summarise(path)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    peak(10)
    assert peak(20000) < peak(5000) + 200_000, "of any file at most so many points are kept"
