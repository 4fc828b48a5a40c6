"""What a rank decides before a GPU is touched: which one is its own, how long groups wait, which kernels."""

import datetime
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from r1hpc.base.errors import R1hpcError
from r1hpc.config import load
from r1hpc.train.loop.step import accumulate
from r1hpc.train.parallel.distributed import device_index
from r1hpc.train.parallel.engine import deepspeed_config
from r1hpc.train.parallel.errors import TrainError
from r1hpc.train.rl.rollout import Sums, Tally
from tests.runs import CHECKOUT

_GROUPS = """
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from r1hpc.train.parallel import distributed
distributed.choose_accelerator(False)
distributed.join(0, 0, 1, HashStore(), use_gpu=False)
from deepspeed.utils import groups
import torch
for group in (dist.new_group([0]), groups._clone_world_group()):
    print(group._get_backend(torch.device("cpu")).options._timeout.total_seconds())
"""
_DETERMINISTIC = """
import os, torch
from r1hpc.train.parallel import distributed
distributed.be_deterministic()
print(torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
print(os.environ["CUBLAS_WORKSPACE_CONFIG"], os.environ["FLASH_ATTENTION_DETERMINISTIC"])
"""
_ANY_LENGTH = """
import torch
from r1hpc.train.parallel import distributed
print(torch.backends.cuda.cudnn_sdp_enabled())
distributed.attend_at_any_length()
print(torch.backends.cuda.cudnn_sdp_enabled())
"""


def python(code: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout.split()


def test_each_rank_has_a_gpu_of_its_own() -> None:
    assert [device_index(rank, 4) for rank in range(4)] == [0, 1, 2, 3]
    assert [device_index(rank, 1) for rank in range(4)] == [0, 0, 0, 0], "--gpus-per-task=1: its own"
    with pytest.raises(R1hpcError, match=r"sees only 2 GPUs, and two ranks must not share one"):
        device_index(2, 2)


def test_attention_needs_no_plan_for_each_length() -> None:
    assert python(_ANY_LENGTH) == ["True", "False"]


def test_groups_that_deepspeed_makes_wait_as_long_as_ours() -> None:
    day = datetime.timedelta(days=1).total_seconds()
    assert [float(each) for each in python(_GROUPS)[-2:]] == [day, day]


def test_a_backward_pass_takes_deterministic_kernels_or_fails() -> None:
    """Attention's are taken only where all else is an error."""
    modes = []

    class Engine:
        device = torch.device("cpu")

        def backward(self, loss: torch.Tensor) -> None:
            modes.append(torch.is_deterministic_algorithms_warn_only_enabled())
            if loss > 1:
                raise RuntimeError("f_cuda does not have a deterministic implementation.\nMore.")

        def step(self) -> None: ...

        optimizer = SimpleNamespace(_global_grad_norm=None)
        get_global_grad_norm = staticmethod(lambda: 1.0)

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        accumulate(Engine(), [torch.tensor(1.0)])
        with pytest.raises(TrainError, match=r"f_cuda .* implementation\. Take train\.deterministic=false"):
            accumulate(Engine(), [torch.tensor(2.0)])
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    accumulate(Engine(), [torch.tensor(1.0)])
    assert modes == [False, False, False]
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_deterministic_switch_reaches_torch_and_the_libraries() -> None:
    assert python(_DETERMINISTIC) == ["True", "True", ":4096:8", "1"]


def test_deepspeeds_timer_is_off_unless_it_is_asked_for() -> None:
    config = load.load("smoke")
    made = deepspeed_config(config, world_size=1, on_gpu=True, load_universal=False)
    assert made["timers"]["throughput"]["enabled"] is False
    asked = load.load("smoke", ['deepspeed.extra={"timers": {"throughput": {"enabled": true}}}'])
    made = deepspeed_config(asked, world_size=1, on_gpu=True, load_universal=False)
    assert made["timers"]["throughput"]["enabled"] is True


def test_a_tally_adds_up_in_float64_without_reading_the_device() -> None:
    tally = Tally()
    assert Sums(*tally.numbers()) == Sums(*Tally(has_mask=True).numbers()) == Sums(*[0.0] * len(fields(Sums)))
    for part in (1e8, 1.0):
        tally.add(tokens=torch.tensor(3), kl=torch.tensor(part))
    tally.add(value_loss=torch.tensor(2.0, requires_grad=True))
    sums = Sums(*tally.numbers())
    assert (sums.tokens, sums.kl, sums.value_loss, sums.entropy) == (6.0, 100_000_001.0, 2.0, 0.0)
    assert sums.per_token(sums.kl) == pytest.approx(100_000_001.0 / 6)
    unread = Tally()
    for _ in range(2):
        unread.add(tokens=torch.ones((), device="meta"))  # holds no value: whoever reads it fails
    with pytest.raises((RuntimeError, NotImplementedError)):
        unread.numbers()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
def test_a_rank_on_a_gpu_is_deterministic_when_asked(tmp_path: Path) -> None:
    from tests.runs import assert_same_run, submit, wait_over

    words = ("resources.gpus_per_node=1", "train.num_steps=6", "train.deterministic=true")
    first, second = (submit(tmp_path, name, *words).run for name in ("a", "b"))
    wait_over(first)
    wait_over(second)
    assert_same_run(second, first)
