"""`doctor` finds each fault that is planted, with real parts where they can be had, and invents none."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from r1hpc.site.cluster import judge_cluster
from r1hpc.site.findings import CheckState
from r1hpc.site.node import NodeFacts, judge_node
from r1hpc.site.nodes import Answers, NodeReport, judge_nodes, pieces_of, read_reports, texts_of
from r1hpc.site.peers import PeerFacts
from r1hpc.site.profile import _gpu_type
from r1hpc.site.storage import StorageFacts, judge_storage
from r1hpc.site.versions import VersionFacts, judge_versions
from r1hpc.slurm.probe import ClusterFacts
from tests import nvml_stub
from tests.cluster import Cluster
from tests.slurm.test_probe import CONFIG, NODES, PARTITIONS, QOS

ROOT = Path(__file__).resolve().parents[2]
Findings = dict[str, dict[str, str]]


def doctor(root: Path, *words: str, status: int = 0, **env: Any) -> Findings:
    """The findings of the command by check; those that are not ok win over those that are."""
    done = subprocess.run(
        [sys.executable, "-m", "r1hpc.doctor", "--run-root", str(root), "--json", *words],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    found = json.loads(done.stdout)["findings"]
    assert all(set(each) == {"check", "state", "detail", "fix"} for each in found)
    assert all(each["fix"] for each in found if each["state"] in ("warn", "fail"))
    return {each["check"]: each for each in sorted(found, key=lambda each: str(each["state"] != "ok"))}


def bad(found: Findings) -> dict[str, str]:
    """What is not well; the disk of a busy machine may be slow, which is judged by itself below."""
    states = {name: each["state"] for name, each in found.items() if name != "run root speed"}
    return {name: state for name, state in states.items() if state in ("warn", "fail")}


@pytest.fixture(scope="session")
def faults(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The library to preload."""
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    source = Path(__file__).with_name("faults.c")
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return str(library)


def test_a_healthy_machine_has_no_fault(tmp_path: Path) -> None:
    found = doctor(tmp_path, "jobs/smoke.yaml")
    assert bad(found) == {}
    assert {"packages", "run root space", "file locks", "atomic rename", "/dev/shm", "ports"} <= set(found)
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


def test_a_quota_that_is_exceeded_here_or_elsewhere(tmp_path: Path) -> None:
    """`quota -q` names each file system that is over; that of the run root alone keeps a run from writing."""
    df = ["df", "--output=source,target", str(tmp_path)]
    here = subprocess.run(df, capture_output=True, text=True, check=True).stdout.splitlines()[1].split()
    program = tmp_path / "quota"
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for place, wrong in (
        ("nas:/export/home", {"quota": "warn"}),
        (f"{here[0]}-of-others", {"quota": "warn"}),
        *((name, {"run root space": "fail"}) for name in here),
    ):
        said = f"Disk quotas for user me (uid 1000): \\n\\tOver block quota on {place}"
        program.write_text(f"#!/bin/sh\nprintf '{said}\\n'\nexit 1\n")
        program.chmod(0o700)
        found = doctor(tmp_path / "runs", status=int("fail" in wrong.values()), **env)
        assert bad(found) == wrong
        assert place in found[next(iter(wrong))]["detail"]


def test_no_locks(tmp_path: Path, faults: str) -> None:
    found = doctor(tmp_path, status=1, LD_PRELOAD=faults, R1HPC_TEST_NO_LOCKS="1")
    assert bad(found) == {"file locks": "fail"}
    assert "No locks available" in found["file locks"]["detail"]


def test_a_clock_that_is_ahead_of_the_file_server(tmp_path: Path, faults: str) -> None:
    found = doctor(tmp_path, LD_PRELOAD=faults, R1HPC_TEST_SKEW_S="90")
    assert bad(found) == {"file server clock": "warn"}


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


