"""Time a save of a training script by r1hpc.client beside torch.save with fsync.

    python benchmarks/script_save.py [--mib 512] [--rounds 5] [--folder DIR]

Ours also digests every byte, commits by rename, and removes the oldest checkpoint; the floor renames one file
into place. Both take turns in one process; medians. One rank: between ranks a save adds two messages.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from r1hpc import attempt
from r1hpc.base.run_dir import RunDir
from r1hpc.checkpoint.store import CheckpointStore
from r1hpc.client.job import Job
from r1hpc.client.states import TorchState


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=512, help="MiB per checkpoint (512)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (5)")
    parser.add_argument("--folder", default=None, help="where to write (the system's temporary folder)")
    arguments = parser.parse_args()
    model = torch.nn.Linear(1024, arguments.mib * 256, bias=False)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        times = measure(Path(folder), model, arguments.rounds)
    floor, ours = (statistics.median(times[name]) for name in ("torch.save, fsync", "r1hpc.client"))
    for name, seconds in times.items():
        print(f"{name:20} {statistics.median(seconds):.2f} s  ({min(seconds):.2f} to {max(seconds):.2f})")
    print(f"ratio                {ours / floor:.2f}")
    return 0


def measure(root: Path, model: torch.nn.Module, rounds: int) -> dict[str, list[float]]:
    run = RunDir(root)
    CheckpointStore(run.checkpoints).begin(1, "t" * 16)
    run.attempt_dir(1).mkdir(parents=True)
    os.environ |= Job(str(root), 1, "t" * 16, 0, 1, 0, 1, 2, 0, {}).to_environ()
    ours, state = attempt(), TorchState(model=model)
    ours.resume()
    times: dict[str, list[float]] = {"torch.save, fsync": [], "r1hpc.client": []}
    for step in range(1, rounds + 2):
        began = time.perf_counter()
        save_plainly(root, model)
        middle = time.perf_counter()
        with ours.saving(step) as folder:
            state.save(folder)
        if step > 1:  # the first warms up both
            times["torch.save, fsync"].append(middle - began)
            times["r1hpc.client"].append(time.perf_counter() - middle)
    return times


def save_plainly(root: Path, model: torch.nn.Module) -> None:
    fresh = root / "state.tmp"
    torch.save({"model": model.state_dict()}, fresh)
    with fresh.open("rb+") as file:
        os.fsync(file.fileno())
    fresh.replace(root / "state.pt")
    fd = os.open(root, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


if __name__ == "__main__":
    sys.exit(main())
