"""Two ranks: how fast they reduce, what objects and barriers take, hangs, and another number of ranks.

Needs two GPUs; in small two CPU ranks over gloo do the same.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.gpu.place import CHECKOUT, PieceError, Place, finished, wait_step, wait_until
from benchmarks.gpu.table import Table, number
from r1hpc.base.files import read_json, write_json
from r1hpc.telemetry.records.metrics import compare

_ROUNDS = 10


def run(place: Place) -> list[Table]:
    if place.num_gpus < 2 and not place.is_small:
        raise PieceError("this piece needs two GPUs, and there is one")
    return [_collectives(place), Table("Two ranks in a run", ("what", "seen"), (_hang(place), _fewer(place)))]


def _collectives(place: Place) -> Table:
    answer = place.folder / "collectives.json"
    answer.unlink(missing_ok=True)
    (place.folder / "store").unlink(missing_ok=True)
    argv = [sys.executable, "-m", "benchmarks.gpu.nccl", place.device, str(place.folder)]
    ranks = [subprocess.Popen([*argv, str(rank)], cwd=CHECKOUT) for rank in (0, 1)]
    statuses = [rank.wait(timeout=240) for rank in ranks]
    if any(statuses):
        raise PieceError(f"the ranks exited {statuses}")
    taken: dict[str, float] = read_json(answer, dict[str, float])
    rows = [(name, f"{1000 * seconds:.3g} ms", _bandwidth(name, seconds)) for name, seconds in taken.items()]
    note = "Bus bandwidth of an all-reduce between two: its bytes over its time (nccl-tests, PERFORMANCE.md)."
    return Table("Collectives of two ranks", ("what", "each", "bus bandwidth"), tuple(rows), (note,))


def _bandwidth(name: str, seconds: float) -> str:
    size = name.removeprefix("all-reduce of ").removesuffix(" MiB")
    return f"{int(size) * 2**20 / seconds / 1e9:.3g} GB/s" if size.isdecimal() else ""


def rank_main(device: str, folder: Path, rank: int) -> None:
    """One of the two ranks; rank 0 writes the seconds of each collective."""
    from r1hpc.train.parallel import distributed

    distributed.choose_accelerator(device == "cuda")
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import FileStore

    store = FileStore(str(folder / "store"), 2)
    group = distributed.join(rank, rank, 2, store, use_gpu=device == "cuda")
    sizes = (1,) if device == "cpu" else (1, 64, 1024)
    ways: dict[str, Callable[[], object]] = {
        f"all-reduce of {size} MiB": partial(dist.all_reduce, torch.ones(size * 2**18, device=group.device))
        for size in sizes
    }
    ways |= {"objects": lambda: group.gather({"rank": rank}), "barrier": group.barrier}
    ways |= {"the loop's own sum": lambda: group.all_sum([1.0] * 11)}
    taken = {name: _each(way, device) for name, way in ways.items()}
    if rank == 0:
        write_json(folder / "collectives.json", taken)
    group.barrier()
    distributed.leave()
    os._exit(0)  # as a rank does: torch's threads may abort an interpreter that ends in its own time


def _each(way: Callable[[], object], device: str) -> float:
    import torch

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    way()
    wait()
    started = time.perf_counter()
    for _ in range(_ROUNDS):
        way()
    wait()
    return (time.perf_counter() - started) / _ROUNDS


def _hang(place: Place) -> tuple[str, str]:
    """A rank that stops inside a step must be named by the other one, and end the attempt as a hang."""
    words = ("train.num_steps=200", "train.hang_timeout_s=20", "limits.max_hangs=0")
    os.environ["R1HPC_FAILPOINT"] = "step.begin:stop:1:6"
    try:
        made = place.start("hang", *words, ranks=2)
    finally:
        del os.environ["R1HPC_FAILPOINT"]
    wait_until("the end of the hanging run", lambda: made.state().is_over, timeout_s=180)
    attempt = made.attempts[-1]
    cause = attempt.cause.value if attempt.cause else "no end"
    return "rank 1 stopped in step 6", f"{cause}: {attempt.detail}"


def _fewer(place: Place) -> tuple[str, str]:
    """Stopped on two ranks, gone on with on one: a universal checkpoint."""
    words = (f"train.num_steps={8 if place.is_small else 20}", "deepspeed.zero_stage=1")
    whole = place.run("two-ranks", *words, ranks=2)
    made = place.start("two-then-one", *words, ranks=2)
    wait_step(made, 3)
    made.cancel(save_first=True)
    wait_until("its end", lambda: made.state().is_over)
    key = "ranks_per_node" if place.is_small else "gpus_per_node"
    made.resume(executor="local", overrides=[f"resources.{key}=1"])
    finished(made)
    steps = {each.global_step for each in compare(whole.folder, made.folder, keys=("lr",))}
    last = made.metrics()[-1].loss, whole.metrics()[-1].loss
    return "stopped on two ranks, finished on one", (
        f"{len(steps)} steps of another rate; last loss {number(last[0])}, on two ranks {number(last[1])}"
    )


if __name__ == "__main__":
    rank_main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
