"""Read GPUs through NVML: which ones this process may watch, and their readings.

    nvml = open_nvml()                  # NoDriverError if there is none
    for device in nvml.devices:         # known by UUID
        print(device.read())
    nvml.close()

Nothing else uses NVML. nvidia-ml-py loads the library and has the structs; the calls of every tick go
straight to the library with buffers made once, because making them is most of the cost of nvidia-ml-py's own
functions. Each call releases the interpreter lock, so a hanging driver cannot hold up the training loop.

What the numbers mean (nvml.h unless named): utilisation is the share of the last 1/6 to 1 s in which at
least one kernel ran, so 100 % is not the same as busy; power is a 1 s mean, on A100 an instantaneous value;
A100 and H100 sensors sample a quarter of the time (arXiv 2312.02741).

>>> select_visible(["GPU-aa", "GPU-bb"], "1")
(('GPU-bb',), None)
>>> select_visible(["GPU-aa", "GPU-bb"], "GPU-a,9")
(('GPU-aa',), "CUDA_VISIBLE_DEVICES names '9', which is no GPU here; CUDA ignores it and what follows")
"""

import ctypes
import os
from collections.abc import Callable, Mapping, Sequence
from ctypes import byref, c_uint, c_ulonglong
from dataclasses import dataclass, replace
from typing import Any, cast

import pynvml

from r1hpc.base.errors import R1hpcError
from r1hpc.base.names import printable
from r1hpc.telemetry.gpu.reading import CHANGING, LINKS, STATIC, GpuReading, throttle_names

_ALL_LINKS = 0xFFFFFFFF
_UNKNOWN_MEMORY = 2**64 - 1
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
_Record = dict[str, Any]
_Take = Callable[[], _Record]
_Kind = type[c_uint] | type[c_ulonglong]


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


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """One NVML call with its buffers."""

    function: Callable[..., int]
    arguments: tuple[Any, ...]
    take: _Take
    """The readings left in its buffers."""
    otherwise: "_Call | None" = None
    """The call to use instead if this one never answers."""


class Device:
    """One GPU or MIG instance. Remembers which readings it lacks, and asks for them once."""

    def __init__(self, library: ctypes.CDLL, handle: Any, uuid: str, index: int | None) -> None:
        self.uuid = uuid
        self.index = index
        self.name = _text(pynvml.nvmlDeviceGetName, handle)
        pci = _ask(pynvml.nvmlDeviceGetPciInfo_v3, handle)
        self.pci_bus_id: str | None = pci and _decode(pci.busId)
        memory = _ask(pynvml.nvmlDeviceGetMemoryInfo, handle)
        self.memory_total_bytes: int | None = memory and memory.total
        limit = _ask(pynvml.nvmlDeviceGetEnforcedPowerLimit, handle)
        self.power_limit_w: float | None = limit and limit / 1000
        make = _CallMaker(library, handle)
        self._calls = make.changing()
        self._link_calls = make.links()
        self._blank: _Record = {"uuid": uuid, **dict.fromkeys(CHANGING)}
        self._last_energy_j = 0.0

    def static(self) -> _Record:
        """Return the fields in STATIC, which do not change while the driver stays."""
        return {name: getattr(self, name) for name in STATIC}

    def sample(self, links: bool = False) -> _Record:
        """Return the UUID and the changing readings, JSON-ready; with `links` those of PCIe and NVLink too.

        `energy_reset` and `error` are present only when they apply. Never raises.
        """
        record = self._blank.copy()
        self._calls = self._make_calls(self._calls, record)
        if links:
            record.update(dict.fromkeys(LINKS))
            if "error" not in record:
                self._link_calls = self._make_calls(self._link_calls, record)
        self._note_reset(record)
        return record

    def read(self, links: bool = True) -> GpuReading:
        """Return everything as a GpuReading. `links` costs 40 ms on real hardware (see pcie_tx_kib_s)."""
        return GpuReading.of_record({**self.static(), **self.sample(links)})

    def _make_calls(self, calls: list[_Call], record: _Record) -> list[_Call]:
        """Fill `record`; return the calls to make next time."""
        changes: dict[_Call, _Call | None] = {}
        for call in calls:
            answered, code = call, call.function(*call.arguments)
            while code in _NEVER:
                changes[call] = answered.otherwise
                if answered.otherwise is None:
                    break
                answered = answered.otherwise
                code = answered.function(*answered.arguments)
            if code == 0:
                record |= answered.take()
            elif code in _DEVICE_ERRORS:
                record["error"] = _DEVICE_ERRORS[code]
                break
        return [kept for call in calls if (kept := changes.get(call, call))] if changes else calls

    def _note_reset(self, record: _Record) -> None:
        energy = record["energy_j"]
        if energy is not None:
            if energy < self._last_energy_j:
                record["energy_reset"] = True
            self._last_energy_j = energy


