"""Read GPUs through NVML: which ones this process may watch, and their readings.

Nothing else uses NVML. Each call releases the interpreter lock, so a hanging driver cannot hold up the
training loop.

What the numbers mean (nvml.h unless named): utilisation is the share of the last 1/6 to 1 s in which at
least one kernel ran, so 100 % is not the same as busy; power is a 1 s mean, on A100 an instantaneous value;
A100 and H100 sensors sample a quarter of the time (arXiv 2312.02741).

>>> select_visible(["GPU-aa", "GPU-bb"], "1")
(('GPU-bb',), None)
>>> select_visible(["GPU-aa", "GPU-bb"], "GPU-a,9")
(('GPU-aa',), "CUDA_VISIBLE_DEVICES names '9', which is no GPU here; CUDA ignores it and what follows")
"""

import functools
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pynvml

from r1hpc.base.errors import R1hpcError
from r1hpc.base.names import printable

_ALL_LINKS = 0xFFFFFFFF
_TRIES = 3
"""Processes start between the call that sizes the buffer and the one that fills it."""
_NO_DRIVER = {
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: "libnvidia-ml.so.1 not found",
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: "the nvidia kernel module is not loaded",
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "the library and the kernel module are of different versions",
    pynvml.NVML_ERROR_NO_PERMISSION: "no permission to use the driver",
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND: "libnvidia-ml.so.1 is not NVML, or a very old one",
}
# After such an answer a device answers nothing else in this tick.
_DEVICE_ERRORS = {
    pynvml.NVML_ERROR_GPU_IS_LOST: "gpu is lost",
    pynvml.NVML_ERROR_RESET_REQUIRED: "gpu needs a reset",
    pynvml.NVML_ERROR_UNINITIALIZED: "nvml was shut down by another part of this process",
}
# Asking again cannot change these answers. MIG instances answer INVALID_ARGUMENT if they lack a reading.
_NEVER = {
    pynvml.NVML_ERROR_NOT_SUPPORTED,
    pynvml.NVML_ERROR_NO_PERMISSION,
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
    pynvml.NVML_ERROR_INVALID_ARGUMENT,
    pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
    pynvml.NVML_ERROR_DEPRECATED,
}
STATIC = ("uuid", "index", "name", "pci_bus_id", "memory_total_bytes", "power_limit_w")
CHANGING = (
    "gpu_utilization_percent",
    "memory_utilization_percent",
    "memory_used_bytes",  # without the driver's reserve, like nvidia-smi; drivers before 510 include it
    "power_w",  # the full card's, also for a MIG instance, if NVML reports it at all (slurm-job-exporter#55)
    "energy_j",  # since the driver was loaded
    "temperature_c",
    "sm_clock_mhz",
    "memory_clock_mhz",
    "throttle_reasons",
    "ecc_corrected_volatile",  # errors since the driver was loaded; None with ECC off
    "ecc_uncorrected_volatile",
    "processes",  # [{pid, used_memory_bytes}]; the host's pid, which may differ inside a container
)
LINKS = (
    "pcie_tx_kib_s",  # over the 20 ms of the call itself; nvml.h says KB/s without defining the kilo
    "pcie_rx_kib_s",
    "nvlink_links_active",
    "nvlink_tx_kib",  # payload over all links, a counter that grows
    "nvlink_rx_kib",
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
_Record = dict[str, Any]
_Take = Callable[[Any], _Record]
"""Ask the device of a handle for some of its readings; pynvml.NVMLError if it has none."""


def select_visible(uuids: Sequence[str], visible: str | None) -> tuple[tuple[str, ...], str | None]:
    """Return the UUIDs of the GPUs a job sees, in CUDA's order, and what is odd about the list, if anything.

    Entries are indices, UUIDs or unique beginnings of UUIDs; MIG entries are passed on unchanged. As in CUDA
    (programming guide, "CUDA environment variables") the list ends at the first entry that names no GPU. None
    (not set) selects all.

    Doubt: an index is read as a position in NVML's order of the GPUs this process may open. Under Slurm's
    ConstrainDevices both orders count inside the cgroup, and equal GPUs are in PCI order in both. On a node
    of mixed models CUDA counts the fastest first unless CUDA_DEVICE_ORDER=PCI_BUS_ID; use UUIDs there.
    """
    if visible is None:
        return tuple(uuids), None
    chosen: list[str] = []
    for entry in filter(None, (part.strip() for part in visible.split(","))):
        uuid = _find(uuids, entry)
        if uuid is None:
            return tuple(chosen), (
                f"CUDA_VISIBLE_DEVICES names {printable(entry)!r}, which is no GPU here; "
                "CUDA ignores it and what follows"
            )
        if uuid not in chosen:
            chosen.append(uuid)
    return tuple(chosen), None


def _find(uuids: Sequence[str], entry: str) -> str | None:
    if entry.startswith("MIG-"):
        return entry
    if entry.isascii() and entry.isdigit():
        return uuids[int(entry)] if int(entry) < len(uuids) else None
    found = [uuid for uuid in uuids if uuid.startswith(entry)]
    return found[0] if len(found) == 1 else None


class NoDriverError(R1hpcError):
    """This node has no NVIDIA driver that NVML can use."""


class Device:
    """One GPU or MIG instance. Remembers which readings it lacks, and asks for them once."""

    def __init__(self, handle: Any, uuid: str, index: int | None) -> None:
        self._handle = handle
        self.uuid = uuid
        self.index = index
        self.name = _ask(pynvml.nvmlDeviceGetName, handle)
        pci = _ask(pynvml.nvmlDeviceGetPciInfo_v3, handle)
        self.pci_bus_id: str | None = pci and pci.busId
        memory = _ask(pynvml.nvmlDeviceGetMemoryInfo, handle)
        self.memory_total_bytes: int | None = memory and memory.total
        limit = _ask(pynvml.nvmlDeviceGetEnforcedPowerLimit, handle)
        self.power_limit_w: float | None = limit and limit / 1000
        self._ways = [[*ways] for ways in _CHANGING_WAYS]
        self._link_ways = [[*ways] for ways in (*_LINK_WAYS, (_nvlinks(handle),))]
        self._blank: _Record = {"uuid": uuid, **dict.fromkeys(CHANGING)}
        self._last_energy_j = 0.0

    def static(self) -> _Record:
        """Return the fields in STATIC, which do not change while the driver stays."""
        return {name: getattr(self, name) for name in STATIC}

    def sample(self, links: bool = False) -> _Record:
        """Return the UUID and the changing readings, JSON-ready; with `links` those of PCIe and NVLink too.

        Only when they apply: `energy_reset`, the counter fell because the driver was reloaded; `error`, why
        the readings stop here, such as "gpu is lost". `links` costs 40 ms on real hardware. Never raises.
        """
        record = self._blank.copy()
        self._fill(record, self._ways)
        if links:
            record.update(dict.fromkeys(LINKS))
            if "error" not in record:
                self._fill(record, self._link_ways)
        energy = record["energy_j"]
        if energy is not None:
            if energy < self._last_energy_j:
                record["energy_reset"] = True
            self._last_energy_j = energy
        return record

    def _fill(self, record: _Record, readings: list[list[_Take]]) -> None:
        """Fill `record`, and forget the ways of asking that this device never answers."""
        for ways in readings:
            while ways:
                try:
                    record |= ways[0](self._handle)
                except pynvml.NVMLError as error:
                    if error.value in _NEVER:
                        del ways[0]
                        continue
                    if error.value in _DEVICE_ERRORS:
                        record["error"] = _DEVICE_ERRORS[error.value]
                        return
                break


class Nvml:
    """An open NVML with the GPUs to watch. `source` is "stub" on the test library, else "nvml"."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.driver = _ask(pynvml.nvmlSystemGetDriverVersion) or "unknown"
        is_stub = hasattr(pynvml.nvmlLib, "r1hpc_nvml_stub") or self.driver.startswith("stub")
        self.source = "stub" if is_stub else "nvml"
        handles, self.notes = _handles()
        chosen, odd = select_visible([*handles], environ.get("CUDA_VISIBLE_DEVICES"))
        if odd:
            self.notes.append(odd)
        devices = []
        for uuid in chosen:
            index, handle = handles.get(uuid) or (None, _ask(pynvml.nvmlDeviceGetHandleByUUID, uuid.encode()))
            if handle is None:
                self.notes.append(f"{uuid} of CUDA_VISIBLE_DEVICES cannot be opened; it is not sampled")
            else:
                devices.append(Device(handle, uuid, index))
        self.devices = tuple(devices)

    def close(self) -> None:
        """Release NVML. Other users of it in this process keep it (NVML counts them)."""
        _ask(pynvml.nvmlShutdown)


def open_nvml(environ: Mapping[str, str] = os.environ) -> Nvml:
    """Open NVML on the GPUs that `environ`'s CUDA_VISIBLE_DEVICES names, or on all (see select_visible).

    Raise NoDriverError if there is no driver here; its message is one plain sentence.
    """
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        why = _NO_DRIVER.get(error.value, f"nvmlInit says {error}")
        raise NoDriverError(f"no NVIDIA driver on this node: {why}; GPU metrics are off") from None
    return Nvml(environ)


def _handles() -> tuple[dict[str, tuple[int, Any]], list[str]]:
    """Return {UUID: (NVML index, handle)} of the GPUs that open, in NVML's order, and why others do not."""
    found: dict[str, tuple[int, Any]] = {}
    notes: list[str] = []
    for index in range(_ask(pynvml.nvmlDeviceGetCount) or 0):
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            found[pynvml.nvmlDeviceGetUUID(handle)] = (index, handle)
        except pynvml.NVMLError as error:
            # Slurm's cgroup denies the GPUs of other jobs: nothing to report.
            if error.value != pynvml.NVML_ERROR_NO_PERMISSION:
                notes.append(f"GPU {index} cannot be opened: {_DEVICE_ERRORS.get(error.value, error)}")
    return found, notes


def _ask(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except pynvml.NVMLError:
        return None


def _value(
    key: str, name: str, *arguments: int, read: Callable[[Any], Any] | None = None, **options: Any
) -> _Take:
    """Return the way of asking for one reading by pynvml's function of that name; `read` converts it."""
    function = getattr(pynvml, name)

    def take(handle: Any) -> _Record:
        value = function(handle, *arguments, **options)
        return {key: value if read is None else read(value)}

    return take


def _from_milli(value: int) -> float:
    return value / 1000


def _utilization(handle: Any) -> _Record:
    rates = pynvml.nvmlDeviceGetUtilizationRates(handle)
    return {"gpu_utilization_percent": rates.gpu, "memory_utilization_percent": rates.memory}


@functools.cache
def throttle_names(mask: int) -> list[str]:
    """Return the names of the bits of `mask`, unknown ones as "0x800". A shared list: do not change it."""
    return [
        _THROTTLE_REASONS.get(1 << bit, hex(1 << bit)) for bit in range(mask.bit_length()) if mask >> bit & 1
    ]


def _processes(handle: Any) -> _Record:
    for attempt in range(_TRIES):
        try:
            found = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
            break
        except pynvml.NVMLError as error:
            if error.value != pynvml.NVML_ERROR_INSUFFICIENT_SIZE or attempt + 1 == _TRIES:
                raise
    return {"processes": [{"pid": each.pid, "used_memory_bytes": each.usedGpuMemory} for each in found]}


def _nvlink_traffic(handle: Any) -> _Record:
    fields = (pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX)
    sent, got = pynvml.nvmlDeviceGetFieldValues(handle, [(field, _ALL_LINKS) for field in fields])
    if code := sent.nvmlReturn or got.nvmlReturn:  # each has its own, beside the call's
        raise pynvml.NVMLError(code)
    return {"nvlink_tx_kib": sent.value.ullVal, "nvlink_rx_kib": got.value.ullVal}


def _nvlinks(handle: Any) -> _Take:
    """Count the active links among those that answer now."""
    state = pynvml.nvmlDeviceGetNvLinkState
    links = [n for n in range(pynvml.NVML_NVLINK_MAX_LINKS) if _ask(state, handle, n) is not None]

    def take(handle: Any) -> _Record:
        if not links:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return {"nvlink_links_active": sum(state(handle, link) for link in links)}

    return take


def _ecc(key: str, error_type: int) -> _Take:
    return _value(key, "nvmlDeviceGetTotalEccErrors", error_type, pynvml.NVML_VOLATILE_ECC)


def _memory(**version: Any) -> _Take:
    used = operator.attrgetter("used")
    return _value("memory_used_bytes", "nvmlDeviceGetMemoryInfo", read=used, **version)


# Read at every tick, for CHANGING; where a driver lacks the first way, the second is taken.
_CHANGING_WAYS: tuple[tuple[_Take, ...], ...] = (
    (_utilization,),
    (_memory(version=pynvml.nvmlMemory_v2), _memory()),  # drivers before 510 have the second
    (_value("power_w", "nvmlDeviceGetPowerUsage", read=_from_milli),),
    (_value("energy_j", "nvmlDeviceGetTotalEnergyConsumption", read=_from_milli),),
    # nvml.h marks the old function for removal in CUDA 14.0; drivers before 560 have no other.
    tuple(
        _value("temperature_c", name, pynvml.NVML_TEMPERATURE_GPU)
        for name in ("nvmlDeviceGetTemperature", "nvmlDeviceGetTemperatureV")
    ),
    (_value("sm_clock_mhz", "nvmlDeviceGetClockInfo", pynvml.NVML_CLOCK_SM),),
    (_value("memory_clock_mhz", "nvmlDeviceGetClockInfo", pynvml.NVML_CLOCK_MEM),),
    tuple(  # drivers before 535 have the second
        _value("throttle_reasons", f"nvmlDeviceGetCurrentClocks{kind}Reasons", read=throttle_names)
        for kind in ("Event", "Throttle")
    ),
    (_ecc("ecc_corrected_volatile", pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED),),
    (_ecc("ecc_uncorrected_volatile", pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED),),
    (_processes,),
)
# Giving LINKS, beside _nvlinks.
_LINK_WAYS: tuple[tuple[_Take, ...], ...] = (
    (_value("pcie_tx_kib_s", "nvmlDeviceGetPcieThroughput", pynvml.NVML_PCIE_UTIL_TX_BYTES),),
    (_value("pcie_rx_kib_s", "nvmlDeviceGetPcieThroughput", pynvml.NVML_PCIE_UTIL_RX_BYTES),),
    (_nvlink_traffic,),
)
