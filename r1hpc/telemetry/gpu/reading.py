"""Define the readings of a GPU: the fields of a sample, their units and their meaning."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class GpuProcess:
    """A process with a CUDA context; `pid` is the host's, which may differ inside a container."""

    pid: int
    used_memory_bytes: int | None


@dataclass(frozen=True)
class GpuReading:
    """The readings of one GPU at one moment. None: not available on this GPU, driver or for this user."""

    uuid: str
    index: int | None
    name: str | None
    pci_bus_id: str | None
    memory_total_bytes: int | None
    power_limit_w: float | None
    gpu_utilization_percent: int | None
    memory_utilization_percent: int | None
    memory_used_bytes: int | None
    """Without the driver's reserve, like nvidia-smi; drivers before 510 include it."""
    power_w: float | None
    """The full card's, also for a MIG instance, if NVML reports it at all (slurm-job-exporter#55)."""
    energy_j: float | None
    """Since the driver was loaded."""
    temperature_c: int | None
    sm_clock_mhz: int | None
    memory_clock_mhz: int | None
    throttle_reasons: tuple[str, ...] | None
    ecc_corrected_volatile: int | None
    """Memory errors since the driver was loaded; None with ECC off."""
    ecc_uncorrected_volatile: int | None
    processes: tuple[GpuProcess, ...] | None
    pcie_tx_kib_s: int | None = None
    """Over the 20 ms of the call itself. nvml.h says KB/s without defining the kilo."""
    pcie_rx_kib_s: int | None = None
    nvlink_links_active: int | None = None
    nvlink_tx_kib: int | None = None
    """Payload over all links, a counter that grows."""
    nvlink_rx_kib: int | None = None
    energy_reset: bool = False
    """The energy counter fell since the last reading: the driver was reloaded."""
    error: str | None = None
    """Why the readings stop here, such as "gpu is lost"."""

    @staticmethod
    def of_record(record: Mapping[str, Any]) -> "GpuReading":
        """Make it from plain values: the result of `asdict`, or a device's record with its static fields."""
        processes, reasons = record["processes"], record["throttle_reasons"]
        return GpuReading(
            **{
                **record,
                "processes": None if processes is None else tuple(GpuProcess(**each) for each in processes),
                "throttle_reasons": None if reasons is None else tuple(reasons),
            }
        )


STATIC = ("uuid", "index", "name", "pci_bus_id", "memory_total_bytes", "power_limit_w")
LINKS = ("pcie_tx_kib_s", "pcie_rx_kib_s", "nvlink_links_active", "nvlink_tx_kib", "nvlink_rx_kib")
CHANGING = tuple(
    field.name for field in fields(GpuReading) if field.name not in (*STATIC, *LINKS, "energy_reset", "error")
)

# nvml.h, nvmlClocksEventReason* and nvmlClocksThrottleReason*. The first two are normal, not slow-downs.
_THROTTLE_REASONS = {
    0x1: "gpu_idle",
    0x2: "applications_clocks_setting",
    0x4: "sw_power_cap",
    0x8: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal_slowdown",
    0x40: "hw_thermal_slowdown",
    0x80: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
    0x200: "board_limit",
    0x400: "reliability",
}


@functools.cache
def throttle_names(mask: int) -> list[str]:
    """Return the names of the bits of `mask`, unknown ones as "0x800". A shared list: do not change it."""
    return [
        _THROTTLE_REASONS.get(1 << bit, hex(1 << bit)) for bit in range(mask.bit_length()) if mask >> bit & 1
    ]
