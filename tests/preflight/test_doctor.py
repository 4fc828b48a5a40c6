"""`doctor` finds each fault that is planted, with real parts where they can be had, and invents none."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from r1hpc.base.errors import ConfigError
from r1hpc.preflight.findings import CheckState
from r1hpc.preflight.node import NodeFacts, judge_node
from r1hpc.preflight.profile import _gpu_type
from r1hpc.preflight.run_all import judge_cluster
from r1hpc.preflight.storage import StorageFacts, judge_storage
from r1hpc.preflight.versions import VersionFacts, judge_versions
from r1hpc.slurm.probe import ClusterFacts
from tests import nvml_stub
from tests.cluster import Cluster
from tests.preflight.doctors import ROOT, bad, doctor
from tests.slurm.test_probe import CONFIG, NODES, PARTITIONS, QOS


def test_a_healthy_machine_has_no_fault(tmp_path: Path) -> None:
    found = doctor(tmp_path, "jobs/smoke.yaml")
    assert bad(found) == {}
    assert {"packages", "run root space", "file locks", "/dev/shm"} <= set(found)
    assert list(tmp_path.iterdir()) == []


def test_idle_gpus_are_well(tmp_path: Path) -> None:
    """A CPU build of torch beside GPUs is what this machine's environment really is."""
    env = nvml_stub.environment("gpus=2;profile=idle")
    found = doctor(tmp_path, status=1, **env)
    assert "CPU build" in found["torch and driver"]["detail"]
    assert "GPU health" not in found


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True)
    if made.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_run_root(small_disk: Path) -> None:
    found = doctor(small_disk, status=1)
    assert found["run root space"]["state"] == "fail"
    assert "No space left" in found["run root space"]["detail"]
    assert set(bad(found)) == {"run root space"}


def test_a_run_root_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert bad(doctor(tmp_path / "file", status=1)) == {"run root": "fail"}


def test_no_locks(tmp_path: Path, faults: str) -> None:
    found = doctor(tmp_path, status=1, LD_PRELOAD=faults, R1HPC_TEST_NO_LOCKS="1")
    assert bad(found) == {"file locks": "fail"}
    assert "No locks available" in found["file locks"]["detail"]


@pytest.mark.parametrize("variable", ["NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"])
def test_an_interface_that_is_not_there(tmp_path: Path, variable: str) -> None:
    found = doctor(tmp_path, status=1, **{variable: "ib7"})
    assert bad(found) == {"network interface": "fail"}
    assert "ib7" in found["network interface"]["detail"]
    assert bad(doctor(tmp_path, status=0, **{variable: "lo"})) == {}


def test_an_interface_of_the_profile_that_is_not_there(tmp_path: Path, one_node: dict[str, Any]) -> None:
    """A fault of a node; a login node need not have it, also where `salloc` runs there."""
    profile = tmp_path / "site.yaml"
    profile.write_text("name: mine\nnetwork_interface: ib7\n")
    words = ("--cluster", str(profile))
    login = doctor(tmp_path, *words, **one_node, SLURMD_NODENAME="")["network interface"]
    assert (login["state"], "this machine has no ib7" in login["detail"]) == ("unknown", True)
    inside_job = doctor(tmp_path, *words, status=1, SLURMD_NODENAME="n1")
    on_nodes = doctor(tmp_path, *words, "--nodes", "1", status=1, **one_node)
    assert bad(inside_job) == bad(on_nodes) == {"network interface": "fail"}


@pytest.mark.parametrize(
    ("settings", "check", "words"),
    [
        ("gpus=4;2.profile=busy;2.processes=3", "GPUs busy", "GPU 2: 3 processes"),
        ("gpus=4;1.ecc_uncorrected=5", "GPU health", "GPU 1: 5 uncorrected memory errors"),
        ("gpus=4;3.lost_after=1", "GPU health", "gpu is lost"),
        ("gpus=2;0.throttle=0x40", "GPU health", "slowed by hw_thermal_slowdown"),
    ],
)
def test_busy_and_sick_gpus(tmp_path: Path, settings: str, check: str, words: str) -> None:
    found = doctor(tmp_path, status=1, **nvml_stub.environment(f"profile=idle;{settings}"))
    assert words in found[check]["detail"]


