"""Saves written behind training, on two ranks of real DeepSpeed: what is loaded is what was saved.

All cases share two processes and one engine, since starting those takes longer than all the rest.
"""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from r1hpc.checkpoint.manifest import FileRecord
from r1hpc.checkpoint.store import CheckpointStore
from r1hpc.config.schema.run import Precision
from r1hpc.telemetry.records.attempts import Cause
from r1hpc.train.checkpoint.async_save import Exchange, Report, Write, records_of
from r1hpc.train.checkpoint.deepspeed_io import load_file
from r1hpc.train.checkpoint.identity import Identity
from r1hpc.train.checkpoint.snapshot import Snapshots
from r1hpc.train.parallel.distributed import Group
from r1hpc.train.parallel.errors import SaveError
from tests.runs import submit, wait_over
from tests.train.two_ranks import engine_around, run_on_two_ranks, train

ZERO_STAGE = 1
BATCH = torch.arange(16).view(2, 8)


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    run_on_two_ranks(saves, tmp_path, timeout_s=240)


def test_without_zero_too_each_rank_writes_its_part_of_the_weights(tmp_path: Path) -> None:
    run_on_two_ranks(saves_without_zero, tmp_path, timeout_s=240)


def saves_without_zero(group: Group, folder: Path) -> None:
    """The optimizer goes on where it was: the step after a load is the one after the save."""
    for precision in (Precision.fp32, Precision.bf16):
        engine = engine_around(network(), 0, precision)
        train(engine, [BATCH])
        store = CheckpointStore(folder / precision.value)
        ours = begin(group, store, 1, zero_stage=0)
        save(ours, engine, 1)
        assert ours.finish() is not None
        every_rank_writes_its_part(group, store, engine)
        at_save = weights(engine)
        train(engine, [BATCH])
        after = weights(engine)
        checkpoint = ours.choose()
        assert checkpoint is not None
        ours.load(engine, checkpoint)
        assert torch.equal(weights(engine), at_save)
        train(engine, [BATCH])
        assert torch.equal(weights(engine), after)


def saves(group: Group, folder: Path) -> None:
    engine = engine_around(network(), ZERO_STAGE, Precision.bf16)
    train(engine, [BATCH])
    store = CheckpointStore(folder / "checkpoints", keep=9)
    ours = begin(group, store, 1)
    training_goes_on_behind_it(group, ours, engine)
    every_rank_writes_its_part(group, store, engine)
    a_stages_own_files_are_written_there_too(group, ours, engine)
    one_ranks_failure_is_everyones(group, store, ours, engine)
    one_is_abandoned_for_a_newer_one(group, store, ours, engine)
    a_checkpoint_of_deepspeeds_own_layout_is_loaded(group, store, ours, engine)
    nothing_is_committed_by_a_superseded_attempt(group, store, ours, engine)


def training_goes_on_behind_it(group: Group, ours: Snapshots, engine: Any) -> None:
    """The write is held up while the weights change; a synchronous save of the same state is the measure."""
    at_save = weights(engine)
    direct = begin(group, CheckpointStore(ours._store.root.parent / "direct"), 1, asynchronous=False)
    save(direct, engine, 1)
    assert direct.finish() is not None
    go = ours._store.root.parent / f"go-{group.rank}"
    with failpoint(f"save.writing:until={go}"):
        save(ours, engine, 1)
        began = time.monotonic()
        assert not ours.is_over
        train(engine, [BATCH])
        assert ours.last_committed_step is None
        assert not torch.equal(weights(engine), at_save)
        time.sleep(0.5)
        held_s = time.monotonic() - began
        go.touch()
        saved = ours.finish()
    assert saved is not None
    assert group.rank > 0 or saved.write_s >= held_s
    for snapshots in (ours, direct):
        train(engine, [BATCH])
        checkpoint = snapshots.choose()
        assert checkpoint is not None
        snapshots.load(engine, checkpoint)
        assert torch.equal(weights(engine), at_save)
    one, other = (snapshots._store.list()[0].path / "deepspeed" for snapshots in (ours, direct))
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in other.iterdir())
    for path in one.iterdir():
        assert_equal(torch.load(path, weights_only=False), torch.load(other / path.name, weights_only=False))


def a_stages_own_files_are_written_there_too(group: Group, ours: Snapshots, engine: Any) -> None:
    """A save returns although the stage's files cannot be written yet."""
    is_trained, name = threading.Event(), f"stage_rank_{group.rank}_rollout.npz"

    def write_more(folder: Path) -> None:
        assert is_trained.wait(60)
        (folder / name).write_bytes(b"rollout")

    ours.save(engine, 2, {"seed": 0}, hurry=False, write_more=write_more)
    train(engine, [BATCH])
    is_trained.set()
    assert ours.finish() is not None
    newest = ours._store.list()[0]
    assert (newest.path / name).read_bytes() == b"rollout"
    assert name in {record.name for record in newest.manifest.files}


def every_rank_writes_its_part(group: Group, store: CheckpointStore, engine: Any) -> None:
    folder = store.list()[0].path / "deepspeed"
    sizes = [(folder / f"weights_rank_{rank}.pt").stat().st_size for rank in (0, 1)]
    assert abs(sizes[0] - sizes[1]) < 0.3 * sizes[0]  # of a model so small that the names weigh something
    whole = load_file(folder / "mp_rank_00_model_states.pt")["module"]
    assert_equal(dict(whole), dict(engine.module.state_dict()))


