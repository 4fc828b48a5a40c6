"""python -m r1hpc.monitor on the stub library."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from r1hpc.base.files import read_records
from tests.nvml_stub import LIBRARY, environment, run_python

MONITOR = ("-m", "r1hpc.monitor")


def test_a_table_of_the_readings() -> None:
    result = run_python(*MONITOR, "--once", settings="gpus=2;1.fail=nvmlDeviceGetPowerUsage:3;0.throttle=8")
    title, headings, first, second = result.stdout.splitlines()
    assert title.endswith("driver stub-550.54 (source=stub: a test library, these numbers mean nothing)")
    assert headings.split()[:3] == ["GPU", "UUID", "name"]
    assert "20.0 GiB of 80.0 GiB  300 W of 400 W  60 C  1410 MHz  hw_slowdown  1000" in first
    assert "- of 400 W" in second
    assert headings.index("UUID") == first.index("GPU-") == second.index("GPU-")


def test_json_is_one_object_that_names_its_source() -> None:
    result = run_python(*MONITOR, "--once", "--json", settings="gpus=2")
    value = json.loads(result.stdout)
    assert (value["source"], value["driver"], len(value["gpus"])) == ("stub", "stub-550.54", 2)
    assert value["gpus"][1]["nvlink_links_active"] == 12


def test_a_lost_gpu_and_odd_entries_are_shown() -> None:
    settings = "gpus=2;0.fail=nvmlDeviceGetUtilizationRates:15"
    result = run_python(*MONITOR, "--once", settings=settings, CUDA_VISIBLE_DEVICES="0,7")
    assert "note: CUDA_VISIBLE_DEVICES names '7', which is no GPU here" in result.stdout
    assert "gpu is lost" in result.stdout.splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_recording_ends_at_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    path = tmp_path / "gpu.jsonl"
    command = [sys.executable, *MONITOR, "--out", str(path), "--period", "0.5"]
    with subprocess.Popen(command, env=environment("gpus=1")) as process:
        limit = time.monotonic() + 60
        while len(read_records(path)) < 3 and time.monotonic() < limit:
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(60) == 0
    assert len(read_records(path)) >= 3


def test_a_table_again_and_again_ends_at_a_signal() -> None:
    command = [sys.executable, *MONITOR, "--period", "0.5"]
    with subprocess.Popen(command, env=environment("gpus=1"), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(6)]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert [line.startswith("0 ") for line in lines] == [False, False, True] * 2


def test_recording_without_a_driver(tmp_path: Path) -> None:
    (tmp_path / LIBRARY).touch()
    path = tmp_path / "gpu.jsonl"
    result = run_python(*MONITOR, "--out", str(path), library=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("error: no NVIDIA driver on this node")
    assert result.stderr.count("\n") == 1
    assert [line["event"] for line in read_records(path)] == ["no_driver"]


def test_a_recording_whose_disk_fills_up_ends_with_status_1(tmp_path: Path) -> None:
    path = tmp_path / "gpu.jsonl"
    result = run_python(*MONITOR, "--out", str(path), R1HPC_FAILPOINT="gpu_metrics.write:enospc::2")
    assert result.returncode == 1
    assert f"cannot write {path} (No space left on device)" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["--period", "0.1"], "--period 0.1 is not between 0.5 and 3600 seconds"),
        (["--period", "nan"], "--period nan is not between"),
        (["--json"], "add --once"),
        (["--perod", "1"], "did you mean '--period'?"),
    ],
)
def test_asked_wrongly(arguments: list[str], answer: str) -> None:
    result = run_python(*MONITOR, *arguments)
    assert result.returncode == 2
    assert answer in result.stderr
    assert "Traceback" not in result.stderr