class Nvml:
    """An open NVML with the GPUs to watch. `source` is "stub" on the test library, else "nvml"."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._library: ctypes.CDLL = pynvml.nvmlLib
        self.driver = _text(pynvml.nvmlSystemGetDriverVersion) or "unknown"
        self.source = "stub" if self._is_stub() else "nvml"
        handles, self.notes = _handles()
        chosen, odd = select_visible([*handles], environ.get("CUDA_VISIBLE_DEVICES"))
        if odd:
            self.notes.append(odd)
        self.devices = tuple(filter(None, (self._device(handles, uuid) for uuid in chosen)))

    def close(self) -> None:
        """Release NVML. Other users of it in this process keep it (NVML counts them)."""
        _ask(pynvml.nvmlShutdown)

    def _is_stub(self) -> bool:
        return hasattr(self._library, "r1hpc_nvml_stub") or self.driver.startswith("stub")

    def _device(self, handles: Mapping[str, tuple[int, Any]], uuid: str) -> Device | None:
        index, handle = handles.get(uuid) or (None, _ask(pynvml.nvmlDeviceGetHandleByUUID, uuid.encode()))
        if handle is None:
            self.notes.append(f"{uuid} of CUDA_VISIBLE_DEVICES cannot be opened; it is not sampled")
            return None
        return Device(self._library, handle, uuid, index)


def open_nvml(environ: Mapping[str, str] = os.environ) -> Nvml:
    """Open NVML on the GPUs that `environ`'s CUDA_VISIBLE_DEVICES names, or on all (see select_visible).

    Raises:
        NoDriverError: there is no driver here; its message is one plain sentence.
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
            found[_decode(pynvml.nvmlDeviceGetUUID(handle))] = (index, handle)
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


def _text(function: Callable[..., Any], *arguments: Any) -> str | None:
    value = _ask(function, *arguments)
    return None if value is None else _decode(value)


def _decode(value: bytes | str) -> str:
    # nvidia-ml-py 11 and older return bytes.
    return value.decode(errors="replace") if isinstance(value, bytes) else value


