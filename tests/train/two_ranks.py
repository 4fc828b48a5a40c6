"""A function of a test module on ranks of real DeepSpeed over gloo, each in its own process.

run_on_two_ranks(body, tmp_path)         # body(group, folder) at module level; its failure fails the test
run_on_ranks(body, tmp_path, 3)
"""

import importlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import FileStore  # torch.distributed hides it from type checkers

from r1hpc.config.schema.run import Precision
from r1hpc.train.parallel.distributed import Group, join, leave
from tests.runs import CHECKOUT, run_environment

Body = Callable[[Group, Path], None]


def take_step(engine: Any, number: int, group: Group) -> str:
    """The loss of a step on a batch of random tokens below 64, to the last bit."""
    draws = torch.Generator().manual_seed(10 * number + group.rank)
    ids = torch.randint(64, (2, 16), generator=draws)
    engine.set_gradient_accumulation_boundary(True)
    loss = engine(input_ids=ids, labels=ids).loss
    engine.backward(loss)
    engine.step()
    return float(loss.detach()).hex()


def run_on_two_ranks(body: Body, folder: Path, timeout_s: float = 120) -> None:
    """Both ranks leave with status 0, or the assertion shows what they wrote."""
    run_on_ranks(body, folder, 2, timeout_s)


def run_on_ranks(body: Body, folder: Path, num_ranks: int, timeout_s: float = 120) -> None:
    """As run_on_two_ranks, on any number of them."""
    command = [sys.executable, "-m", "tests.train.two_ranks", body.__module__, body.__name__]
    command += [str(folder), str(num_ranks)]
    # Into files: a rank that nobody reads stands still when its pipe is full.
    logs = [folder / f"rank_{rank}.out" for rank in range(num_ranks)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank)],
            cwd=CHECKOUT,
            env=run_environment(),
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]
    deadline = time.monotonic() + timeout_s
    try:
        for rank in ranks:
            rank.wait(deadline - time.monotonic())
    finally:
        for rank in ranks:
            rank.kill()
    said = [log.read_text() for log in logs]
    assert [rank.returncode for rank in ranks] == [0] * num_ranks, "\n".join(said)


def engine_around(network: nn.Module, zero_stage: int, precision: Precision, lr: float = 1e-2) -> Any:
    """A DeepSpeed engine with AdamW; of a tiny model the default rate shows after one step."""
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=network,
        model_parameters=[p for p in network.parameters() if p.requires_grad],
        config={
            "train_micro_batch_size_per_gpu": 2,
            "steps_per_print": 10**12,
            "optimizer": {"type": "AdamW", "params": {"lr": lr, "torch_adam": True}},
            # Small enough that ZeRO 3 really parts the parameters of a tiny model.
            "zero_optimization": {"stage": zero_stage, "stage3_param_persistence_threshold": 40},
            "bf16": {"enabled": precision is Precision.bf16},
        },
        dist_init_required=False,
    )
    return engine


def train(engine: Any, batches: Iterable[Tensor]) -> None:
    """One optimizer step for each batch of ids (batch, seq_len)."""
    for ids in batches:
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()


def gathered(network: nn.Module) -> dict[str, Tensor]:
    """Every parameter, whole, under any ZeRO stage. Collective."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    whole = {}
    for name, parameter in network.named_parameters():
        with GatheredParameters(parameter):
            whole[name] = parameter.detach().clone()
    return whole


def _main(module: str, function: str, folder: str, num_ranks: str, rank: str) -> None:
    store = FileStore(f"{folder}/store", int(num_ranks))
    group = join(int(rank), int(rank), int(num_ranks), store, use_gpu=False)
    body: Body = getattr(importlib.import_module(module), function)
    body(group, Path(folder))
    leave()
    sys.stdout.flush()
    # Not by unwinding: now and then gloo's threads outlive the engines and abort there (seen: status 134).
    os._exit(0)


if __name__ == "__main__":
    _main(*sys.argv[1:])
