"""The gate to NVML against a stub libnvidia-ml.so.1: real nvidia-ml-py, real ctypes, no GPU.

This proves names, layouts and error paths; the values of a real driver are the gpu-marked test's.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from r1hpc.telemetry.gpu.nvml import CHANGING, LINKS, NoDriverError, open_nvml, throttle_names
from tests.nvml_stub import LIBRARY, built, run_python

GIB = 2**30

SAMPLES = """
import json, sys
from r1hpc.telemetry.gpu.nvml import open_nvml
nvml = open_nvml()
ticks = [[device.sample(links=True) for device in nvml.devices] for _ in range(int(sys.argv[1]))]
print(json.dumps({"notes": nvml.notes, "ticks": ticks, "static": [d.static() for d in nvml.devices]}))
"""


_OPEN = """
from r1hpc.telemetry.gpu.nvml import NoDriverError, open_nvml
try:
    open_nvml()
except NoDriverError as error:
    print(error)
"""


def sample(settings: str, ticks: int = 1, library: Path | None = None, **more: str) -> dict[str, Any]:
    """The samples of all GPUs on the stub: {notes, ticks: [[record of a GPU]], static}."""
    result = run_python("-c", SAMPLES, str(ticks), settings=settings, library=library, **more)
    assert result.returncode == 0, result.stderr
    value: dict[str, Any] = json.loads(result.stdout)
    return value


def first(settings: str, library: Path | None = None) -> dict[str, Any]:
    """The first record of GPU 0."""
    record: dict[str, Any] = sample(settings, library=library)["ticks"][0][0]
    return record


def test_every_reading_of_a_gpu() -> None:
    settings = "1.processes=2;1.throttle=0x44;1.ecc_corrected=7;1.ecc_uncorrected=2;1.links_down=3"
    found = sample(settings, ticks=2)
    assert found["static"][1] == {
        "uuid": "GPU-000000a1-57ab-4000-8000-000000000001",
        "index": 1,
        "name": "Stub A100-SXM4-80GB",
        "pci_bus_id": "00000000:08:00.0",
        "memory_total_bytes": 80 * GIB,
        "power_limit_w": 400.0,
    }
    assert found["ticks"][0][1] == {
        "uuid": "GPU-000000a1-57ab-4000-8000-000000000001",
        "gpu_utilization_percent": 91,
        "memory_utilization_percent": 41,
        "memory_used_bytes": 21 * GIB,
        "power_w": 301.0,
        "energy_j": 2_000_000.0,
        "temperature_c": 61,
        "sm_clock_mhz": 1410,
        "memory_clock_mhz": 1593,
        "throttle_reasons": ["sw_power_cap", "hw_thermal_slowdown"],
        "ecc_corrected_volatile": 7,
        "ecc_uncorrected_volatile": 2,
        "processes": [
            {"pid": 2000, "used_memory_bytes": 2 * GIB},
            {"pid": 2001, "used_memory_bytes": None},
        ],
        "pcie_tx_kib_s": 1001,
        "pcie_rx_kib_s": 2001,
        "nvlink_links_active": 9,
        "nvlink_tx_kib": 5_000_000_000,
        "nvlink_rx_kib": 5_000_000_101,
    }
    later = found["ticks"][1][1]
    assert (later["gpu_utilization_percent"], later["power_w"], later["energy_j"]) == (92, 308.0, 2_000_300.0)


def test_direct_calls_agree_with_nvidia_ml_py() -> None:
    script = """
