"""`doctor --nodes`: each node of an allocation, and the nodes against one another."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from r1hpc.preflight import network
from r1hpc.preflight.network import PeerFacts
from r1hpc.preflight.node import NodeFacts
from r1hpc.preflight.nodes import Answers, judge_nodes, pieces_of, read_reports, texts_of
from r1hpc.preflight.versions import VersionFacts
from r1hpc.slurm.rank_env import choose_port
from tests.preflight.doctors import ROOT, bad, doctor


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
    findings = judge_nodes(answers, count, None)
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
    from r1hpc.preflight.nodes import _free_ports

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
    from r1hpc.preflight.nodes import _free_ports

    answers = played_step(3, _free_ports(), shared, LD_PRELOAD=faults, R1HPC_TEST_SKEW_S="90")
    found = judged(answers, 3)
    assert {name: state for name, state in found.items() if state in ("warn", "fail")} == {"clocks": "fail"}
    assert answers.nodes[-1].peers.clock_offset_s == pytest.approx(-90, abs=1)


def reports(**second: Any) -> Answers:
    versions = VersionFacts("3.11", "python", {"torch": "2.9"})
    peers = {"n1": PeerFacts("eth0", sees_file=True), "n2": PeerFacts(**{"interface": "eth0", **second})}
    nodes = (
        NodeFacts(name, versions, shm_bytes=2**34, shm_free_bytes=2**34, peers=seen)
        for name, seen in peers.items()
    )
    return Answers(tuple(nodes), "", ("n1", "n2"))


def test_nodes_that_do_not_meet() -> None:
    assert judged(reports(sees_file=False), 2)["shared run root"] == "fail"
    assert judged(reports(unreachable="no route"), 2)["nodes reach one another"] == "fail"
    assert judged(reports(lock_respected=False), 2)["locks between nodes"] == "warn"
    assert judged(Answers((), "execve(): python: No such file or directory"), 2)["nodes"] == "fail"


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
    first, second = reports().nodes
    other = replace(second, versions=replace(second.versions, packages={"torch": "2.8"}))
    answers = replace(reports(), nodes=(first, other))
    states = []
    for image in (None, "r1.sif"):
        found = judge_nodes(answers, 2, None, image=image)
        states += [each.state.value for each in found if each.check == "sameness"]
    assert states == ["fail", "ok"]


def test_nodes_outside_an_allocation_are_refused(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    command = [sys.executable, "-m", "r1hpc.doctor", "--nodes", "2", "--run-root", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "salloc --nodes=2" in done.stderr


def test_bytes_of_a_stranger_are_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "_PATIENCE_S", 1.0)
    with choose_port() as listener:
        listener.listen()

        def answer() -> None:
            while True:
                visitor, _ = listener.accept()
                visitor.sendall(b"\xff\xfb\x01\n")
                visitor.close()

        threading.Thread(target=answer, daemon=True).start()
        *_, why = network._ask_time("n1", "127.0.0.1", [listener.getsockname()[1]])
    assert "another program listens there" in str(why)
