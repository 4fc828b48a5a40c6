"""Gradients in fewer bytes on real ranks: what is left out comes later, and is in the checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from r1hpc.base.run_dir import RunDir
from r1hpc.checkpoint.store import CheckpointStore
from r1hpc.config.schema.run import Precision, TrainConfig
from r1hpc.telemetry.records.attempts import Cause
from r1hpc.telemetry.records.metrics import read_steps
from r1hpc.train.checkpoint.identity import Identity, compression_of
from r1hpc.train.checkpoint.snapshot import Snapshots
from r1hpc.train.parallel.compression import Compressor, GradientExchange, compression_name, exchange_of
from r1hpc.train.parallel.distributed import Group
from tests.runs import assert_same_run, submit, until_stopped, wait_over, wait_step
from tests.train.two_ranks import engine_around, run_on_two_ranks

pytestmark = pytest.mark.timeout(600)

SIDE = 256
NUM_VALUES = 2 * SIDE * SIDE + 2 * SIDE
METHODS = ("int8", "powersgd")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(SIDE, SIDE), nn.Linear(SIDE, SIDE))


def started(method: str, group: Group, precision: Precision = Precision.fp32) -> tuple[Any, Any]:
    """An engine and what averages its gradients."""
    dtype = torch.bfloat16 if precision is Precision.bf16 else torch.float32
    engine = engine_around(network().to(dtype), 0, precision)
    return engine, exchange_of(TrainConfig(gradient_compression=method), engine, group)


def gradient(step: int, rank: int, name: str, shape: torch.Size) -> torch.Tensor:
    """Of one rank and step: some columns matter more than others, as in real ones."""
    draws = torch.Generator().manual_seed(1000 * step + 10 * rank + len(name))
    values = torch.randn(shape, generator=draws)
    return values * torch.logspace(0, -3, shape[-1])


def averaged(engine: Any, group: Group, step: int) -> dict[str, torch.Tensor]:
    """What DeepSpeed leaves for the optimizer where each rank has its `gradient`."""
    parameters = dict(engine.module.named_parameters())
    for name, parameter in parameters.items():
        parameter.grad = gradient(step, group.rank, name, parameter.shape).to(parameter.dtype)
    engine.set_gradient_accumulation_boundary(True)
    engine.allreduce_gradients()
    return {name: p.grad.clone() for name, p in parameters.items()}


def mean_error(exchange: Compressor) -> dict[str, torch.Tensor]:
    """Over the ranks."""
    means = {name: error.clone() for name, error in exchange.errors.items()}
    for mean in means.values():
        dist.all_reduce(mean)
    return {name: mean / dist.get_world_size() for name, mean in means.items()}


def test_on_two_ranks(tmp_path: Path) -> None:
    """All in one start of the ranks, which takes longer than what they do."""
    run_on_two_ranks(each_in_turn, tmp_path, timeout_s=500)


def each_in_turn(group: Group, folder: Path) -> None:
    for body in (adds_up, sends, low_rank_arrives_whole, divides_errors, goes_on_to_the_bit):
        print(body.__name__, flush=True)
        body(group, folder)


def adds_up(group: Group, folder: Path) -> None:
    """At any moment: what the optimizer has seen and the mean of the errors are the gradients so far."""
    for method in METHODS:
        engine, exchange = started(method, group)
        given: dict[str, Any] = dict.fromkeys(dict(engine.module.named_parameters()), 0)
        seen = dict(given)
        for step in range(5):
            for name, result in averaged(engine, group, step).items():
                seen[name] = seen[name] + result
                ranks = [gradient(step, rank, name, result.shape) for rank in (0, 1)]
                given[name] = given[name] + sum(ranks) / 2
                assert len(set(group.gather(float(result.double().sum()).hex()))) == 1, "one gradient for all"
        lost = mean_error(exchange)
        for name, total in given.items():
            torch.testing.assert_close(seen[name] + lost.get(name, 0), total, atol=1e-5, rtol=1e-5)
        assert all(error.norm() > 1e-4 for name, error in lost.items() if name.endswith("weight")), method
        check_a_nan_is_seen_everywhere(engine, group)


def check_a_nan_is_seen_everywhere(engine: Any, group: Group) -> None:
    """One rank's: the loop ends the run by the norm, on all ranks alike."""
    for parameter in engine.module.parameters():
        parameter.grad = torch.full_like(parameter, torch.inf if group.rank else 1.0)
    engine.allreduce_gradients()
    assert not any(p.grad.isfinite().all() for p in engine.module.parameters())


