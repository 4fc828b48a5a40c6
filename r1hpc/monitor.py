"""Show the GPUs of this node now, or record them until stopped.

    python -m r1hpc.monitor                   # a table every second, until Ctrl-C
    python -m r1hpc.monitor --once --json     # one reading of everything, as one JSON object
    python -m r1hpc.monitor --out gpu.jsonl   # a line per second into a file, until SIGTERM, Ctrl-C

Training already records a job's own GPUs. This command needs no run; it reads the GPUs in
CUDA_VISIBLE_DEVICES, or all. "-" means that the GPU does not have that reading.
"""

import logging
import signal
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1hpc.base.cli import ArgumentParser, print_json, run_command
from r1hpc.base.errors import R1hpcError, UsageError
from r1hpc.base.names import printable
from r1hpc.base.tables import format_table
from r1hpc.base.units import format_bytes

if TYPE_CHECKING:  # --help must be quick
    from r1hpc.telemetry.gpu.nvml import Nvml
    from r1hpc.telemetry.gpu.reading import GpuReading

_HEADINGS = ("GPU", "UUID", "name", "util", "memory", "power", "temp", "SM clock", "slowed by", "processes")
_ANY_WIDTH = 1000
"""Process names are never cut off."""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    from r1hpc.telemetry.gpu.sampler import MIN_PERIOD_S

    if not MIN_PERIOD_S <= arguments.period <= 3600:
        raise UsageError(
            f"--period {arguments.period:g} is not between {MIN_PERIOD_S} and 3600 seconds; "
            "NVML renews its readings about twice a second"
        )
    if arguments.json and not (arguments.once or arguments.out):
        raise UsageError("--json prints one object: add --once for a reading, or --out FILE for a summary")
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    if arguments.out:
        return _record(arguments, stopping)
    return _show(arguments, stopping)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m r1hpc.monitor", description=__doc__)
    parser.add_argument("--period", type=float, default=1.0, metavar="S", help="seconds between readings (1)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="append readings to FILE instead of showing them"
    )
    parser.add_argument("--once", action="store_true", help="read once and exit")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser


def _show(arguments: Any, stopping: threading.Event) -> int:
    from r1hpc.telemetry.gpu.nvml import open_nvml

    nvml = open_nvml()
    while True:
        readings = [device.read(links=arguments.json) for device in nvml.devices]
        if arguments.json:
            print_json(_as_json(nvml, readings))
        else:
            table = format_table(_HEADINGS, [_row(reading) for reading in readings], width=_ANY_WIDTH)
            print("\n".join([*_title(nvml), table]), flush=True)
        if arguments.once or stopping.wait(arguments.period):
            break
    nvml.close()
    return 0


def _record(arguments: Any, stopping: threading.Event) -> int:
    from r1hpc.telemetry.gpu.sampler import GpuSampler
    from r1hpc.telemetry.gpu.summary import summarise

    # The command prints the sampler's log message itself, once.
    logging.getLogger("r1hpc.telemetry.gpu.sampler").addHandler(logging.NullHandler())
    sampler = GpuSampler(arguments.out, _node(), attempt=0, period_s=arguments.period)
    message = sampler.open() if arguments.once else sampler.start()
    if message is None and arguments.once:
        sampler.tick()
    while message is None and not arguments.once and not stopping.wait(arguments.period):
        message = sampler.message
    sampler.stop()
    if message is not None:
        raise R1hpcError(message)
    if arguments.json:
        print_json(summarise(arguments.out))
    return 0


def _as_json(nvml: "Nvml", readings: "Sequence[GpuReading]") -> dict[str, Any]:
    return {
        "time": time.time(),
        "node": _node(),
        "source": nvml.source,
        "driver": nvml.driver,
        "notes": nvml.notes,
        "gpus": [asdict(reading) for reading in readings],
    }


def _node() -> str:
    return socket.gethostname().split(".")[0]


def _title(nvml: "Nvml") -> list[str]:
    source = " (source=stub: a test library, these numbers mean nothing)" if nvml.source == "stub" else ""
    title = f"{_node()}, {time.strftime('%Y-%m-%d %H:%M:%S')}, driver {printable(nvml.driver)}{source}"
    return [title, *(f"note: {note}" for note in nvml.notes)]


def _row(reading: "GpuReading") -> tuple[str, ...]:
    return (
        _cell(reading.index),
        reading.uuid,
        reading.name or "-",
        _cell(reading.gpu_utilization_percent, " %"),
        f"{_size(reading.memory_used_bytes)} of {_size(reading.memory_total_bytes)}",
        f"{_cell(reading.power_w, ' W')} of {_cell(reading.power_limit_w, ' W')}",
        _cell(reading.temperature_c, " C"),
        _cell(reading.sm_clock_mhz, " MHz"),
        reading.error or ", ".join(reading.throttle_reasons or ()) or "-",
        "-" if reading.processes is None else ",".join(str(each.pid) for each in reading.processes),
    )


def _cell(value: float | None, unit: str = "") -> str:
    return "-" if value is None else f"{value:.0f}{unit}"


def _size(value: int | None) -> str:
    return "-" if value is None else format_bytes(value)


if __name__ == "__main__":
    run_command(main)