@pytest.mark.skipif(shutil.which("munge") is None, reason="munge is not installed")
def test_a_dead_munge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real client, led to a socket where nobody listens."""
    from r1hpc.site.node import collect_node

    program = tmp_path / "munge"
    program.write_text(f'#!/bin/sh\nexec {shutil.which("munge")} --socket={tmp_path}/none "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = {each.check: each for each in judge_node(collect_node(), None)}
    assert found["munge"].state is CheckState.fail
    assert "none" in found["munge"].detail
    assert "munge" not in {each.check for each in judge_node(collect_node(), None, uses_munge=False)}


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


def played_step(count: int, ports: list[int], shared: Path, **of_last: str) -> Answers:
    """The node part in one process a node, as srun starts it; the nodes are addresses of this machine."""
    names = [f"127.0.0.{number + 1}" for number in range(count)]
    order = json.dumps({"interface": None, "ports": ports, "shared": str(shared)})
    processes = []
    for rank, name in enumerate(names):
        mine = {"SLURM_STEP_NODELIST": ",".join(names), "SLURM_NODEID": str(rank), "SLURMD_NODENAME": name}
        env = {**os.environ, **mine, **(of_last if rank == count - 1 else {})}
        command = [sys.executable, "-m", "r1hpc.doctor", "--node-part", order]
        processes.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True))
    said = "".join(process.communicate(timeout=60)[0] for process in processes)
    files = tuple(path.name.removeprefix("node-") for path in shared.glob("node-*"))
    return Answers(tuple(read_reports(said)), "", files)


def judged(answers: Answers, count: int) -> dict[str, str]:
    findings = judge_nodes(answers, count, None, uses_munge=False)
    order = ("ok", "unknown", "warn", "fail")
    return {
        each.check: each.state.value for each in sorted(findings, key=lambda each: order.index(each.state))
    }


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    """A run root's folder with a file that is locked, as the caller of the nodes keeps it."""
    import fcntl

    with (tmp_path / "held").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield tmp_path


def test_nodes_that_agree(shared: Path) -> None:
    from r1hpc.site.nodes import _free_ports

    found = judged(played_step(3, _free_ports(), shared), 3)
    assert {name: state for name, state in found.items() if state in ("warn", "fail")} == {}
    assert found["clocks"] == found["shared run root"] == found["nodes reach one another"] == "ok"


def test_reports_whose_lines_srun_mixes_are_put_together() -> None:
    """A node with eight GPUs says six times what srun carries in one message."""
    gpus = [{"name": f'NVIDIA "A100" {"x" * 600}', "index": index} for index in range(8)]
    texts = [json.dumps({"node": name, "gpus": gpus}) for name in ("n1", "n2")]
    lines = [list(pieces_of(number, text)) for number, text in enumerate(texts)]
    assert max(len(line) for each in lines for line in each) < 1000
    mixed = [line for pair in zip(*lines, strict=True) for line in reversed(pair)]
    assert list(texts_of("\n".join(["welcome", *mixed]))) == texts
    assert list(texts_of("\n".join(mixed[:-1]))) == texts[1:], "a piece of the first is missing"


def test_a_node_with_a_skewed_clock(shared: Path, faults: str) -> None:
    from r1hpc.site.nodes import _free_ports

    answers = played_step(3, _free_ports(), shared, LD_PRELOAD=faults, R1HPC_TEST_SKEW_S="90")
    found = judged(answers, 3)
    assert {name: state for name, state in found.items() if state in ("warn", "fail")} == {"clocks": "fail"}
    assert answers.reports[-1].peers.clock_offset_s == pytest.approx(-90, abs=1)


def reports(**second: Any) -> Answers:
    versions = VersionFacts("3.11", "python", {"torch": "2.9"})
    nodes = [NodeFacts(name, versions, shm_bytes=2**34, shm_free_bytes=2**34) for name in ("n1", "n2")]
    peers = [
        PeerFacts("n2", "eth0", sees_file=True),
        PeerFacts(**{"peer": "n1", "interface": "eth0", **second}),
    ]
    return Answers(tuple(map(NodeReport, nodes, peers)), "", ("n1", "n2"))


def test_nodes_that_do_not_meet() -> None:
    assert judged(reports(sees_file=False), 2)["shared run root"] == "fail"
    assert judged(reports(unreachable="no route"), 2)["nodes reach one another"] == "fail"
    assert judged(reports(lock_respected=False), 2)["locks between nodes"] == "warn"
    assert judged(Answers((), "execve(): python: No such file or directory"), 2)["nodes"] == "fail"


@pytest.fixture
def one_node(tmp_path: Path) -> dict[str, Any]:
    """The environment of an allocation of this machine alone: srun drops its own options, starts the rest."""
    folder = tmp_path / "srun"
    folder.mkdir()
    lines = ("while [[ $1 == --* ]]; do shift; done", 'SLURM_NODEID=0 SLURMD_NODENAME=n1 exec "$@"')
    (folder / "srun").write_text("\n".join(("#!/bin/bash", *lines)))
    (folder / "srun").chmod(0o700)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n1"}
    return {"PATH": f"{folder}:{os.environ['PATH']}", **job}