def sends(group: Group, folder: Path) -> None:
    """The bytes of one step on two ranks, where a ring's all-reduce sends each byte once."""
    sent = {}
    for precision in (Precision.fp32, Precision.bf16):
        for method in ("none", *METHODS):
            engine, exchange = started(method, group, precision)
            averaged(engine, group, 0)
            assert isinstance(exchange, GradientExchange)
            sent[precision, method] = exchange.take_bytes()
            assert exchange.take_bytes() == 0
    assert sent[Precision.fp32, "none"] == 4 * NUM_VALUES
    assert sent[Precision.bf16, "none"] == 2 * NUM_VALUES
    assert sent[Precision.fp32, "int8"] == sent[Precision.bf16, "int8"] == NUM_VALUES * 260 // 256
    assert sent[Precision.fp32, "powersgd"] == 4 * (2 * 4 * (SIDE + SIDE) + 2 * SIDE)
    assert sent[Precision.fp32, "none"] > 15 * sent[Precision.fp32, "powersgd"]


def low_rank_arrives_whole(group: Group, folder: Path) -> None:
    """Where the ranks' gradients together have no more than compression_rank."""
    engine, _ = started("powersgd", group)
    draws = torch.Generator().manual_seed(group.rank)
    ours = torch.randn(SIDE, 2, generator=draws) @ torch.randn(2, SIDE, generator=draws)  # of both: rank 4
    expected = ours.clone()
    dist.all_reduce(expected)
    engine.set_gradient_accumulation_boundary(True)
    for parameter in engine.module.parameters():
        parameter.grad = ours.clone() if parameter.dim() > 1 else torch.zeros_like(parameter)
    engine.allreduce_gradients()
    found = engine.module[0].weight.grad
    assert (found - expected / 2).norm() / expected.norm() < 1e-4


def divides_errors(group: Group, folder: Path) -> None:
    """Saved by another number of ranks, three or one, the errors have the same mean."""
    for method in METHODS:
        _, exchange = started(method, group)
        for saved_by in (1, 3):
            expected: dict[str, Any] = dict.fromkeys(exchange.errors, 0)
            for rank in range(saved_by):
                errors = {n: gradient(saved_by, rank, n, e.shape) for n, e in exchange.errors.items()}
                factors = {name: torch.full_like(f, saved_by) for name, f in exchange.factors.items()}
                expected = {name: expected[name] + errors[name] / saved_by for name in errors}
                if group.rank == 0:
                    torch.save({"errors": errors, "factors": factors}, folder / compression_name(rank))
            group.barrier()
            exchange.load(folder, saved_by)
            for name, mean in mean_error(exchange).items():
                torch.testing.assert_close(mean, expected[name])
            assert all((factor == saved_by).all() for factor in exchange.factors.values())


def goes_on_to_the_bit(group: Group, folder: Path) -> None:
    """From a checkpoint with the state of each rank, after steps that changed what is in memory."""
    for method in METHODS:
        engine, exchange = started(method, group)
        store = CheckpointStore(folder / method)
        if group.rank == 0:
            store.begin(1, "t")
        group.barrier()
        identity = Identity("data", "plan", 4, "model", "fp32", 0, group.world_size)
        for asynchronous in (True, False):
            ours = Snapshots(store, group, 1, "t", identity, store.root, asynchronous=asynchronous)
            ours.carry(exchange)
            first = 0 if asynchronous else 10
            trained(engine, group, range(first, first + 3))
            ours.save(engine, first + 3, {"seed": 0}, hurry=False, write_more=lambda folder: None)
            undisturbed = trained(engine, group, range(first + 3, first + 6))
            ours.finish()
            newest = ours.choose()
            assert newest is not None
            assert all((newest.path / compression_name(rank)).exists() for rank in (0, 1))
            ours.load(engine, newest)
            assert trained(engine, group, range(first + 3, first + 6)) == undisturbed


