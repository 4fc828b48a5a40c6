"""The sampler thread on the stub library: what it writes, and that no failure of it reaches training."""

import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from r1hpc.base.files import read_records
from r1hpc.telemetry.gpu.nvml import CHANGING, LINKS, STATIC
from r1hpc.telemetry.gpu.sampler import MIN_PERIOD_S, GpuSampler
from tests.nvml_stub import LIBRARY, environment, run_python
from tests.telemetry.scenes import summarise

PROLOGUE = """
import sys, time
from pathlib import Path
from r1hpc.telemetry.gpu.sampler import GpuSampler
sampler = GpuSampler(Path(sys.argv[1]), "node-1", attempt=4, period_s=0.5)
"""

RUN = (
    PROLOGUE
    + """
print(sampler.start(), flush=True)
path, lines, end = Path(sys.argv[1]), int(sys.argv[2]), time.monotonic() + 60
while lines and time.monotonic() < end and sampler._thread.is_alive():
    if path.read_bytes().count(b"\\n") >= lines:
        break
    time.sleep(0.01)
sampler.stop()
"""
)
"""Sampling until the file has so many lines, or the thread has ended."""
TICKS = PROLOGUE + "sampler.open()\nfor _ in range(int(sys.argv[2])): sampler.tick()\nsampler.close()\n"


def run(script: str, path: Path, argument: int = 0, settings: str = "", failpoint: str = "") -> str:
    """Run it to its end; returns what it printed."""
    result = run_python("-c", script, str(path), str(argument), settings=settings, R1HPC_FAILPOINT=failpoint)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def write_ticks(path: Path, count: int, settings: str = "gpus=8") -> list[dict[str, Any]]:
    run(TICKS, path, count, settings)
    return read_records(path)


def test_a_header_and_a_line_per_tick(tmp_path: Path) -> None:
    path = tmp_path / "gpu.jsonl"
    assert run(RUN, path, 6, "gpus=2") == "None"
    header, *ticks = read_records(path)
    assert header["event"] == "devices"
    assert (header["driver"], header["period_s"], header["notes"]) == ("stub-550.54", 0.5, [])
    assert [sorted(gpu) for gpu in header["gpus"]] == [sorted(STATIC)] * 2
    assert mean_period_s(ticks) > 0.3  # the first may be late on a machine that is busy
    assert {*ticks[0]["gpus"][1]} == {"uuid", *CHANGING}
    assert {(line["node"], line["attempt"]) for line in (header, *ticks)} == {("node-1", 4)}
    assert abs(time.time() - ticks[1]["time"]) < 30


def mean_period_s(ticks: list[dict[str, Any]]) -> float:
    spent_s: float = ticks[-1]["time"] - ticks[0]["time"]
    return spent_s / (len(ticks) - 1)


def test_every_line_says_that_it_comes_from_a_stub(tmp_path: Path) -> None:
    lines = write_ticks(tmp_path / "gpu.jsonl", 3)
    assert [line["source"] for line in lines] == ["stub"] * 4


def test_links_are_read_of_one_gpu_after_another(tmp_path: Path) -> None:
    _, *ticks = write_ticks(tmp_path / "gpu.jsonl", 20, "gpus=2")
    read = [[LINKS[0] in gpu for gpu in tick["gpus"]] for tick in ticks]
    assert [index for index, (zero, _) in enumerate(read) if zero] == [0, 10]
    assert [index for index, (_, one) in enumerate(read) if one] == [1, 11]
    assert set(LINKS) <= set(ticks[10]["gpus"][0])


def test_links_can_be_left_out(tmp_path: Path) -> None:
    path = tmp_path / "gpu.jsonl"
    run(TICKS.replace("period_s=0.5", "link_every=0"), path, 12, "gpus=1")
    assert not any(set(LINKS) & set(tick["gpus"][0]) for tick in read_records(path)[1:])


@pytest.mark.parametrize(
    ("asked", "given"), [(0.01, MIN_PERIOD_S), (-1.0, MIN_PERIOD_S), (0.75, 0.75), (9.0, 9.0)]
)
def test_the_period_is_clamped_to_what_nvml_renews(tmp_path: Path, asked: float, given: float) -> None:
    assert GpuSampler(tmp_path / "gpu.jsonl", "node-1", attempt=0, period_s=asked).period_s == given


def test_a_clamped_period_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "gpu.jsonl"
    run(RUN.replace("period_s=0.5", "period_s=0.01"), path, 6, "gpus=1")
    assert mean_period_s(read_records(path)[1:]) > 0.3


def test_a_second_start_appends_after_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "gpu.jsonl"
    write_ticks(path, 2, "gpus=1")
    path.write_bytes(path.read_bytes()[:-30])
    lines = write_ticks(path, 2, "gpus=1")
    assert [line.get("event") for line in lines] == ["devices", None, "devices", None, None]


def test_no_driver_is_one_sentence_and_one_line(tmp_path: Path) -> None:
    (tmp_path / LIBRARY).touch()
    path = tmp_path / "gpu.jsonl"
    result = run_python("-c", RUN, str(path), "0", library=tmp_path)
    message = "no NVIDIA driver on this node: libnvidia-ml.so.1 not found; GPU metrics are off"
    assert result.returncode == 0
    assert result.stdout.strip() == message
    assert result.stderr.strip() == message, "logged once"
    (line,) = read_records(path)
    assert line == {
        "event": "no_driver",
        "time": line["time"],
        "node": "node-1",
        "attempt": 4,
        "message": message,
    }