def one_ranks_failure_is_everyones(
    group: Group, store: CheckpointStore, ours: Snapshots, engine: Any
) -> None:
    for fault, said in (
        ("save.written:enospc:1:*", "No space left"),
        ("seal.fsync.before:eio:0:*", "Input/output"),
    ):
        with failpoint(fault):
            save(ours, engine, 3)
            with pytest.raises(SaveError, match=said):
                ours.finish()
        group.barrier()
        assert [checkpoint.step for checkpoint in store.list()] == [2, 1]
        assert not store.staging(3, 1, "t").exists()
        group.barrier()


def one_is_abandoned_for_a_newer_one(
    group: Group, store: CheckpointStore, ours: Snapshots, engine: Any
) -> None:
    ours._usual_s = 30.0
    for step, seconds_left in ((3, None), (4, 10.0), (5, 100.0), (6, 40.0)):
        go = store.root.parent / f"made-way-{step}-{group.rank}"
        with failpoint(f"save.writing:until={go}::*"):
            save(ours, engine, step)
            ours.make_way(seconds_left if group.rank == 0 else None)
            go.touch()
            saved = ours.finish(hurry=True)
        ours._usual_s = 30.0
        # Only with 40 s there is time for one of 30 s, and not for what is left of this one too.
        assert (saved is None) == (step == 6)
        group.barrier()  # rank 0 takes it away
        assert not store.staging(6, 1, "t").exists(), "of which the newer one is made"
        group.barrier()  # before rank 0 makes the next one
    save(ours, engine, 7)
    assert ours.finish(hurry=True) is not None
    assert [checkpoint.step for checkpoint in store.list()] == [7, 5, 4, 3, 2, 1]


def a_checkpoint_of_deepspeeds_own_layout_is_loaded(
    group: Group, store: CheckpointStore, ours: Snapshots, engine: Any
) -> None:
    """As r1hpc made them until rank 0 was relieved of writing all weights."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    at_save = weights(engine)
    engine.checkpoint_engine, engine.save_non_zero_checkpoint = TorchCheckpointEngine(), group.rank == 0
    ours._files.in_parts, attach = False, ours._files.attach
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours._files, "attach", lambda engine: None)
        save(ours, engine, 8)
        ours.finish()
    ours._files.in_parts = True
    attach(engine)
    newest = store.list()[0]
    assert newest.step == 8
    assert not list(newest.path.rglob("weights_rank_*"))
    train(engine, [BATCH])
    ours.load(engine, newest)
    assert torch.equal(weights(engine), at_save)


def nothing_is_committed_by_a_superseded_attempt(
    group: Group, store: CheckpointStore, ours: Snapshots, engine: Any
) -> None:
    go = store.root.parent / "superseded"
    with failpoint(f"save.written:until={go}::*"):
        save(ours, engine, 9)
        group.barrier()
        if group.rank == 0:
            CheckpointStore(store.root).begin(2, "newer")
            go.touch()
        with pytest.raises(SaveError, match="has taken over"):
            ours.finish()
    assert store.list()[0].step == 8


def begin(
    group: Group,
    store: CheckpointStore,
    attempt: int,
    *,
    asynchronous: bool = True,
    zero_stage: int = ZERO_STAGE,
) -> Snapshots:
    if group.rank == 0:
        store.begin(attempt, "t")
    group.barrier()
    identity = Identity("data", "plan", 4, "model", "bf16", zero_stage, group.world_size)
    return Snapshots(store, group, attempt, "t", identity, store.root, asynchronous=asynchronous)


def save(ours: Snapshots, engine: Any, step: int) -> None:
    ours.save(engine, step, {"seed": 0}, hurry=False, write_more=lambda folder: None)


@contextmanager
def failpoint(wanted: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("R1HPC_FAILPOINT", wanted)
        yield


def network() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64}
    config = AutoConfig.for_model(
        "llama", **sizes, num_hidden_layers=2, num_attention_heads=2, tie_word_embeddings=True
    )
    return AutoModelForCausalLM.from_config(config)


def weights(engine: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in engine.parameters()])


def assert_equal(ours: Any, theirs: Any) -> None:
    """Two states, tensor by tensor, to the bit."""
    assert type(ours) is type(theirs)
    if isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert_equal(value, theirs[key])
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_equal(one, other)


def test_an_error_in_training_does_not_cost_the_write_under_way(tmp_path: Path) -> None:
    """Both ranks fail in step 8, while step 6 is written."""
    faults = {**os.environ, "R1HPC_FAILPOINT": "save.writing:sleep=3::1,step.begin:raise::8"}
    size = ("train.num_steps=24", "checkpoint.save_every=6", "limits.max_crashes=0")
    run = submit(tmp_path, "run", "--nodes", "2", *size, env=faults).run
    (attempt,) = wait_over(run)
    assert attempt.cause is Cause.crash
    assert "failpoint step.begin" in attempt.detail
    assert [found.step for found in CheckpointStore(run.checkpoints).list()] == [6]


@pytest.mark.parametrize(("pieces", "committed"), [(30, 7), (0, None)])
def test_on_the_way_out_a_write_has_as_long_as_it_gets_on(pieces: int, committed: int | None) -> None:
    def write_own(write: Write) -> list[FileRecord]:
        for _ in range(pieces):
            time.sleep(0.1)
            write.wrote()
        if not pieces:
            write.stop.wait(60)  # stuck, until it is given up
            raise SaveError("abandoned")
        return []

    def commit(reports: list[Report]) -> int:
        records_of(reports)
        return 7

    write = Write(1, 1, Exchange(Group(0, 0, 1, torch.device("cpu"))), write_own, commit, lambda: None)
    beats: list[int] = []
    write.settle(1.0, lambda: beats.append(1))
    assert write.committed_bytes == committed
    assert bool(beats) is bool(pieces)