def trained(engine: Any, group: Group, steps: range) -> list[str]:
    """The sum of the weights after each step, to the last bit."""
    found = []
    for step in steps:
        averaged(engine, group, step)
        engine.step()
        found.append(sum(p.detach().double().sum().item() for p in engine.module.parameters()).hex())
    return found


def test_a_checkpoint_is_of_its_compression() -> None:
    said = [compression_of(TrainConfig(gradient_compression=name)) for name in ("none", *METHODS)]
    assert said == [None, "int8", "powersgd rank 4"]
    plain = Identity("d", "p", 4, "m", "bf16", 0, 2, {"gradient_compression": None})
    saved = plain.to_meta()
    del saved["gradient_compression"]
    plain.check(saved)  # of before there was any


WORDS = ("deepspeed.zero_stage=0", "resources.ranks_per_node=2", "train.num_steps=12", "train.precision=fp32")
SIZE = ("train.global_batch_size=4", "train.micro_batch_size=1", "data.seq_len=32", "checkpoint.save_every=4")


def run(root: Path, name: str, *words: str) -> RunDir:
    job = submit(root, name, *WORDS, *SIZE, *words)
    assert wait_over(job.run)[-1].cause is Cause.finished
    return job.run


def stopped_and_resumed(
    root: Path, name: str, after: int, *words: str, resumed: tuple[str, ...] = ()
) -> RunDir:
    held = until_stopped(root / name, after + 1)
    disturbed = submit(root, name, *WORDS, *SIZE, *words, env=held).run
    wait_step(disturbed, after)
    disturbed.stop.touch()
    assert [a.cause for a in wait_over(disturbed)] == [Cause.stopped]
    submit(root, name, "--resume", *resumed)
    assert wait_over(disturbed)[-1].cause is Cause.finished
    return disturbed


@pytest.mark.parametrize(
    "words",
    [
        ("train.gradient_compression=powersgd",),
        ("train.gradient_compression=int8", "train.precision=bf16", "checkpoint.asynchronous=false"),
    ],
    ids=METHODS,
)
def test_a_run_that_is_resumed_is_the_same_to_the_bit(tmp_path: Path, words: tuple[str, ...]) -> None:
    undisturbed = run(tmp_path, "whole", *words)
    disturbed = stopped_and_resumed(tmp_path, "cut", 5, *words)
    assert_same_run(disturbed, undisturbed)
    assert len(set(read_steps(disturbed).column("gradient_bytes"))) == 1
    assert all(read_steps(disturbed).column("gradient_bytes"))


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    words = ("train.gradient_compression=powersgd",)
    moved = stopped_and_resumed(tmp_path, "moved", 5, *words, resumed=("resources.ranks_per_node=1",))
    assert read_steps(moved).column("gradient_bytes")[-1] == 0, "one rank has nobody to send to"
    said = (moved.logs / "latest" / "rank_0.out").read_text()
    assert "the errors of 2 rank(s) are divided among 1, their mean as it was" in said


@pytest.mark.soak
def test_the_weights_divided_once_more_compute_the_same(tmp_path: Path) -> None:
    """ZeRO++'s hpZ: each two of four ranks keep all weights between them."""
    words = ("deepspeed.zero_stage=3", "resources.ranks_per_node=4", "train.num_steps=6")
    near = "deepspeed.extra={zero_optimization: {zero_hpz_partition_size: 2}}"
    base, hpz = (
        read_steps(run(tmp_path, name, *words, *more)) for name, more in (("base", ()), ("hpz", (near,)))
    )
    assert hpz.column("loss") == base.column("loss")
    assert hpz.column("gradient_bytes") == [None] * 6, "not counted under ZeRO"
