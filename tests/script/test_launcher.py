"""A launcher's command becomes settings of ours, or is refused by name."""

from pathlib import Path

import pytest

from r1hpc.base.errors import UsageError
from r1hpc.config.load import load
from r1hpc.config.schema.run import RunConfig
from r1hpc.script.launcher import split_command


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "pkg").mkdir()
    for name in ("train.py", "pkg/train.py"):
        (tmp_path / name).write_text("")
    (tmp_path / "a.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\nmixed_precision: bf16\nnum_machines: 2\n"
        "num_processes: 8\nmachine_rank: 0\nfsdp_config:\n  fsdp_offload_params: true\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def understood(command: str) -> RunConfig:
    words, overrides = split_command(command.split())
    files = [word for word in words if word.endswith(".py")]
    return load(files[0], [*(word for word in words if "=" in word), *overrides])


def test_torchrun() -> None:
    config = understood("torchrun --nnodes=2 --nproc-per-node 4 --rdzv_endpoint=a:1 train.py --lr 1 -- x=2")
    assert (config.resources.nodes, config.resources.gpus_per_node) == (2, 4)
    assert config.script.args == ["--lr", "1", "--", "x=2"]
    assert config.script.distributed
    on_cpu = understood(
        "resources.gpus_per_node=0 python -m torch.distributed.run --nproc_per_node 2 train.py"
    )
    assert (on_cpu.resources.gpus_per_node, on_cpu.resources.ranks_per_node) == (0, 2)


def test_accelerate_launch_with_a_config_file() -> None:
    config = understood("accelerate launch --config_file a.yaml train.py --seed 3")
    assert (config.resources.nodes, config.resources.gpus_per_node) == (2, 4)
    assert config.script.env == {
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_OFFLOAD_PARAMS": "true",
    }
    cpu = understood("accelerate launch --cpu --num_processes 2 --mixed_precision bf16 train.py")
    assert (cpu.resources.gpus_per_node, cpu.resources.ranks_per_node) == (0, 2)
    assert cpu.script.env["ACCELERATE_MIXED_PRECISION"] == "bf16"


def test_what_accelerate_config_writes_for_nothing_is_dropped_and_the_rest_refused(folder: Path) -> None:
    usual = (
        "compute_environment: LOCAL_MACHINE\ndebug: false\ndistributed_type: MULTI_GPU\ndowncast_bf16: 'no'\n"
    )
    usual += "main_training_function: main\nnum_machines: 1\nnum_processes: 2\ntpu_env: []\nuse_cpu: false\n"
    (folder / "b.yaml").write_text(usual)
    assert understood("accelerate launch --config_file b.yaml train.py").script.env == {}
    (folder / "b.yaml").write_text(usual.replace("debug: false", "debug: true"))
    carried = understood("accelerate launch --config_file b.yaml train.py")
    assert carried.script.env == {"ACCELERATE_DEBUG_MODE": "true"}
    for line in ("downcast_bf16: true", "tpu_use_sudo: true", "enable_cpu_affinity: true", "tpu_env: [A=1]"):
        (folder / "b.yaml").write_text(f"num_machines: 1\n{line}\n")
        with pytest.raises(UsageError, match=f"accelerate {line.partition(':')[0]}=.* is not carried over"):
            understood("accelerate launch --config_file b.yaml train.py")
    with pytest.raises(UsageError, match="deepspeed hostfile=hosts is not carried over"):
        split_command(["deepspeed", "--hostfile", "hosts", "train.py"])


def test_deepspeed_hands_the_local_rank_in() -> None:
    config = understood("deepspeed --num_gpus 4 train.py --deepspeed ds.json")
    assert config.resources.gpus_per_node == 4
    assert config.script.args == ["--local_rank={local_rank}", "--deepspeed", "ds.json"]


@pytest.mark.parametrize(
    "command", ["python -m pkg.train --lr 1", "-m pkg.train --lr 1", "python -u -m pkg.train --lr 1"]
)
def test_a_module(command: str) -> None:
    config = understood(command)
    assert (config.script.module, config.script.args) == ("pkg.train", ["--lr", "1"])
    assert Path(str(config.script.path)).samefile("pkg/train.py")


def test_a_script_alone_is_as_before() -> None:
    assert split_command(["train.py", "-N", "2", "--", "--lr", "1"]) == (
        ["train.py", "-N", "2"],
        ['script.args=["--lr", "1"]'],
    )
    assert split_command(["-J", "torchrun", "smoke"]) == (["-J", "torchrun", "smoke"], [])


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            "torchrun --max_restarts 3 train.py",
            "torchrun max_restarts=3 is not carried over.*limits.max_crashes",
        ),
        ("torchrun --nnodes 1:4 train.py", "whole numbers"),
        ("accelerate launch --fp8_format E4M3 train.py", "accelerate fp8_format=E4M3 is not carried over"),
        ("accelerate launch --num_machines 2 --num_processes 3 train.py", "does not divide"),
        ("accelerate config", "submit understands `accelerate launch`"),
        ("torchrun --nproc_per_node 2", "names no script"),
        ("python -m pkg.other", r"there is no pkg/other.py in"),
    ],
)
def test_what_cannot_be_carried_over_is_refused_by_name(command: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        split_command(command.split())


def test_a_module_is_started_as_one(tmp_path: Path) -> None:
    from r1hpc.base.run_dir import RunDir
    from r1hpc.script.rank import command_of

    config = understood("-m pkg.train --rank={rank} {local_rank} {world_size}")
    command = command_of(RunDir(tmp_path), config, None, (5, 1, 8))
    assert command[1:] == ["-u", "-m", "pkg.train", "--rank=5", "1", "8"]
    assert Path(command[0]).is_absolute()
