"""A checkpoint that verifies and that real DeepSpeed cannot load, on two ranks."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from r1hpc.checkpoint.store import CheckpointStore, NoUsableCheckpointError
from r1hpc.config.schema.run import Precision
from r1hpc.train.checkpoint.identity import Identity
from r1hpc.train.checkpoint.snapshot import Snapshots
from r1hpc.train.parallel.distributed import Group
from tests.train.two_ranks import engine_around, run_on_two_ranks, train


def test_the_next_older_one_is_loaded_or_each_is_named(tmp_path: Path) -> None:
    run_on_two_ranks(falls_back, tmp_path)


def falls_back(group: Group, folder: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32}
    config = AutoConfig.for_model("llama", **sizes, num_hidden_layers=1, num_attention_heads=2)
    engine = engine_around(AutoModelForCausalLM.from_config(config), 1, Precision.fp32)
    train(engine, [torch.zeros(2, 8, dtype=torch.long)])
    saved = weights(engine)
    store = CheckpointStore(folder / "checkpoints")
    identity = Identity("data", "plan", 4, "model", "fp32", 1, group.world_size)
    if group.rank == 0:
        store.begin(1, "t")
    group.barrier()
    ours = Snapshots(store, group, 1, "t", identity, store.root)
    ours.save(engine, 1, {"seed": 0}, hurry=False, write_more=lambda folder: None)
    ours.finish()
    if group.rank == 0:
        commit_without_model_states(store, identity)
    group.barrier()
    train(engine, [torch.ones(2, 8, dtype=torch.long)])
    assert not torch.equal(weights(engine), saved)
    newest = ours.choose()
    assert newest is not None
    assert newest.step == 2
    assert ours.load(engine, newest).step == ours.last_committed_step == 1
    assert torch.equal(weights(engine), saved)
    group.barrier()
    if group.rank == 0:
        next(store.list()[1].path.rglob("*model_states.pt")).unlink()
    group.barrier()
    with pytest.raises(NoUsableCheckpointError, match=r"(?s)step-00000002: .*step-00000001: .* is missing"):
        ours.load(engine, newest)


def commit_without_model_states(store: CheckpointStore, identity: Identity) -> None:
    staging = store.open_staging(2, 1, "t")
    (staging / "streams_rank_0.pt").write_bytes(b"none")
    (staging / "deepspeed").mkdir(mode=0o700)
    (staging / "deepspeed/other.pt").write_bytes(b"none")
    records = store.seal(staging, ["streams_rank_0.pt", "deepspeed/other.pt"])
    store.commit(2, 1, "t", records, {**identity.to_meta(), "seed": 0})


def weights(engine: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in engine.parameters()])
