"""Recorded run folders where there is no Slurm, a supervisor that is a real process, and a real Slurm."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import Cluster
from tests.commands.commands import Supervised
from tests.recorded import RecordedRun

SUPERVISOR = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
print("ready", flush=True)
while True: time.sleep(0.05)  # in pause() a signal from just before it would not be seen
"""


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A run root, in a place without Slurm and a fixed time zone."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("R1HPC_RUN_ROOT", str(tmp_path / "runs"))
        environment.setenv("PATH", str(tmp_path))
        environment.setenv("TZ", "Europe/Berlin")
        time.tzset()
        yield tmp_path / "runs"
    time.tzset()


@pytest.fixture
def finished(root: Path) -> RecordedRun:
    """Two attempts, ten steps lost between them."""
    made = RecordedRun(root / "demo", gpus=4, nodes=2)
    made.submit("4711", "slurm")
    made.attempt(1, 25, "node_fail", committed=15, detail="a node went\x1b[31m down", save_every=5)
    made.attempt(16, 40, "finished", committed=40, save_every=5)
    made.checkpoint(40)
    return made


@pytest.fixture
def supervised(root: Path) -> Iterator[Supervised]:
    """A run at step 20 of 40, and a process that stands for its local supervisor."""
    made = RecordedRun(root / "demo", num_steps=40)
    command = [sys.executable, "-c", SUPERVISOR, str(made.run.path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    made.submit(f"local-{process.pid}")
    made.begin(host=socket.gethostname())
    made.steps(1, 20)
    yield made, process
    process.kill()
    process.wait()


@pytest.fixture
def in_parts(root: Path) -> RecordedRun:
    """An evaluation at work: 7 of 100 parts are finished, 4 of them by its second attempt, in a minute."""
    made = RecordedRun(root / "asked", num_steps=100, gpus=4, stage="evaluate")
    made.submit("4711", "slurm")
    made.begin()
    made.parts(0, 2)
    made.end("preempted", committed=3)
    made.clock += 2
    made.begin(resumed_from=3)
    made.parts(3, 6, part_s=10.0, startup_s=20.0)
    return made


@pytest.fixture
def on_cluster(on_cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The cluster, for commands that this process runs itself; runs lie under tmp_path/runs."""
    monkeypatch.setenv("R1HPC_RUN_ROOT", str(tmp_path / "runs"))
    return on_cluster


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder whose bin/ is all of PATH that there is."""
    (tmp_path / "bin").mkdir()
    return tmp_path
