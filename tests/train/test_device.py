"""A job trains on the device it was given, whatever DS_ACCELERATOR the shell that submitted it had."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from r1hpc.telemetry.records.attempts import Cause
from tests.runs import CHECKOUT, submit, wait_over

_CHOOSE = """
from r1hpc.train.parallel.distributed import choose_accelerator
choose_accelerator({use_gpu})
import deepspeed
print(deepspeed.accelerator.get_accelerator().device_name())
"""
# Threads of torch and DeepSpeed may abort an interpreter that takes itself apart.
_LEAVE = "\nimport os, sys; sys.stdout.flush(); os._exit(0)"
_TOO_LATE = """
import deepspeed
from torch._C._distributed_c10d import HashStore
from r1hpc.base.errors import R1hpcError
from r1hpc.train.parallel.distributed import join
try:
    join(0, 0, 1, HashStore(), use_gpu=False)
except R1hpcError as error:
    print(error)
"""


def python(code: str, accelerator: str) -> str:
    environment = {**os.environ, "DS_ACCELERATOR": accelerator}
    command = [sys.executable, "-c", code + _LEAVE]
    done = subprocess.run(
        command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize(("use_gpu", "inherited", "chosen"), [(True, "cpu", "cuda"), (False, "cuda", "cpu")])
def test_deepspeed_takes_the_device_of_the_job(use_gpu: bool, inherited: str, chosen: str) -> None:
    assert python(_CHOOSE.format(use_gpu=use_gpu), inherited) == chosen


def test_a_device_that_was_fixed_too_early_is_refused() -> None:
    assert python(_TOO_LATE, "cuda").startswith("DeepSpeed was set to cuda before")


@pytest.mark.timeout(300)
def test_a_cpu_run_trains_on_the_cpu_of_a_machine_that_says_cuda(tmp_path: Path) -> None:
    trains_on(tmp_path, "cpu", gpus=0, inherited="cuda")


@pytest.mark.gpu
@pytest.mark.timeout(300)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
def test_a_gpu_run_trains_on_the_gpu_from_a_shell_that_says_cpu(tmp_path: Path) -> None:
    trains_on(tmp_path, "cuda", gpus=1, inherited="cpu")


def trains_on(root: Path, device: str, gpus: int, inherited: str) -> None:
    """DeepSpeed's device is checked against the job's by each rank, so a finished run is proof."""
    words = (f"resources.gpus_per_node={gpus}", "train.num_steps=2", "monitor.enabled=false")
    run = submit(root, "run", *words, env={**os.environ, "DS_ACCELERATOR": inherited}).run
    assert [attempt.cause for attempt in wait_over(run)] == [Cause.finished]
    assert f"on 1 rank(s), {device}," in run.rank_log(1, 0).read_text()