def test_packages_that_clash(tmp_path: Path) -> None:
    """A transformers that wants a tokenizers of long ago, found before the real one."""
    info = tmp_path / "site" / "transformers-9.9.dist-info"
    info.mkdir(parents=True)
    text = "Metadata-Version: 2.1\nName: transformers\nVersion: 9.9\nRequires-Dist: tokenizers<0.1\n"
    (info / "METADATA").write_text(text)
    found = doctor(tmp_path, status=1, PYTHONPATH=f"{info.parent}:{os.environ.get('PYTHONPATH', '')}")
    assert bad(found) == {"packages": "fail"}
    assert "transformers needs tokenizers<0.1" in found["packages"]["detail"]


def test_little_shared_memory() -> None:
    facts = NodeFacts("n1", VersionFacts("3.11", "python"), shm_bytes=64 * 2**20, shm_free_bytes=64 * 2**20)
    states = {each.check: each.state for each in judge_node(facts, None)}
    assert states["/dev/shm"] is CheckState.fail


@pytest.mark.parametrize(
    ("cuda", "driver", "state"),
    [
        ("13.0", "550.54.15", "fail"),
        ("12.4", "550.54.15", "ok"),
        ("12.8", "525.60.13", "ok"),
        ("12.4", "470.1", "fail"),
    ],
)
def test_a_driver_too_old_for_torch(cuda: str, driver: str, state: str) -> None:
    facts = VersionFacts("3.11", "python", {"torch": "2.9"}, torch_cuda=cuda)
    found = {each.check: each.state.value for each in judge_versions(facts, driver, 8)}
    assert found["torch and driver"] == state


def test_checkpoints_that_do_not_fit_and_a_slow_disk() -> None:
    facts = StorageFacts("/runs", free_bytes=50 * 2**30, written_bytes=2**26, write_s=4.0)
    states = {each.check: each.state for each in judge_storage(facts, needed_bytes=60 * 2**30)}
    assert states["run root space"] is CheckState.fail
    assert states["run root speed"] is CheckState.warn


def test_slurm_settings() -> None:
    facts = ClusterFacts(
        version="24.11", partition="p", preempt_type="preempt/qos", preempt_mode="REQUEUE", grace_s=10,
        kill_wait_s=30, job_requeue=False, max_time_s=600,
    )  # fmt: skip
    states = {each.check: each.state.value for each in judge_cluster(facts, True)}
    assert states == {"Slurm": "ok", "time limit": "warn", "preemption": "warn", "requeue": "warn"}
    assert judge_cluster(ClusterFacts(unknown=("config: no answer",)), True)[0].state is CheckState.fail
    assert judge_cluster(ClusterFacts(), False)[0].state is CheckState.unknown


def judged(check: str, **facts: Any) -> Any:
    usual = {
        "version": "24.11",
        "partition": "p",
        "preempt_type": "preempt/qos",
        "grace_s": 20,
        "kill_wait_s": 30,
    }
    return next(e for e in judge_cluster(ClusterFacts(**{**usual, **facts}), True) if e.check == check)


@pytest.mark.parametrize("mode", ["GANG,SUSPEND", "SUSPEND,GANG", "SUSPEND", "GANG"])
def test_a_mode_that_pauses_jobs_ends_none(mode: str) -> None:
    found = judged("preemption", preempt_mode=mode)
    assert (found.state, found.fix) == (CheckState.ok, "")
    assert "paused in place" in found.detail
    assert "GPUs" in found.detail
    assert "20 s" not in found.detail
    assert judged("preemption", preempt_mode="GANG,REQUEUE").state is CheckState.warn


@pytest.mark.parametrize("most", [0, 1])
def test_a_cluster_that_holds_jobs_at_once(most: int) -> None:
    found = judged("requeue", max_batch_requeue=most)
    assert (found.state, f"MaxBatchRequeue={most}" in found.detail) == (CheckState.warn, True)
    assert "its job stays held" in found.detail
    assert "scancel" in found.fix
    usual = judged("requeue", max_batch_requeue=5)
    assert (usual.state, "after 5 failed launches" in usual.detail) == (CheckState.ok, True)


