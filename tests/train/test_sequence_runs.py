"""Whole runs whose ranks share their sequences: as on one rank, and resumed to the bit."""

from pathlib import Path
from typing import Any

import pytest

from r1hpc.base.run_dir import RunDir
from r1hpc.telemetry.records.attempts import Cause
from r1hpc.telemetry.records.metrics import read_events, read_steps
from tests.runs import assert_same_data, assert_same_run, submit, until_stopped, wait_over, wait_step
from tests.train.test_sft_packed import traces

pytestmark = [pytest.mark.timeout(600), pytest.mark.xdist_group("sequence-runs")]
SIZE: tuple[str, ...] = ("train.num_steps=8", "train.global_batch_size=4", "train.micro_batch_size=2")
SIZE += ("train.precision=fp32", "data.seq_len=64", "train.warmup_steps=1", "train.eps=1e-6")
SHARED = ("resources.ranks_per_node=2", "train.sequence_parallel=2")


def begun(root: Path, name: str, *words: str, env: Any = None) -> RunDir:
    return submit(root, name, *SIZE, *words, env=env).run


def finished(run: RunDir) -> RunDir:
    assert wait_over(run)[-1].cause is Cause.finished
    return run


def stopped(root: Path, name: str, *words: str) -> RunDir:
    run = begun(root, name, *words, env=until_stopped(root / name, 4))
    wait_step(run, 3)
    run.stop.touch()
    assert wait_over(run)[-1].cause is Cause.stopped
    return run


def assert_nearly(run: RunDir, other: RunDir) -> None:
    """The same samples, each once; losses and norms but for the order of sums."""
    assert_same_data(run, other)
    ours, theirs = read_steps(run).effective, read_steps(other).effective
    assert len(ours) == 8
    for step, record in ours.items():
        assert record.tokens == theirs[step].tokens
        for key in ("loss", "grad_norm"):
            assert record.value(key) == pytest.approx(theirs[step].value(key), rel=1e-5), (step, key)
    assert held_out_losses(run) == pytest.approx(held_out_losses(other), rel=1e-5)


def held_out_losses(run: RunDir) -> dict[int, float]:
    """Of a step at which a run was asked to stop the next attempt says it, by an event."""
    steps = {step: record.value("validation_loss") for step, record in read_steps(run).effective.items()}
    late = {e["global_step"]: e["validation_loss"] for e in read_events(run) if e["event"] == "validation"}
    return {step: loss for step, loss in {**steps, **late}.items() if loss is not None}


def test_stopped_and_resumed_it_is_the_same_run_to_the_bit(tmp_path: Path) -> None:
    alone = begun(tmp_path, "alone")
    undisturbed = begun(tmp_path, "undisturbed", *SHARED)
    disturbed = stopped(tmp_path, "disturbed", *SHARED)
    submit(tmp_path, "disturbed", "--resume")
    assert_same_run(finished(disturbed), finished(undisturbed))
    assert_nearly(undisturbed, finished(alone))


@pytest.mark.soak
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_fine_tuning_goes_on_with_another_sharing(tmp_path: Path, stage: int) -> None:
    """The loss on held-out documents too, and a model is left."""
    data = f'data.traces=["{traces(tmp_path)}"]'
    words: tuple[str, ...] = (data, "stage=sft", "model.tokenizer=characters", "data.seq_len=256")
    words += ("data.validation_documents=10", "train.validate_every=4", f"deepspeed.zero_stage={stage}")
    alone = begun(tmp_path, "alone", *words)
    moved = stopped(tmp_path, "moved", *words, *SHARED)
    submit(tmp_path, "moved", "--resume", "train.sequence_parallel=1")
    assert_nearly(finished(moved), finished(alone))
    assert set(held_out_losses(moved)) == {4, 8}
    assert (moved.model / "model.safetensors").exists()
