"""Time the GPU sampler on a training node: CPU of its process, eight stub GPUs, once a second.

    python benchmarks/monitor.py [--seconds 60] [--ticks 2000]      # 60 s of each, 2 min 15 s in all

The peer is a bare nvidia-ml-py loop: eight readings of each GPU, handles made once, nothing written. The
sampler takes every reading it knows (also those of PCIe and NVLink, every tick) and writes them. Both take
turns in one process. The stub library answers at once, so this is the cost of our code and of ctypes; what
a real driver spends in a call comes on top of both and is not measured here.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NUM_GPUS = 8
TARGET_PERCENT = 0.2
ROUNDS = 6


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60, help="of each at 1 Hz (60)")
    parser.add_argument("--ticks", type=int, default=2000, help="of each back to back (2000)")
    parser.add_argument("--on-stub", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.on_stub:
        return measure(arguments.seconds / ROUNDS, max(1, arguments.ticks // ROUNDS))
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "LD_LIBRARY_PATH": folder,
            "R1HPC_NVML_STUB": f"gpus={NUM_GPUS}",
        }
        environment.pop("CUDA_VISIBLE_DEVICES", None)
        subprocess.run(
            [sys.executable, "-m", "tests.nvml_stub", folder], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
        )
        # The loader reads LD_LIBRARY_PATH when a process starts.
        again = [sys.executable, __file__, *sys.argv[1:], "--on-stub"]
        return subprocess.run(again, env=environment, check=False).returncode


def measure(seconds: float, ticks: int) -> int:
    """Print both costs, at 1 Hz and back to back; 1 if the sampler misses its target."""
    from r1hpc.telemetry.gpu.sampler import GpuSampler

    bare = bare_loop()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gpu.jsonl"

        def sampler() -> GpuSampler:
            return GpuSampler(path, "node", attempt=0, link_every=1)

        once = sampler()
        once.open()
        warm = alternate(lambda: per_tick(once.tick, ticks), lambda: per_tick(bare, ticks))
        bytes_per_tick = path.stat().st_size / (ticks * ROUNDS)
        once.close()
        hertz = alternate(lambda: at_1_hz(sampler(), seconds), lambda: at_1_hz(Loop(bare), seconds))
    print(f"{NUM_GPUS} stub GPUs                sampler      bare loop   ratio")
    print(row("back to back, us per tick", warm[0] * 1e6, warm[1] * 1e6))
    print(row("at 1 Hz, % of one core", hertz[0] * 100, hertz[1] * 100))
    met = hertz[0] * 100 <= TARGET_PERCENT
    verdict = "met" if met else "missed"
    print(f"target {TARGET_PERCENT} % of a core: {verdict}; {bytes_per_tick:.0f} bytes a tick")
    return 0 if met else 1


def row(what: str, ours: float, theirs: float) -> str:
    """A line of the table."""
    return f"{what:26}{ours:10.4g}   {theirs:10.4g}   {ours / theirs:6.2f}"


def bare_loop() -> Callable[[], None]:
    """Eight readings of each GPU as nvidia-ml-py's user would take them."""
    import pynvml

    pynvml.nvmlInit()
    handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]

    def tick() -> None:
        for handle in handles:
            pynvml.nvmlDeviceGetUtilizationRates(handle)
            pynvml.nvmlDeviceGetMemoryInfo(handle)
            pynvml.nvmlDeviceGetPowerUsage(handle)
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
            pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)
            pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)
            pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM)
            pynvml.nvmlDeviceGetTotalEccErrors(handle, 1, pynvml.NVML_VOLATILE_ECC)

    return tick


class Loop:
    """Ticks once a second in a thread, as the sampler does."""

    def __init__(self, tick: Callable[[], None]) -> None:
        self._tick = tick
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stopping.is_set():
            self._tick()
            due += 1.0
            self._stopping.wait(due - time.monotonic())


def alternate(ours: Callable[[], float], theirs: Callable[[], float]) -> tuple[float, float]:
    """The mean of each over ROUNDS turns."""
    costs = [(ours(), theirs()) for _ in range(ROUNDS)]
    return sum(mine for mine, _ in costs) / ROUNDS, sum(peer for _, peer in costs) / ROUNDS


def per_tick(tick: Callable[[], None], ticks: int) -> float:
    """CPU seconds of a tick among many: caches warm."""
    start = time.process_time()
    for _ in range(ticks):
        tick()
    return (time.process_time() - start) / ticks


def at_1_hz(loop: Any, seconds: float) -> float:
    """Share of one core that the whole process takes while `loop` runs, its start and end included."""
    start, begun = time.process_time(), time.monotonic()
    loop.start()
    time.sleep(seconds)
    loop.stop()
    return (time.process_time() - start) / (time.monotonic() - begun)


if __name__ == "__main__":
    sys.exit(main())