def test_a_profile_is_written_once_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into a folder that is made for it, called after its file, and found by that name."""
    from r1hpc.config.load import load

    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / ".config" / "r1hpc" / "cluster" / "mine.yaml"
    doctor(tmp_path / "runs", "--write-profile", str(path))
    found = load("jobs/smoke.yaml", cluster="mine").cluster
    assert (found.python, found.name) == (sys.executable, "mine")
    with pytest.raises(
        ConfigError, match=rf"no cluster profile 'mina' \(did you mean 'mine'.*in {path.parent}/"
    ):
        load("jobs/smoke.yaml", cluster="mina")
    command = [sys.executable, "-m", "r1hpc.doctor", "--run-root", str(tmp_path), "--write-profile"]
    for wrong, said in ((path, "exists"), (path / "under" / "it.yaml", "name a file that you can write")):
        done = subprocess.run([*command, wrong], cwd=ROOT, capture_output=True, text=True, check=False)
        assert (done.returncode, said in done.stderr) == (2, True), done.stderr


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, Any]:
    """The environment of a login node whose Slurm says what was recorded; the default QOS is scavenger."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    said = {
        "config": f"{CONFIG}ClusterName = near\n",
        "partition": PARTITIONS,
        "qos": QOS,
        "assoc": "scavenger|normal,scavenger||lab||near\n",
        "sinfo": NODES,
    }
    for name, text in said.items():
        (folder / f"{name}.txt").write_text(text)
    words = {"scontrol": "$2", "sacctmgr": "$3", "sinfo": "sinfo", "sbatch": "config"}
    for name, word in words.items():
        (folder / name).write_text(f"#!/bin/bash\nexec cat {folder}/{word}.txt\n")
        (folder / name).chmod(0o700)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


def written_profile(tmp_path: Path, *words: str, **env: Any) -> dict[str, Any]:
    path = tmp_path / "mine.yaml"
    path.unlink(missing_ok=True)
    doctor(tmp_path / "runs", "--write-profile", str(path), *words, **env)
    return dict(yaml.safe_load(path.read_text()))


def test_a_profile_pins_no_qos_that_nobody_named(tmp_path: Path, slurm: dict[str, Any]) -> None:
    assert "scavenger" in doctor(tmp_path, **slurm)["Slurm"]["detail"]
    assert "qos" not in written_profile(tmp_path, **slurm)
    site = tmp_path / "site.yaml"
    site.write_text("name: mine\nqos: urgent\n")
    assert written_profile(tmp_path, "--cluster", str(site), **slurm)["qos"] == "urgent"


def test_sbatchs_variables_count_as_for_a_submission(tmp_path: Path, slurm: dict[str, Any]) -> None:
    """Before the profile, after a flag; what they name is pinned as what a flag does."""
    site = tmp_path / "site.yaml"
    site.write_text("name: mine\npartition: main\nqos: normal\naccount: lab\n")
    named = {**slurm, "SBATCH_PARTITION": "debug", "SBATCH_QOS": "urgent", "SBATCH_ACCOUNT": "other"}
    profile = written_profile(tmp_path, "--cluster", str(site), **named)
    assert [profile[key] for key in ("partition", "qos", "account")] == ["debug", "urgent", "other"]
    assert "partition debug, QOS urgent" in doctor(tmp_path, **named)["Slurm"]["detail"]
    assert "partition main, QOS urgent" in doctor(tmp_path, "-p", "main", **named)["Slurm"]["detail"]


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("a100", "a100"),  # Slurm's name: of 40 GB or of 80, and a submission asks for which
        ("NVIDIA A100-SXM4-40GB", "a100-sxm4-40gb"),
        ("h100", "h100-sxm-80gb"),
        ("nonesuch", None),
        (None, None),
    ],
)
def test_a_profile_says_no_more_of_a_card_than_is_known(name: str | None, written: str | None) -> None:
    assert _gpu_type(name) == written


@pytest.mark.slurm
def test_on_a_real_cluster(idle_cluster: Cluster, tmp_path: Path) -> None:
    """None invented on four healthy nodes, and a wrong interface found on each of them."""
    command = f"{sys.executable} -m r1hpc.doctor --nodes 4 --json --run-root {tmp_path}"
    found = {}
    for name, setting in (("healthy", "true"), ("wrong", "export GLOO_SOCKET_IFNAME=ib7")):
        out = tmp_path / name
        script = f"cd {ROOT}; {setting}; {command} > {out}"
        job = idle_cluster.submit(script, "-N4", "--time=5", "--output=/dev/null")
        idle_cluster.wait_job(job, timeout=120)
        found[name] = json.loads(out.read_text())
    bad_checks = [each for each in found["healthy"]["findings"] if each["state"] == "fail"]
    assert bad_checks == []
    assert found["healthy"]["profile"]["network_interface"] == "eth0"
    states = {each["check"]: each["state"] for each in found["healthy"]["findings"]}
    assert states["clocks"] == states["shared run root"] == states["sameness"] == "ok"
    assert [e["check"] for e in found["wrong"]["findings"] if e["state"] == "fail"] == ["network interface"]