class _CallMaker:
    """Makes the calls of one device, each with its own buffers."""

    def __init__(self, library: ctypes.CDLL, handle: Any) -> None:
        self._library = library
        self._handle = handle

    def changing(self) -> list[_Call]:
        """Return the calls of every tick, giving CHANGING."""
        return [
            self._utilization(),
            self._memory(),
            self._number("power_w", "nvmlDeviceGetPowerUsage", scale=1000),
            self._number("energy_j", "nvmlDeviceGetTotalEnergyConsumption", kind=c_ulonglong, scale=1000),
            self._temperature(),
            self._number("sm_clock_mhz", "nvmlDeviceGetClockInfo", pynvml.NVML_CLOCK_SM),
            self._number("memory_clock_mhz", "nvmlDeviceGetClockInfo", pynvml.NVML_CLOCK_MEM),
            self._throttle_reasons(),
            self._ecc("ecc_corrected_volatile", pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED),
            self._ecc("ecc_uncorrected_volatile", pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED),
            self._processes(),
        ]

    def links(self) -> list[_Call]:
        """Return the calls that give LINKS."""
        return [
            self._number("pcie_tx_kib_s", "nvmlDeviceGetPcieThroughput", pynvml.NVML_PCIE_UTIL_TX_BYTES),
            self._number("pcie_rx_kib_s", "nvmlDeviceGetPcieThroughput", pynvml.NVML_PCIE_UTIL_RX_BYTES),
            self._nvlink_states(),
            self._nvlink_counters(),
        ]

    def _function(self, name: str) -> Callable[..., int]:
        try:
            return cast(Callable[..., int], getattr(self._library, name))
        except AttributeError:
            return lambda *_: int(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)

    def _call(self, name: str, *arguments: Any, take: _Take, otherwise: _Call | None = None) -> _Call:
        return _Call(self._function(name), (self._handle, *arguments), take, otherwise)

    def _number(self, key: str, name: str, *arguments: int, kind: _Kind = c_uint, scale: int = 0) -> _Call:
        box = kind()
        return self._call(
            name, *arguments, byref(box), take=lambda: {key: box.value / scale if scale else box.value}
        )

    def _ecc(self, key: str, error_type: int) -> _Call:
        name = "nvmlDeviceGetTotalEccErrors"
        return self._number(key, name, error_type, pynvml.NVML_VOLATILE_ECC, kind=c_ulonglong)

    def _utilization(self) -> _Call:
        rates = pynvml.c_nvmlUtilization_t()
        return self._call(
            "nvmlDeviceGetUtilizationRates",
            byref(rates),
            take=lambda: {
                "gpu_utilization_percent": rates.gpu,
                "memory_utilization_percent": rates.memory,
            },
        )

    def _memory(self) -> _Call:
        new, old = pynvml.c_nvmlMemory_v2_t(version=pynvml.nvmlMemory_v2), pynvml.c_nvmlMemory_t()
        before_510 = self._call(
            "nvmlDeviceGetMemoryInfo", byref(old), take=lambda: {"memory_used_bytes": old.used}
        )
        return self._call(
            "nvmlDeviceGetMemoryInfo_v2",
            byref(new),
            take=lambda: {"memory_used_bytes": new.used},
            otherwise=before_510,
        )

    def _temperature(self) -> _Call:
        box = pynvml.c_nvmlTemperature_v1_t(version=pynvml.nvmlTemperature_v1)
        # nvml.h marks the old function for removal in CUDA 14.0; drivers before 560 have no other.
        new = self._call(
            "nvmlDeviceGetTemperatureV", byref(box), take=lambda: {"temperature_c": box.temperature}
        )
        old = self._number("temperature_c", "nvmlDeviceGetTemperature", pynvml.NVML_TEMPERATURE_GPU)
        return replace(old, otherwise=new)

    def _throttle_reasons(self) -> _Call:
        mask = c_ulonglong()

        def take() -> _Record:
            return {"throttle_reasons": throttle_names(mask.value)}

        old = self._call("nvmlDeviceGetCurrentClocksThrottleReasons", byref(mask), take=take)
        return self._call("nvmlDeviceGetCurrentClocksEventReasons", byref(mask), take=take, otherwise=old)

    def _processes(self) -> _Call:
        listing = _ProcessList(self._function("nvmlDeviceGetComputeRunningProcesses_v3"), self._handle)
        return _Call(listing.read, (), listing.take)

    def _nvlink_states(self) -> _Call:
        """Count the active links among those that answer now."""
        function, active = self._function("nvmlDeviceGetNvLinkState"), c_uint()
        tries = [(self._handle, link, byref(active)) for link in range(pynvml.NVML_NVLINK_MAX_LINKS)]
        links = [arguments for arguments in tries if function(*arguments) == 0]
        count = 0

        def read() -> int:
            nonlocal count
            count = 0
            for arguments in links:
                code = function(*arguments)
                if code:
                    return code
                count += active.value
            return 0 if links else int(pynvml.NVML_ERROR_NOT_SUPPORTED)

        return _Call(read, (), lambda: {"nvlink_links_active": count})

    def _nvlink_counters(self) -> _Call:
        values = (pynvml.c_nvmlFieldValue_t * 2)()
        values[0].fieldId = pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX
        values[1].fieldId = pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX
        values[0].scopeId = values[1].scopeId = _ALL_LINKS
        function = self._function("nvmlDeviceGetFieldValues")

        def read() -> int:
            # Each value has its own return code beside the call's.
            return function(self._handle, 2, values) or values[0].nvmlReturn or values[1].nvmlReturn

        def take() -> _Record:
            return {"nvlink_tx_kib": values[0].value.ullVal, "nvlink_rx_kib": values[1].value.ullVal}

        return _Call(read, (), take)


class _ProcessList:
    """The compute processes of a device, in a buffer that grows when needed."""

    def __init__(self, function: Callable[..., int], handle: Any) -> None:
        self._function = function
        self._handle = handle
        self._count = c_uint()
        self._make_room(16)

    def _make_room(self, room: int) -> None:
        self._processes = (pynvml.c_nvmlProcessInfo_v3_t * room)()
        self._arguments = (self._handle, byref(self._count), self._processes)

    def read(self) -> int:
        """Return NVML's return code. Processes start between two calls, so it tries three times to fit."""
        for _ in range(4):
            self._count.value = len(self._processes)
            code = self._function(*self._arguments)
            if code != pynvml.NVML_ERROR_INSUFFICIENT_SIZE:
                break
            self._make_room(2 * self._count.value + 8)
        return code

    def take(self) -> _Record:
        return {
            "processes": [
                {"pid": each.pid, "used_memory_bytes": None if used == _UNKNOWN_MEMORY else used}
                for each in self._processes[: self._count.value]
                for used in (each.usedGpuMemory,)
            ]
        }