def test_nodes_without_locks_are_looked_at_all_the_same(
    tmp_path: Path, faults: str, one_node: dict[str, Any]
) -> None:
    no_locks = {"LD_PRELOAD": faults, "R1HPC_TEST_NO_LOCKS": "1"}
    found = doctor(tmp_path / "runs", "--nodes", "1", status=1, **one_node, **no_locks)
    assert bad(found) == {"file locks": "fail"}
    assert found["shared run root"]["detail"] == "files are seen from every node"
    found = doctor(tmp_path / "runs", "--nodes", "1", **one_node)
    assert found["shared run root"]["detail"] == "files and locks are seen from every node"


def test_a_lock_that_nobody_holds_is_not_judged() -> None:
    answers = replace(reports(lock_respected=False), is_locked=False)
    assert "locks between nodes" not in judged(answers, 2)


def test_nodes_are_looked_at_after_the_lines_of_the_profile(tmp_path: Path, one_node: dict[str, Any]) -> None:
    """A python that only `setup` brings, and a variable; the lines are given no words, as in a job script."""
    program = tmp_path / "modules" / "nodes-python"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    program.chmod(0o700)
    profile = {
        "name": "mine",
        "python": program.name,
        "setup": ["[ $# = 0 ] || exit 1", f"PATH={program.parent}:$PATH"],
        "environment": {"GLOO_SOCKET_IFNAME": "ib 7"},
    }
    site = tmp_path / "site.yaml"
    site.write_text(yaml.safe_dump(profile))
    found = doctor(tmp_path / "runs", "--nodes", "1", "--cluster", str(site), status=1, **one_node)
    assert bad(found) == {"network interface": "fail"}
    assert "GLOO_SOCKET_IFNAME names ib 7" in found["network interface"]["detail"]


def test_of_an_image_the_host_says_nothing(tmp_path: Path, one_node: dict[str, Any]) -> None:
    image = tmp_path / "r1.sif"
    image.touch()
    site = tmp_path / "site.yaml"
    site.write_text(f"name: mine\ncontainer:\n  image: {image}\n")
    env = {**one_node, "LD_PRELOAD": str(tmp_path / "libnccl.so")}
    for words in ((), ("--nodes", "1")):
        found = doctor(tmp_path / "runs", "--cluster", str(site), *words, **env)
        for check in ("packages", "torch and driver", "NCCL"):
            assert found[check]["state"] == "unknown"
            assert f"ranks run in {image}" in found[check]["detail"]


def test_nodes_whose_packages_differ_are_no_fault_of_an_image() -> None:
    first, second = reports().reports
    other = replace(second.node, versions=replace(second.node.versions, packages={"torch": "2.8"}))
    answers = replace(reports(), reports=(first, replace(second, node=other)))
    states = []
    for image in (None, "r1.sif"):
        found = judge_nodes(answers, 2, None, uses_munge=False, image=image)
        states += [each.state.value for each in found if each.check == "sameness"]
    assert states == ["fail", "ok"]


def test_nodes_outside_an_allocation_are_refused(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    command = [sys.executable, "-m", "r1hpc.doctor", "--nodes", "2", "--run-root", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "salloc --nodes=2" in done.stderr


def test_a_profile_is_written_once_and_read_back(tmp_path: Path) -> None:
    from r1hpc.config.load import load

    path = tmp_path / "mine.yaml"
    doctor(tmp_path / "runs", "--write-profile", str(path))
    assert load("jobs/smoke.yaml", cluster=str(path)).cluster.python == sys.executable
    command = [
        sys.executable,
        "-m",
        "r1hpc.doctor",
        "--write-profile",
        str(path),
        "--run-root",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, "exists" in done.stderr) == (2, True)


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, Any]:
    """The environment of a login node whose Slurm says what was recorded; the default QOS is scavenger."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    said = {
        "config": f"{CONFIG}AuthType = auth/none\nClusterName = near\n",
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
    assert states["clocks"] == states["shared run root"] == states["munge"] == states["sameness"] == "ok"
    assert [e["check"] for e in found["wrong"]["findings"] if e["state"] == "fail"] == ["network interface"]
