"""A rank that was superseded in the middle of a real DeepSpeed save, which makes folders it misses."""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from r1hpc.checkpoint.store import CheckpointStore
from r1hpc.config.schema.run import Precision
from r1hpc.train.checkpoint.identity import Identity, describe_versions
from r1hpc.train.checkpoint.snapshot import Snapshots
from r1hpc.train.parallel.distributed import Group
from r1hpc.train.parallel.errors import SaveError
from tests.train.two_ranks import engine_around, run_on_two_ranks, train

ZERO_STAGE = 1
SEED = int(os.environ.get("R1HPC_SEED", "20240229"))
CASES = (
    # DeepSpeed makes its folder anew from the start.
    (1, "save_checkpoint", False),
    # The model states are written and gone; the optimizer's follow.
    (3, "_create_zero_checkpoint_files", False),
    (5, "_create_zero_checkpoint_files", True),
)
"""(attempt, the method of the engine that the next attempt begins before, whether it left its tombstone).

With the tombstone in time for save_checkpoint rank 0 fails alone, and a test of two ranks would hang.
"""


def test_it_commits_nothing(tmp_path: Path) -> None:
    run_on_two_ranks(superseded_saves, tmp_path)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_thousand_commit_nothing(tmp_path: Path) -> None:
    run_on_two_ranks(a_thousand_superseded_saves, tmp_path, timeout_s=3500)


def a_thousand_superseded_saves(group: Group, folder: Path) -> None:
    store, engine = CheckpointStore(folder / "checkpoints"), small_engine()
    chance = random.Random(SEED)  # the same on both ranks
    for number in range(1000):
        _, moment, leaves_tombstone = chance.choice(CASES)
        # With its tombstone there, rank 0 would fail alone in a save that is only copied.
        behind = not leaves_tombstone and chance.random() < 0.5
        superseded_save(group, store, engine, 2 * number + 1, moment, leaves_tombstone, behind)


def superseded_saves(group: Group, folder: Path) -> None:
    store, engine = CheckpointStore(folder / "checkpoints"), small_engine()
    for attempt, moment, leaves_tombstone in CASES:
        superseded_save(group, store, engine, attempt, moment, leaves_tombstone)
    save(snapshots(group, store, 9), engine)
    (found,) = store.list()
    assert describe_versions(found.manifest.meta) == ""
    assert describe_versions({"torch": "1.0"}) == (
        f"was written with torch 1.0 (now {torch.__version__}): "
        "results may differ in the last bits from here on"
    )
    assert found.manifest.attempt == 9
    assert store.verify(found) == []
    endings = [record.name.rpartition("rank_00_")[2] for record in found.manifest.files]
    assert endings.count("model_states.pt") == 1
    assert endings.count("optim_states.pt") == 2


def small_engine() -> Any:
    """A tiny model under DeepSpeed that has taken a step."""
    network = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "llama",
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    engine = engine_around(network, ZERO_STAGE, Precision.fp32)
    train(engine, [torch.zeros(2, 8, dtype=torch.long)])
    return engine


def superseded_save(
    group: Group,
    store: CheckpointStore,
    engine: Any,
    attempt: int,
    moment: str,
    leaves_tombstone: bool,
    asynchronous: bool = False,
) -> None:
    """`attempt` saves, and the next one begins at `moment`, killed before its tombstone or not."""
    ours = snapshots(group, store, attempt, asynchronous)

    def supersede() -> None:
        group.barrier()
        if group.rank == 0:
            CheckpointStore(store.root).begin(attempt + 1, "newer")
            if not leaves_tombstone:
                ours_folder(store, attempt).unlink()
        group.barrier()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, moment, after(supersede, getattr(engine, moment)))
        with pytest.raises(SaveError, match="has taken over"):
            save(ours, engine)
    group.barrier()
    assert ours_folder(store, attempt).is_dir() != leaves_tombstone, "DeepSpeed makes folders no more"
    assert list(store.survey()) == []
    group.barrier()  # the next case evicts the folder, which the other rank may not have looked at yet


def ours_folder(store: CheckpointStore, attempt: int) -> Path:
    return store.staging(1, attempt, "t").parent


def after(first: Callable[[], None], then: Callable[..., Any]) -> Callable[..., Any]:
    def both(*args: Any, **kwargs: Any) -> Any:
        first()
        return then(*args, **kwargs)

    return both


def snapshots(group: Group, store: CheckpointStore, attempt: int, asynchronous: bool = False) -> Snapshots:
    if group.rank == 0:
        CheckpointStore(store.root).begin(attempt, "t")
    group.barrier()
    identity = Identity("data", "plan", 4, "model", "fp32", ZERO_STAGE, group.world_size)
    return Snapshots(store, group, attempt, "t", identity, store.root, asynchronous=asynchronous)


def save(ours: Snapshots, engine: Any) -> None:
    ours.save(engine, 1, {"seed": 0}, hurry=True, write_more=lambda folder: None)
    ours.finish()
