"""A server on a real Slurm: preempted, ended by its time limit, and its GPU-hours, by accounting.

    pytest tests/test_serve_slurm.py

A small server stands for vLLM (tests/serving/small_server.py); the GPUs are Slurm's, without a device.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from r1hpc.accounting.open_ledger import settled_ledger
from r1hpc.attempt.state.state import read_situation
from r1hpc.base.run_dir import RunDir
from r1hpc.serving.address import read_address
from r1hpc.telemetry.records.attempts import Cause
from tests.cluster import Cluster
from tests.runs import CHECKOUT, run_environment, wait_attempt, wait_over, wait_until
from tests.serving.clients import SMALL_SERVER, ask, key_of, make_model

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


def serve(root: Path, *words: str) -> tuple[RunDir, str]:
    """(run, url) of a server that answers, by the command a user takes."""
    where = ["--run-root", str(root / "runs"), "--json"]
    command = [sys.executable, "-m", "r1hpc.serve", *words, *where]
    done = subprocess.run(
        command, cwd=CHECKOUT, env=run_environment(), capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads(done.stdout)
    return RunDir(answer["run_dir"]), answer["url"]


def serve_model(root: Path, *words: str) -> tuple[RunDir, str]:
    model = make_model(root / "little")
    return serve(root, str(model), "--executor", "slurm", "--gpus", "2", "--python", SMALL_SERVER, *words)


def wait_answering(run: RunDir, attempt: int) -> str:
    """The URL of an attempt that answers."""

    def is_there() -> bool:
        address = read_address(run)
        return address is not None and address.attempt == attempt

    wait_until(f"address of attempt {attempt}", is_there, 120, run)
    address = read_address(run)
    assert address is not None
    return address.place.url


def test_a_preempted_server_serves_on_elsewhere_with_its_key_and_its_hours_are_accounted(
    on_cluster: Cluster, tmp_path: Path
) -> None:
    run, url = serve_model(tmp_path, "--qos", "scavenger", "-t", "20")
    key = key_of(run)
    assert "127." not in url, "an address that only its own node reaches"
    assert [ask(url, "/v1/completions", key, {}) for _ in range(100)] == [200] * 100
    for path in ("/health", "/v1/models", "/metrics", "/pause", "/collective_rpc"):
        assert (ask(url, path, None), ask(url, path, "wrong")) == (401, 401)
    assert ask(url, "/pause", key, {}) == 404
    job = read_situation(run).job
    assert job is not None
    on_cluster.preempt(int(job.job_id))
    wait_attempt(run, 2)
    new_url = wait_answering(run, 2)
    assert ask(new_url, "/v1/completions", key, {}) == 200
    run.stop.touch()
    first, second = wait_over(run)
    assert (first.cause, second.cause) == (Cause.preempted, Cause.stopped)
    assert first.gpus == second.gpus == 2

    def ledger_of() -> float:
        return settled_ledger(run, read_situation(run).history.attempts[-1].end or 0.0).gpu_hours

    wait_until("accounting", lambda: settled_ledger(run, second.end or 0.0).source == "sacct", 60, run)
    held_s = sum((a.end or 0.0) - a.start for a in (first, second))
    assert ledger_of() >= 2 * (held_s - 2) / 3600  # sacct's clock has whole seconds


def test_the_time_limit_ends_a_server_for_good(on_cluster: Cluster, tmp_path: Path) -> None:
    """It leaves a minute before the end of two, at Slurm's warning, up to 30 s early, or by its own clock."""
    run, _ = serve_model(tmp_path, "-t", "2", "resources.signal_lead_s=60")
    (attempt,) = wait_over(run)
    assert (attempt.cause, attempt.detail) == (Cause.finished, "its time limit")
    assert not run.server_address.exists()
