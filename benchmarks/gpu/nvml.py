"""Read each GPU by our sampler, beside nvidia-smi a moment later."""

from benchmarks.gpu.place import Place, output
from benchmarks.gpu.table import Table
from r1hpc.base.units import GIB
from r1hpc.telemetry.gpu.nvml import NoDriverError, open_nvml

_HEADER = ("GPU", "reading", "NVML", "nvidia-smi")
_ASKED = "uuid,memory.used,power.draw,temperature.gpu,utilization.gpu,clocks.sm"


def run(place: Place) -> list[Table]:
    notes = ("Taken one after the other on a machine at rest: power and clocks move between them.",)
    return [Table("NVML and nvidia-smi", _HEADER, tuple(_rows()), notes)]


def _rows() -> list[tuple[str, ...]]:
    try:
        nvml = open_nvml()
    except NoDriverError as error:
        return [("-", "none", str(error), output("nvidia-smi", "-L") or "not here")]
    try:
        smi = _by_smi()
        return [row for device in nvml.devices for row in _of_device(device.sample(links=True), smi)]
    finally:
        nvml.close()


def _by_smi() -> dict[str, list[str]]:
    answer = output("nvidia-smi", f"--query-gpu={_ASKED}", "--format=csv,noheader,nounits")
    cells = [[cell.strip() for cell in line.split(",")] for line in answer.splitlines()]
    return {uuid: readings for uuid, *readings in cells}


def _of_device(sample: dict[str, object], smi: dict[str, list[str]]) -> list[tuple[str, ...]]:
    uuid = str(sample["uuid"])
    theirs = smi.get(uuid, ["-"] * 5)
    used = sample.get("memory_used_bytes")
    ours = {
        "memory used, MiB": f"{used / GIB * 1024:.0f}" if isinstance(used, int) else "-",
        "power, W": str(sample.get("power_w")),
        "temperature, C": str(sample.get("temperature_c")),
        "utilization, %": str(sample.get("gpu_utilization_percent")),
        "SM clock, MHz": str(sample.get("sm_clock_mhz")),
    }
    return [(uuid[:12], name, mine, other) for (name, mine), other in zip(ours.items(), theirs, strict=True)]
