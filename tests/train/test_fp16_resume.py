"""fp16 whose loss scale moves around a save, on two ranks of real DeepSpeed: loaded, it is the same run.

A CPU is refused fp16, by DeepSpeed and by r1hpc: that check is the one thing replaced here.
"""

from pathlib import Path
from typing import Any

import deepspeed
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from r1hpc.checkpoint.store import CheckpointStore
from r1hpc.config.schema.run import Precision
from r1hpc.train.checkpoint.identity import Identity
from r1hpc.train.checkpoint.snapshot import Snapshots
from r1hpc.train.loop.step import loss_scale
from r1hpc.train.parallel.distributed import Group
from tests.train.two_ranks import run_on_two_ranks

OVERFLOWS = (2, 4, 5, 7)


def test_the_scale_and_the_skipped_steps_go_on_where_they_were(tmp_path: Path) -> None:
    run_on_two_ranks(saved_between_overflows, tmp_path)


def saved_between_overflows(group: Group, folder: Path) -> None:
    engine = fp16_engine()
    store = CheckpointStore(folder / "checkpoints")
    if group.rank == 0:
        store.begin(1, "t")
    group.barrier()
    identity = Identity("data", "plan", 4, "model", "fp16", 1, group.world_size)
    ours = Snapshots(store, group, 1, "t", identity, store.root)
    before = [take_step(engine, number) for number in range(5)]
    ours.save(engine, 5, {"seed": 0}, hurry=False, write_more=lambda folder: None)
    ours.finish()
    undisturbed = [take_step(engine, number) for number in range(5, 10)]
    newest = ours.choose()
    assert newest is not None
    ours.load(engine, newest)
    assert [take_step(engine, number) for number in range(5, 10)] == undisturbed
    assert [skipped for _, skipped, _ in [*before, *undisturbed]] == [0, 0, 1, 1, 2, 3, 3, 4, 4, 4]
    assert len({scale for scale, _, _ in undisturbed}) > 1


def fp16_engine() -> Any:
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32}
    config = AutoConfig.for_model("llama", **sizes, num_hidden_layers=1, num_attention_heads=2)
    network = AutoModelForCausalLM.from_config(config)
    engine, *_ = deepspeed.initialize(
        model=network,
        model_parameters=list(network.parameters()),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "steps_per_print": 10**12,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
            "zero_optimization": {"stage": 1},
            "fp16": {"enabled": True, "initial_scale_power": 10, "hysteresis": 1, "loss_scale_window": 3},
        },
        dist_init_required=False,
    )
    return engine


def take_step(engine: Any, number: int) -> tuple[float | None, int, str]:
    """(loss scale, steps skipped so far, loss to the last bit) after step `number`."""
    ids = torch.full((2, 8), number)
    loss = engine(input_ids=ids, labels=ids).loss
    engine.backward(loss * (1e30 if number in OVERFLOWS else 1.0))
    engine.step()
    return loss_scale(engine, Precision.fp16), engine.skipped_steps, float(loss.detach()).hex()
