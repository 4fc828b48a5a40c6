"""Time the judgement of a long attempt: CPU of `diagnose`, beside json.loads of the bytes that it reads.

    python benchmarks/diagnose.py [--hours 20] [--rounds 9]

A made attempt on two nodes of four GPUs, a reading a second. The floor parses the newest half of the budget
in the files of readings, split evenly as `diagnose` splits it, and keeps nothing; ours checks each record,
sums the GPUs up and applies every rule. Both take turns in one process; medians.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from r1hpc.base.run_dir import RunDir
from r1hpc.telemetry.diagnosis.diagnose import QUICK_BYTES, THOROUGH_BYTES, diagnose
from r1hpc.telemetry.records.attempts import read_history
from r1hpc.telemetry.records.metrics import MetricWriter
from tests.recorded import RecordedRun

NODES = ("n1", "n2")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hours", type=float, default=20, help="how long the attempt was (20)")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each (9)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = long_attempt(Path(folder) / "run", int(arguments.hours * 3600))
        total = sum(path.stat().st_size for path in made.run.metrics.iterdir())
        print(f"{total / 2**20:.0f} MiB of records")
        for name, max_bytes in (("quick", QUICK_BYTES), ("thorough", THOROUGH_BYTES)):
            measure(name, made, max_bytes, arguments.rounds)
    return 0


def long_attempt(path: Path, seconds: int) -> RecordedRun:
    made = RecordedRun(path, gpus=8, nodes=2)
    made.submit("4711", "slurm")
    made.begin()
    start = made.clock
    writer = MetricWriter(made.run, made.attempts)
    for step in range(1, seconds // 10 + 1):
        made.clock += 10
        writer.step(global_step=step, loss=2.0, mfu=0.4, time=made.clock, step_time_s=10.0, data_time_s=0.1)
    for node in NODES:
        made.gpu_ticks(start, seconds, node=node, gpus=4)
    return made


def measure(name: str, made: RecordedRun, max_bytes: int, rounds: int) -> None:
    attempt = read_history(made.run).attempts[-1]
    taken: dict[str, list[float]] = {"ours": [], "floor": []}
    for _ in range(rounds):
        taken["ours"].append(timed(lambda: diagnose(made.run, attempt, end=made.clock, max_bytes=max_bytes)))
        taken["floor"].append(timed(lambda: parse(made.run, max_bytes)))
    ours, floor = (statistics.median(times) for times in taken.values())
    print(
        f"{name:9s} {max_bytes / 2**20:3.0f} MiB  ours {ours:6.3f} s  json.loads {floor:6.3f} s  "
        f"{ours / floor:4.1f} x"
    )


def parse(run: RunDir, max_bytes: int) -> None:
    """The records in the newest bytes of each file of readings, half of `max_bytes` in all, thrown away."""
    for node in NODES:
        with run.gpu_metrics(node).open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - max_bytes // 2 // len(NODES)))
            for line in file.readlines()[1:]:
                json.loads(line)


def timed(function: Callable[[], object]) -> float:
    before = time.process_time()
    function()
    return time.process_time() - before


if __name__ == "__main__":
    raise SystemExit(main())
