"""A checkpoint of two ranks on one: each group of parameters keeps its rate, each of Adam's states its count.

The device of the counts matters on GPUs alone, where Adam is fused.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from r1hpc.checkpoint.store import CheckpointStore
from r1hpc.config import load
from r1hpc.config.schema.run import Precision
from r1hpc.train.checkpoint.identity import Identity
from r1hpc.train.checkpoint.snapshot import Snapshots
from r1hpc.train.loop.step import set_learning_rate
from r1hpc.train.parallel.distributed import Group
from r1hpc.train.parallel.engine import build_engine, deepspeed_config
from tests.train.two_ranks import run_on_ranks, take_step

pytestmark = pytest.mark.timeout(300)
_SCALES = [1.0, 10.0]
_STAGES = (2, 3)


def _built(group: Group, folder: Path, stage: int, *, load_universal: bool) -> tuple[Any, Snapshots]:
    words = [f"deepspeed.zero_stage={stage}", "train.lr=1e-3"]
    if stage == 3:  # small enough that it really parts the parameters of a tiny model
        words += ["deepspeed.extra.zero_optimization.stage3_param_persistence_threshold=40"]
    config = load.load(None, words)
    asked = deepspeed_config(config, world_size=group.world_size, on_gpu=False, load_universal=load_universal)
    torch.manual_seed(0)
    shape = AutoConfig.for_model("gpt2", vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    network = AutoModelForCausalLM.from_config(shape)
    whole = list(network.parameters())
    parts = (whole[: len(whole) // 2], whole[len(whole) // 2 :])
    groups = [{"params": part, "lr_scale": scale} for part, scale in zip(parts, _SCALES, strict=True)]
    engine = build_engine(network, asked, groups)
    store = CheckpointStore(folder.parent / f"checkpoints-{stage}")
    identity = Identity("data", "plan", 4, "model", Precision.fp32, stage, group.world_size, {})
    return engine, Snapshots(store, group, 1, "t", identity, folder.parent)


def begun(group: Group, folder: Path) -> None:
    for stage in _STAGES:
        engine, ours = _built(group, folder, stage, load_universal=False)
        if group.rank == 0:
            CheckpointStore(ours._store.root).begin(1, "t")
        group.barrier()
        for number in range(3):
            take_step(engine, number, group)
        ours.save(engine, 3, {"seed": 0}, hurry=False, write_more=lambda folder: None)
        ours.finish()


def gone_on(group: Group, folder: Path) -> None:
    seen = {}
    for stage in _STAGES:
        engine, ours = _built(group, folder, stage, load_universal=True)
        checkpoint = ours.choose()
        assert checkpoint is not None
        ours.load(engine, checkpoint)
        set_learning_rate(engine, 1e-3)
        take_step(engine, 3, group)
        adam = getattr(engine.optimizer, "optimizer", engine.optimizer)
        counts = [state["step"] for state in adam.state.values()]
        seen[stage] = {
            "rates": [group["lr"] for group in engine.optimizer.param_groups],
            "counts": [float(count) for count in counts],
            "own": len({count.data_ptr() for count in counts}) == len(counts),
        }
    (folder / "seen.json").write_text(json.dumps(seen))


def test_rates_and_counts_are_each_groups_own(tmp_path: Path) -> None:
    for name in ("two", "one"):
        (tmp_path / name).mkdir()
    run_on_ranks(begun, tmp_path / "two", 2)
    run_on_ranks(gone_on, tmp_path / "one", 1)
    seen = json.loads((tmp_path / "one" / "seen.json").read_text())
    for stage in _STAGES:
        found = seen[str(stage)]
        assert found["rates"] == pytest.approx([1e-3, 1e-2]), stage
        assert set(found["counts"]) == {4.0}, stage
        assert len(found["counts"]) >= 2, stage
        assert found["own"], stage