import pynvml
from r1hpc.telemetry.gpu.nvml import open_nvml
device = open_nvml().devices[3]
mine = device.static() | device.sample(links=True)
gpu = pynvml.nvmlDeviceGetHandleByUUID(device.uuid.encode())
memory = pynvml.nvmlDeviceGetMemoryInfo(gpu, version=pynvml.nvmlMemory_v2)
assert (mine["memory_used_bytes"], mine["memory_total_bytes"]) == (memory.used, memory.total)
assert mine["temperature_c"] == pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU)
assert mine["memory_clock_mhz"] == pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_MEM)
assert mine["ecc_uncorrected_volatile"] == pynvml.nvmlDeviceGetTotalEccErrors(gpu, 1, 0) == 5
assert mine["pci_bus_id"] == pynvml.nvmlDeviceGetPciInfo(gpu).busId
assert mine["pcie_rx_kib_s"] == pynvml.nvmlDeviceGetPcieThroughput(gpu, pynvml.NVML_PCIE_UTIL_RX_BYTES)
theirs = pynvml.nvmlDeviceGetComputeRunningProcesses(gpu)
found = [(p["pid"], p["used_memory_bytes"]) for p in mine["processes"]]
assert found == [(p.pid, p.usedGpuMemory) for p in theirs]
assert len(theirs) == 40
"""
    result = run_python("-c", script, settings="ecc_corrected=4;ecc_uncorrected=5;processes=40")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("code", [2, 3, 4, 13, 25])
@pytest.mark.parametrize(
    ("function", "keys"),
    [
        ("nvmlDeviceGetUtilizationRates", ["gpu_utilization_percent", "memory_utilization_percent"]),
        ("nvmlDeviceGetPowerUsage", ["power_w"]),
        ("nvmlDeviceGetTotalEnergyConsumption", ["energy_j"]),
    ],
)
def test_a_reading_that_is_refused_is_none_and_the_rest_is_there(
    function: str, keys: list[str], code: int
) -> None:
    record = first(f"gpus=1;fail={function}:{code}")
    assert [key for key in (*CHANGING, *LINKS) if record[key] is None] == keys
    assert "error" not in record


ALL_CALLS = {
    "nvmlDeviceGetMemoryInfo_v2:3+nvmlDeviceGetMemoryInfo": ["memory_used_bytes"],
    "nvmlDeviceGetTemperature:3+nvmlDeviceGetTemperatureV": ["temperature_c"],
    "nvmlDeviceGetClockInfo": ["sm_clock_mhz", "memory_clock_mhz"],
    "nvmlDeviceGetCurrentClocksEventReasons:3+nvmlDeviceGetCurrentClocksThrottleReasons": [
        "throttle_reasons"
    ],
    "nvmlDeviceGetTotalEccErrors": ["ecc_corrected_volatile", "ecc_uncorrected_volatile"],
    "nvmlDeviceGetComputeRunningProcesses_v3": ["processes"],
    "nvmlDeviceGetPcieThroughput": ["pcie_tx_kib_s", "pcie_rx_kib_s"],
    "nvmlDeviceGetNvLinkState": ["nvlink_links_active"],
    "nvmlDeviceGetFieldValues": ["nvlink_tx_kib", "nvlink_rx_kib"],
}


@pytest.mark.parametrize("functions", ALL_CALLS)
def test_each_call_may_be_unsupported_by_itself(functions: str) -> None:
    record = first(f"gpus=1;fail={functions}:3")
    assert [key for key in (*CHANGING, *LINKS) if record[key] is None] == ALL_CALLS[functions]


def test_an_older_driver_is_read_through_its_own_functions() -> None:
    missing = (
        "nvmlDeviceGetMemoryInfo_v2",
        "nvmlDeviceGetCurrentClocksEventReasons",
        "nvmlDeviceGetTemperatureV",
        "nvmlDeviceGetFieldValues",
    )
    record = first("gpus=1;throttle=1", library=built(*missing))
    assert record["memory_used_bytes"] == 20 * GIB + GIB // 2, "version 1 counts what the driver reserves"
    assert record["throttle_reasons"] == ["gpu_idle"]
    assert record["temperature_c"] == 60
    assert record["nvlink_tx_kib"] is None


def test_a_driver_without_the_old_temperature_call() -> None:
    assert first("gpus=1", library=built("nvmlDeviceGetTemperature"))["temperature_c"] == 60


CALLS = """
import sys
import pynvml
from r1hpc.telemetry.gpu.nvml import open_nvml
device = open_nvml().devices[0]
counts = []
for _ in range(3):
    before = pynvml.nvmlLib.r1hpc_nvml_stub_calls(0)
    device.sample(links=True)
    counts.append(pynvml.nvmlLib.r1hpc_nvml_stub_calls(0) - before)