def test_a_lost_gpu_is_noted_in_its_record(tmp_path: Path) -> None:
    lines = write_ticks(tmp_path / "gpu.jsonl", 12, "gpus=2;1.lost_after=80;links=0")
    assert lines[-1]["gpus"][1]["error"] == "gpu is lost"
    assert "error" not in lines[-1]["gpus"][0]
    assert "error" not in lines[1]["gpus"][1]


def test_a_full_disk_at_the_start_is_told_and_training_goes_on() -> None:
    full = Path("/dev/full")
    result = run_python("-c", RUN, str(full), "0")
    sentence = "cannot write /dev/full (No space left on device); GPU metrics are off, training continues"
    assert result.returncode == 0
    assert (result.stdout.strip(), result.stderr.strip()) == (sentence, sentence)


LIMITED = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
"""


def test_a_disk_that_fills_up_turns_sampling_off_once(tmp_path: Path) -> None:
    """The limit cuts a line in two, as a full disk does; the next start begins a new line."""
    path = tmp_path / "gpu.jsonl"
    after = "assert not sampler._thread.is_alive(), 'the thread ends itself'; print(sampler.message)\n"
    script = LIMITED + RUN.replace("sampler.stop()", after.strip() + "; sampler.stop()")
    result = run_python("-c", script, str(path), "1000", settings="gpus=4")
    sentence = f"cannot write {path} (File too large); GPU metrics are off, training continues"
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["None", sentence]
    assert result.stderr.splitlines() == [sentence]
    assert path.stat().st_size == 3000
    assert not path.read_bytes().endswith(b"\n")
    whole = len(read_records(path))
    assert len(write_ticks(path, 1, "gpus=4")) == whole + 2


def test_a_write_that_fails_once_is_not_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "gpu.jsonl"
    run(RUN, path, 1000, failpoint="gpu_metrics.write:enospc::2")
    assert [line.get("event") for line in read_records(path)] == ["devices"]


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "gpu.jsonl"
    answer = run(RUN, path)
    assert (
        answer == f"cannot write {path} (No such file or directory); GPU metrics are off, training continues"
    )


def test_the_sampler_does_not_keep_the_process_alive(tmp_path: Path) -> None:
    hangs = "slow=nvmlDeviceGetPowerUsage:300000"  # longer than run_python waits
    run(PROLOGUE + "sampler.start()\n", tmp_path / "gpu.jsonl", settings=hangs)


ON_SIGNAL = """
import signal
got = []
signal.signal(signal.SIGTERM, lambda *_: got.append(print("got it", flush=True)))
print(sampler.start(), flush=True)
time.sleep(2)
print("ready", flush=True)
while not got:  # not pause(): the signal may come ahead of it
    time.sleep(0.01)
begun = time.monotonic()
sampler.stop(timeout_s=0.3)
print(time.monotonic() - begun, flush=True)
"""


def test_sigterm_is_handled_at_once_while_the_driver_hangs(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROLOGUE + ON_SIGNAL, str(tmp_path / "gpu.jsonl")]
    env = environment("gpus=2;slow=nvmlDeviceGetPowerUsage:300000")
    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert [process.stdout.readline().strip() for _ in range(2)] == ["None", "ready"]
        sent = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline().strip() == "got it"
        assert time.monotonic() - sent < 60
        assert float(process.stdout.readline()) < 60
        assert process.wait(60) == 0
        assert "hangs in a call of the NVIDIA driver" in process.stderr.read()


def test_signals_of_training_are_not_for_the_sampler_thread(tmp_path: Path) -> None:
    script = (
        PROLOGUE
        + """
sampler.start()
status = Path(f"/proc/self/task/{sampler._thread.native_id}/status").read_text
end = time.monotonic() + 60
while not (blocked := int(status().partition("SigBlk:")[2].split()[0], 16)) and time.monotonic() < end:
    time.sleep(0.05)
print(f"{blocked:x}")
sampler.stop()
"""
    )
    blocked = int(run(script, tmp_path / "gpu.jsonl"), 16)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        assert blocked >> (number - 1) & 1


def test_a_slow_driver_delays_ticks_and_does_not_pile_them_up(tmp_path: Path) -> None:
    path = tmp_path / "gpu.jsonl"
    run(RUN, path, 4, "gpus=1;slow=nvmlDeviceGetPowerUsage:700")
    times = [line["time"] for line in read_records(path)[1:]]
    assert len(times) >= 3
    assert all(later - earlier > 0.65 for earlier, later in itertools.pairwise(times))


def test_the_file_is_private_and_each_line_is_one_object(tmp_path: Path) -> None:
    path = tmp_path / "gpu.jsonl"
    write_ticks(path, 3)
    assert path.stat().st_mode & 0o777 == 0o600
    assert all(isinstance(json.loads(line), dict) for line in path.read_text().splitlines())


def test_what_the_sampler_writes_is_what_the_summary_reads(tmp_path: Path) -> None:
    path = tmp_path / "gpu.jsonl"
    write_ticks(path, 5, "gpus=2;1.profile=hang;energy_reset_at=3;throttle=4")
    found = summarise(path)
    assert (found["source"], found["ticks"], found["starts"], found["attempts"]) == ("stub", 5, 1, [4])
    busy, hung = found["gpus"].values()
    assert busy["mean_gpu_utilization_percent"] == pytest.approx(92)
    assert (busy["energy_j"], busy["energy_source"], busy["energy_resets"]) == (900.0, "counter", 1)
    assert busy["busy_low_power_fraction"] == 0
    assert busy["throttle_fraction"] == {"sw_power_cap": 1.0}
    assert (hung["mean_gpu_utilization_percent"], hung["mean_power_w"]) == (100, 70)
    assert hung["busy_low_power_fraction"] == 1
