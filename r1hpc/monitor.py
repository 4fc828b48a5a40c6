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
from pathlib import Path
from typing import Any

from r1hpc.base.cli import ArgumentParser, add_json, print_json, run_command
from r1hpc.base.errors import R1hpcError, UsageError
from r1hpc.base.names import printable
from r1hpc.base.tables import ANY_WIDTH, format_table
from r1hpc.base.units import format_bytes

_HEADINGS = ("GPU", "UUID", "name", "util", "memory", "power", "temp", "SM clock", "slowed by", "processes")


def main(argv: Sequence[str]) -> int:
    parser = ArgumentParser(prog="python -m r1hpc.monitor", description=__doc__)
    parser.add_argument("--period", type=float, default=1.0, metavar="S", help="seconds between readings (1)")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--out", type=Path, metavar="FILE", help="append readings to FILE, show nothing")
    shown.add_argument("--once", action="store_true", help="read once and exit")
    add_json(parser)
    arguments = parser.parse_args(argv)
    from r1hpc.telemetry.gpu.sampler import MIN_PERIOD_S

    if not MIN_PERIOD_S <= arguments.period <= 3600:
        raise UsageError(
            f"--period {arguments.period:g} is not between {MIN_PERIOD_S} and 3600 seconds; "
            "NVML renews its readings about twice a second"
        )
    if arguments.json and not arguments.once:
        raise UsageError("--json prints one reading: add --once")
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    return _record(arguments, stopping) if arguments.out else _show(arguments, stopping)


def _show(arguments: Any, stopping: threading.Event) -> int:
    from r1hpc.telemetry.gpu.nvml import open_nvml

    nvml = open_nvml()
    while True:
        readings = [device.static() | device.sample(links=arguments.json) for device in nvml.devices]
        if arguments.json:
            about = {"node": _node(), "source": nvml.source, "driver": nvml.driver, "notes": nvml.notes}
            print_json({"time": time.time(), **about, "gpus": readings})
        else:
            stub = " (source=stub: a test library, these numbers mean nothing)" * (nvml.source == "stub")
            title = f"{_node()}, {time.strftime('%Y-%m-%d %H:%M:%S')}, driver {printable(nvml.driver)}{stub}"
            table = format_table(_HEADINGS, [_row(reading) for reading in readings], width=ANY_WIDTH)
            print("\n".join([title, *(f"note: {note}" for note in nvml.notes), table]), flush=True)
        if arguments.once or stopping.wait(arguments.period):
            break
    nvml.close()
    return 0


def _record(arguments: Any, stopping: threading.Event) -> int:
    from r1hpc.telemetry.gpu.sampler import GpuSampler

    # The command prints the sampler's message itself, once.
    logging.getLogger("r1hpc.telemetry.gpu.sampler").addHandler(logging.NullHandler())
    sampler = GpuSampler(arguments.out, _node(), attempt=0, period_s=arguments.period)
    message = sampler.start()
    while message is None and not stopping.wait(arguments.period):
        message = sampler.message
    sampler.stop()
    if message is not None:
        raise R1hpcError(message)
    return 0


def _node() -> str:
    return socket.gethostname().split(".")[0]


def _row(reading: dict[str, Any]) -> tuple[str, ...]:
    def cell(name: str, unit: str = "") -> str:
        return "-" if reading[name] is None else f"{reading[name]:.0f}{unit}"

    def size(name: str) -> str:
        return "-" if reading[name] is None else format_bytes(reading[name])

    processes = reading["processes"]
    return (
        cell("index"),
        reading["uuid"],
        reading["name"] or "-",
        cell("gpu_utilization_percent", " %"),
        f"{size('memory_used_bytes')} of {size('memory_total_bytes')}",
        f"{cell('power_w', ' W')} of {cell('power_limit_w', ' W')}",
        cell("temperature_c", " C"),
        cell("sm_clock_mhz", " MHz"),
        reading.get("error") or ", ".join(reading["throttle_reasons"] or ()) or "-",
        "-" if processes is None else ",".join(str(each["pid"]) for each in processes),
    )


if __name__ == "__main__":
    run_command(main)
