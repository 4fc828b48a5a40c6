"""Time a save, and its commit, beside plain copies and DeepSpeed's own save.

    python benchmarks/save.py [--ranks 2] [--rounds 5] [--parameters 20 80] [--folder DIR]

CPU ranks of one model, ZeRO 1, bf16; all ways take turns in one pair of processes, and medians are printed:

    copy         a plain copy of the bytes that this rank saves, into memory that is there: the floor
    blocked      what training waits for in an asynchronous save (must be <= 1.3 x the copy)
    synchronous  what it waits for with checkpoint.asynchronous=false
    committed    an asynchronous save and the wait for its commit, as a preemption does it
    DeepSpeed    its save_checkpoint, by itself and with an fsync of every file (committed must be <= 2 x)
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CHECKOUT))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parameters", type=int, nargs="+", default=[20, 80], help="millions (20 80)")
    parser.add_argument("--folder", default=None, help="where to write (the system's temporary folder)")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        measure(options)
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        command = [sys.executable, __file__, *sys.argv[1:], "--folder", folder]
        ranks = [
            subprocess.Popen([*command, "--rank", str(rank)], env=environment)
            for rank in range(options.ranks)
        ]
        return max(rank.wait() for rank in ranks)


def measure(options: argparse.Namespace) -> None:
    from torch._C._distributed_c10d import FileStore

    from r1hpc.train.parallel.distributed import join

    folder = Path(options.folder)
    store = FileStore(f"{folder}/store", options.ranks)
    group = join(options.rank, options.rank, options.ranks, store, use_gpu=False)
    for millions in options.parameters:
        ways = ways_to_save(group, build(millions), folder / str(millions))
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(options.rounds + 1):
            for name, way in ways.items():
                group.barrier()
                seconds = max(group.gather(way(turn)))
                if turn:  # the first one allocates, and warms the caches
                    taken[name].append(seconds)
        if group.rank == 0:
            report(millions, {name: statistics.median(times) for name, times in taken.items()})
    sys.stdout.flush()
    os._exit(0)


def build(millions: int) -> Any:
    """A DeepSpeed engine around a transformer of about so many parameters, after one step."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from r1hpc.train.parallel.engine import build_engine

    sizes = {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
    layers = max(1, round((millions * 1e6 - 8192 * 512) / (4 * 512 * 512 + 3 * 512 * 2048)))
    config = AutoConfig.for_model("llama", **sizes, num_hidden_layers=layers, tie_word_embeddings=True)
    engine = build_engine(
        AutoModelForCausalLM.from_config(config),
        {
            "train_micro_batch_size_per_gpu": 1,
            "steps_per_print": 10**12,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
            "zero_optimization": {"stage": 1},
            "bf16": {"enabled": True},
            "checkpoint": {"tag_validation": "Ignore"},  # as r1hpc's engine
        },
    )
    ids = torch.arange(8).view(1, 8)
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    return engine


def ways_to_save(group: Any, engine: Any, folder: Path) -> dict[str, Callable[[int], float]]:
    """name -> what saves once and returns the seconds that count."""
    import torch
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    from r1hpc.checkpoint.store import CheckpointStore
    from r1hpc.train.checkpoint.identity import Identity
    from r1hpc.train.checkpoint.snapshot import Snapshots

    def snapshots(name: str, asynchronous: bool) -> Any:
        store = CheckpointStore(folder / name)
        if group.rank == 0:
            store.begin(1, "bench")
        group.barrier()
        identity = Identity("data", "plan", 1, "model", "bf16", 1, group.world_size)
        return Snapshots(store, group, 1, "bench", identity, folder, asynchronous=asynchronous)

    behind, direct = snapshots("behind", True), snapshots("direct", False)

    def save(ours: Any, turn: int, *, hurry: bool) -> tuple[float, float]:
        started = time.perf_counter()
        ours.save(engine, turn + 1, {"seed": 0}, hurry=hurry, write_more=lambda folder: None)
        copied = time.perf_counter()
        ours.finish(hurry=hurry)
        return copied - started, time.perf_counter() - started

    save(behind, -1, hurry=False)
    copies = behind._files._copies._buffers.values()
    sources = [tensor.detach().clone() for tensors in copies for tensor in tensors]
    targets = [source.clone() for source in sources]
    if group.rank == 0:
        print(f"{sum(source.nbytes for source in sources) / 2**20:.0f} MiB on each rank", flush=True)

    def copy(turn: int) -> float:
        started = time.perf_counter()
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)
        return time.perf_counter() - started

    def deepspeed(turn: int, *, syncs: bool) -> float:
        engine.checkpoint_engine, engine.save_non_zero_checkpoint = TorchCheckpointEngine(), group.rank == 0
        place = folder / f"deepspeed-{syncs}"
        started = time.perf_counter()
        engine.save_checkpoint(str(place), tag=str(turn % 2))
        for path in place.rglob(f"*rank_{group.rank}*.pt") if syncs else ():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        group.barrier()
        return time.perf_counter() - started

    torch.set_num_threads(1)
    return {
        "copy": copy,
        "blocked": lambda turn: save(behind, 2 * turn, hurry=False)[0],
        "synchronous": lambda turn: save(direct, 2 * turn, hurry=False)[1],
        "committed": lambda turn: save(behind, 2 * turn + 1, hurry=True)[1],
        "DeepSpeed": lambda turn: deepspeed(turn, syncs=False),
        "DeepSpeed + fsync": lambda turn: deepspeed(turn, syncs=True),
    }


def report(millions: int, median: dict[str, float]) -> None:
    print(f"{millions} M parameters")
    for name, seconds in median.items():
        print(f"  {name:18s} {seconds * 1e3:9.1f} ms")
    for ours, floor in (
        ("blocked", "copy"),
        ("blocked", "synchronous"),
        ("committed", "DeepSpeed"),
        ("committed", "DeepSpeed + fsync"),
    ):
        print(f"  {ours} / {floor}: {median[ours] / median[floor]:.2f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
