"""What ends a run at a step, and what one update waits for."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from r1hpc.base.run_dir import RunDir
from r1hpc.config.schema.rl import EvaluateConfig
from r1hpc.config.schema.run import Precision, RunConfig, TrainConfig
from r1hpc.train.checkpoint import async_save
from r1hpc.train.loop import step as loop_step
from r1hpc.train.loop.session import Agreement
from r1hpc.train.loop.step import _check_finite
from r1hpc.train.parallel.distributed import Group
from r1hpc.train.parallel.engine import _has_bf16
from r1hpc.train.parallel.errors import NonFiniteError
from r1hpc.train.rl.rl import RlStage

ALONE = Group(0, 0, 1, torch.device("cpu"))


def session(precision: Precision) -> Any:
    job = SimpleNamespace(config=RunConfig(train=TrainConfig(precision=precision)), group=ALONE)
    return SimpleNamespace(job=job, skipped_in_a_row=0)


def test_an_update_that_deepspeed_left_out_ends_a_run_that_is_not_in_fp16() -> None:
    """The norm beside it is that of the step before, in some versions of DeepSpeed."""
    fine = Agreement(loss=1.0, stop=False, save=False, failed_ranks=0, sums=())
    _check_finite(session(Precision.fp16), 3, fine, 1.0, 2.8, skipped=True)
    _check_finite(session(Precision.bf16), 3, fine, 1.0, 2.8, skipped=False)
    with pytest.raises(NonFiniteError, match="step 3: DeepSpeed skipped the update"):
        _check_finite(session(Precision.bf16), 3, fine, 1.0, 2.8, skipped=True)


def test_the_smallest_loss_scale_is_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    this = session(Precision.fp16)
    this.engine = SimpleNamespace(skipped_steps=0, optimizer=SimpleNamespace(param_groups=[]))

    def step_that_raises(error: Exception) -> None:
        def accumulate(*_: Any) -> None:
            raise error

        monkeypatch.setattr(loop_step, "accumulate", accumulate)
        loop_step.optimizer_step(this, 9, [], list)

    with pytest.raises(NonFiniteError, match="step 9: fp16 overflows"):
        step_that_raises(Exception("Current loss scale already at minimum - cannot decrease scale anymore"))
    with pytest.raises(RuntimeError, match="something else"):
        step_that_raises(RuntimeError("something else"))


def test_bf16_that_is_emulated_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch answers on a V100."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    gpu = SimpleNamespace(device_name=lambda: "cuda", is_bf16_supported=torch.cuda.is_bf16_supported)
    assert not _has_bf16(gpu)
    assert _has_bf16(SimpleNamespace(device_name=lambda: "cpu", is_bf16_supported=lambda: True))


def test_an_evaluation_is_the_first_thing_of_the_step_after() -> None:
    """When the checkpoint of its own step is on its way; not again where the attempt began with it."""
    asked: list[int] = []

    class HeldOut:
        def evaluate(self, network: object, step: int) -> bool:
            asked.append(step)
            return False

    config = RunConfig(stage="rl", evaluate=EvaluateConfig(every=2))
    job: Any = SimpleNamespace(config=config, group=ALONE, run=RunDir("run"), attempt=1, token="token")
    stage = RlStage(job, None, None, None, HeldOut())  # type: ignore[arg-type]
    this: Any = SimpleNamespace(first_step=3)
    with pytest.raises(AttributeError):  # goes on to what is not there
        stage.take_step(this, 3)
    assert asked == []
    assert stage.take_step(this, 5) is None, "a stop was requested in the evaluation of step 4"
    assert asked == [4]
    with pytest.raises(AttributeError):
        stage.take_step(this, 6)
    assert asked == [4]


def test_a_write_that_goes_on_is_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_save, "_LOOK_S", 0.02)
    beats: list[int] = []

    def slowly(write: async_save.Write) -> async_save.Records:
        for _ in range(5):
            write.wrote()
            assert not write.stop.wait(0.1)
        return []

    def then_nothing(write: async_save.Write) -> async_save.Records:
        write.stop.wait(0.5)
        return []

    for number, work in enumerate((slowly, then_nothing)):
        exchange = async_save.Exchange(ALONE)
        write = async_save.Write(1, number, exchange, work, lambda reports: 0, lambda: None)
        write.wait_for_own(lambda number=number: beats.append(number))  # type: ignore[misc]
        write.wait(hurry=False)
    assert 3 <= beats.count(0) <= 5
    assert beats.count(1) == 0