print(*counts)
"""


@pytest.mark.parametrize(
    ("fault", "fewer"),
    [
        ("nvmlDeviceGetPowerUsage:3", 1),
        ("nvmlDeviceGetTotalEccErrors:4", 2),
        # First version 2, then version 1 with its answer, then version 1 alone.
        ("nvmlDeviceGetMemoryInfo_v2:25", 1),
        # 10 is a timeout: the next tick may do better.
        ("nvmlDeviceGetPowerUsage:10", 0),
        ("nvmlDeviceGetPowerUsage:999", 0),
    ],
)
def test_what_a_device_does_not_have_is_asked_for_once(fault: str, fewer: int) -> None:
    result = run_python("-c", CALLS, settings=f"gpus=1;links=2;fail={fault}")
    once, again, later = map(int, result.stdout.split())
    assert (once - again, again - later) == (fewer, 0)


def test_a_passing_failure_costs_one_reading_only() -> None:
    ticks = sample("gpus=1;fail=nvmlDeviceGetPowerUsage:10", ticks=2)["ticks"]
    assert [tick[0]["power_w"] for tick in ticks] == [None, None]
    assert all("error" not in tick[0] for tick in ticks)


def test_a_lost_gpu_is_noted_and_the_others_go_on() -> None:
    ticks = sample("gpus=2;0.lost_after=90;links=2", ticks=10)["ticks"]
    assert "error" not in ticks[0][0]
    assert ticks[0][0]["power_w"] is not None
    assert ticks[-1][0]["error"] == "gpu is lost"
    assert all(ticks[-1][0][key] is None for key in (*CHANGING, *LINKS))
    assert "error" not in ticks[-1][1]
    assert ticks[-1][1]["power_w"] is not None


def test_a_gpu_lost_before_the_start_is_named() -> None:
    found = sample("gpus=3;1.handle_error=15")
    assert found["notes"] == ["GPU 1 cannot be opened: gpu is lost"]
    assert [gpu["index"] for gpu in found["static"]] == [0, 2]


def test_a_gpu_that_needs_a_reset() -> None:
    assert first("gpus=1;fail=nvmlDeviceGetUtilizationRates:16")["error"] == "gpu needs a reset"


def test_nvml_shut_down_by_somebody_else_is_an_error_of_the_record() -> None:
    script = """
import pynvml
from r1hpc.telemetry.gpu.nvml import open_nvml
nvml = open_nvml()
pynvml.nvmlShutdown()
print(nvml.devices[0].sample()["error"])
"""
    result = run_python("-c", script)
    assert result.stdout.strip() == "nvml was shut down by another part of this process"


def test_an_energy_counter_that_fell_is_marked() -> None:
    ticks = sample("gpus=1;energy_reset_at=2", ticks=4)["ticks"]
    assert [tick[0]["energy_j"] for tick in ticks] == [1_000_000.0, 1_000_300.0, 0.0, 300.0]
    assert [tick[0].get("energy_reset") for tick in ticks] == [None, None, True, None]


@pytest.mark.parametrize("races", [0, 1, 2, 3, 5])
def test_processes_that_outgrow_the_buffer_while_it_is_sized(races: int) -> None:
    processes = first(f"gpus=1;processes=17;race={races}")["processes"]
    assert len(processes) >= 10
    assert [each["pid"] for each in processes] == list(range(1000, 1000 + len(processes)))


def test_processes_that_keep_outgrowing_the_buffer_are_none_this_time() -> None:
    ticks = sample("gpus=1;race=6", ticks=2)["ticks"]
    assert ticks[0][0]["processes"] is None
    assert len(ticks[1][0]["processes"]) > 16


def test_no_process_is_an_empty_list() -> None:
    assert first("gpus=1;processes=0")["processes"] == []


def test_no_nvlink() -> None:
    record = first("gpus=1;links=0")
    assert (record["nvlink_links_active"], record["nvlink_tx_kib"]) == (None, None)
    assert record["pcie_tx_kib_s"] == 1000


def test_a_card_in_mig_mode_has_no_utilisation() -> None:
    record = first("gpus=1;mig=1")
    assert record["gpu_utilization_percent"] is None
    assert record["power_w"] == 300.0


def test_a_mig_instance_reads_its_own_memory() -> None:
    uuid = "MIG-000000a1-57ab-4000-8000-000000000001"
    found = sample("gpus=2;mig=1", CUDA_VISIBLE_DEVICES=uuid)
    assert [(gpu["uuid"], gpu["index"], gpu["memory_total_bytes"]) for gpu in found["static"]] == [
        (uuid, None, 10 * GIB)
    ]
    record = found["ticks"][0][0]
    assert record["memory_used_bytes"] == 3 * GIB
    assert len(record["processes"]) == 1
    assert (record["gpu_utilization_percent"], record["power_w"]) == (None, None)
    assert "error" not in record


def test_a_mig_instance_that_is_not_there_is_noted() -> None:
    found = sample("gpus=1", CUDA_VISIBLE_DEVICES="MIG-1234")
    assert found["static"] == []
    assert found["notes"] == ["MIG-1234 of CUDA_VISIBLE_DEVICES cannot be opened; it is not sampled"]


def uuids(settings: str, visible: str) -> list[str]:
    """The last two characters of the UUIDs sampled."""
    return [gpu["uuid"][-2:] for gpu in sample(settings, CUDA_VISIBLE_DEVICES=visible)["static"]]


def test_uuids_count_not_indices() -> None:
    assert uuids("gpus=4;order=reversed", "0,3") == ["03", "00"]
    assert uuids("gpus=4;order=reversed", "GPU-000000a0-57ab-4000-8000-000000000000") == ["00"]


def test_a_gpu_of_another_job_is_not_counted() -> None:
    assert uuids("gpus=4;0.handle_error=4;1.handle_error=4", "0,1") == ["02", "03"]
    assert sample("gpus=2;0.handle_error=4")["notes"] == []


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ("init_error=9", "the nvidia kernel module is not loaded"),
        ("init_error=18", "the library and the kernel module are of different versions"),
        ("init_error=4", "no permission to use the driver"),
        ("init_error=999", "nvmlInit says Unknown Error"),
    ],
)
def test_a_driver_that_does_not_start_is_one_plain_sentence(settings: str, reason: str) -> None:
    result = run_python("-c", _OPEN, settings=settings)
    assert result.stdout == f"no NVIDIA driver on this node: {reason}; GPU metrics are off\n"


def test_no_library_is_one_plain_sentence(tmp_path: Path) -> None:
    (tmp_path / LIBRARY).touch()  # hides the real one where there is one
    result = run_python("-c", _OPEN, library=tmp_path)
    message = "no NVIDIA driver on this node: libnvidia-ml.so.1 not found; GPU metrics are off"
    assert result.stdout == f"{message}\n"


def test_throttle_reasons_have_nvml_s_names() -> None:
    import pynvml

    names = {
        "gpu_idle": pynvml.nvmlClocksEventReasonGpuIdle,
        "applications_clocks_setting": pynvml.nvmlClocksEventReasonApplicationsClocksSetting,
        "sw_power_cap": pynvml.nvmlClocksEventReasonSwPowerCap,
        "hw_slowdown": pynvml.nvmlClocksThrottleReasonHwSlowdown,
        "sync_boost": pynvml.nvmlClocksEventReasonSyncBoost,
        "sw_thermal_slowdown": pynvml.nvmlClocksEventReasonSwThermalSlowdown,
        "hw_thermal_slowdown": pynvml.nvmlClocksThrottleReasonHwThermalSlowdown,
        "hw_power_brake_slowdown": pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown,
        "display_clock_setting": pynvml.nvmlClocksEventReasonDisplayClockSetting,
    }
    for name, bit in names.items():
        assert throttle_names(bit) == [name]
    assert throttle_names(0) == []
    assert throttle_names(0x804) == ["sw_power_cap", "0x800"]


@pytest.mark.gpu
def test_a_real_gpu_reads_plausibly() -> None:
    try:
        nvml = open_nvml()
    except NoDriverError as error:
        pytest.skip(str(error))
    assert nvml.source == "nvml"
    for device in nvml.devices:
        reading = device.static() | device.sample(links=True)
        assert reading["uuid"].startswith(("GPU-", "MIG-"))
        assert "error" not in reading
        assert reading["memory_used_bytes"] is not None
        assert reading["memory_total_bytes"] is not None
        assert 0 <= reading["memory_used_bytes"] <= reading["memory_total_bytes"]
        assert reading["power_w"] is None or 0 < reading["power_w"] < 2000
        assert reading["temperature_c"] is None or 0 < reading["temperature_c"] < 120
    nvml.close()
