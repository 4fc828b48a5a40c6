"""Faults that strike inside a save, a conversion and a start, in runs of real DeepSpeed on this machine.

pytest tests/train/test_faults.py              # about two minutes on two quiet cores
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from r1hpc.accounting.open_ledger import open_ledger
from r1hpc.attempt.state.state import State, read_situation
from r1hpc.base.run_dir import RunDir
from r1hpc.checkpoint.store import CheckpointStore
from r1hpc.telemetry.records.attempts import Cause, read_history
from r1hpc.telemetry.records.metrics import audit_ledger, read_steps
from tests.runs import (
    CHECKOUT,
    assert_same_data,
    assert_same_run,
    at,
    command_output,
    current_step,
    held,
    kill_rank,
    rank_pids,
    submit,
    wait_over,
    wait_step,
    wait_until,
)

pytestmark = pytest.mark.timeout(600)

_SIZE = ("--nodes", "2", "train.num_steps=30", "checkpoint.save_every=5", "train.global_batch_size=8")
_DROPOUT = ("model.config.attention_dropout=0.2",)
_MEMORY = Path("/sys/fs/cgroup/memory")


def slow(seconds: float) -> dict[str, str]:
    return {**os.environ, "R1HPC_FAILPOINT": f"step.begin:sleep={seconds}::*"}


def test_struck_inside_a_save_it_is_the_same_run(tmp_path: Path) -> None:
    """With dropout, whose random streams differ from rank to rank: only what is restored gives these bits."""
    quiet = submit(tmp_path, "quiet", *_SIZE, *_DROPOUT).run
    wait_over(quiet)
    strikes = (
        "save.begin:term:0:1:1",  # asked to leave while it saves,
        "save.sealed:term:1:1:1",  # and again, another rank
        "seal.fsync.before:kill9:1:2:2",
        "commit.rename.after:kill9:0:1:3",
    )
    env = {**os.environ, "R1HPC_FAILPOINT": ",".join(strikes)}
    run = submit(tmp_path, "struck", *_SIZE, *_DROPOUT, "limits.max_crashes=9", env=env).run
    attempts = wait_over(run, 400)
    assert [a.cause for a in attempts] == [Cause.preempted, Cause.crash, Cause.crash, Cause.finished]
    assert [a.resumed_from for a in attempts] == [None, 6, 6, 10]
    assert attempts[0].last_committed_step == attempts[0].last_step == 6
    assert_same_run(run, quiet)
    assert not list(run.checkpoints.rglob("latest")), "DeepSpeed's hint, which names what is not whole yet"


def test_a_conversion_that_was_killed_is_done_again(tmp_path: Path) -> None:
    """All of a run dies at once, its supervisor too; it goes on with one rank, which dies converting."""
    size = (*_SIZE, "train.num_steps=16")
    quiet = submit(tmp_path, "quiet", *size).run
    run = submit(tmp_path, "converted", *size, env=at(held(tmp_path / "never", 8))).run
    wait_step(run, 7)
    wait_until("a checkpoint", lambda: bool(CheckpointStore(run.checkpoints).list()), 60, run)
    supervisor = int(str(read_history(run).attempts[0].job_id).removeprefix("local-"))
    for pid in (supervisor, *rank_pids(run).values()):
        os.kill(pid, signal.SIGKILL)
    submit(tmp_path, "converted", "--resume", "--nodes", "1", env=slow(0.2))
    wait_until("a conversion", lambda: any(run.path.glob("universal-*/*")), 60, run)
    source = CheckpointStore(run.checkpoints).list()[0]
    kill_rank(run, 0, signal.SIGKILL)
    attempts = wait_over(run, 400)
    assert [a.cause for a in attempts] == [Cause.unknown, Cause.crash, Cause.finished]
    assert [a.first_step for a in attempts[1:]] == [None, source.step + 1]
    assert not list(run.path.glob("universal-*"))
    assert_same_data(run, quiet)
    pairs = zip(read_steps(run).column("loss"), read_steps(quiet).column("loss"), strict=True)
    assert max(abs(ours - theirs) / theirs for ours, theirs in pairs) < 1e-3


@pytest.mark.skipif(not os.access(_MEMORY, os.W_OK), reason="no memory cgroup that this user may make")
def test_killed_for_memory_twice_without_progress_it_is_left_alone_until_asked(tmp_path: Path) -> None:
    size = ("--nodes", "1", "train.num_steps=4", "checkpoint.save_every=2", "train.global_batch_size=4")
    command_output(["-m", "r1hpc.shard", "build", "smoke", "--out", str(tmp_path / "datasets" / "smoke")])
    with little_memory(96 << 20) as group:
        command = [sys.executable, "-m", "r1hpc.submit", "jobs/smoke.yaml", *size, "--executor", "local"]
        command += ["--run-root", str(tmp_path), "--run-name", "starved"]
        shell = f"echo $$ > {group}/cgroup.procs && exec " + " ".join(command)
        subprocess.run(["bash", "-c", shell], cwd=CHECKOUT, check=True, timeout=120, capture_output=True)
        run = RunDir(tmp_path / "starved")
        attempts = wait_over(run)
        assert "oom_kill 2" in (group / "memory.oom_control").read_text()
    assert [a.cause for a in attempts] == [Cause.crash, Cause.crash]
    assert "rank 0 left no outcome, ended by SIGKILL" in attempts[-1].detail
    assert current_step(run) == 0
    submit(tmp_path, "starved", "--resume")
    assert wait_over(run)[-1].cause is Cause.finished


def test_ranks_that_outlive_their_supervisor_finish_the_run(tmp_path: Path) -> None:
    """Killed by SIGKILL, it writes no end: the ranks' own record is enough, and nothing is trained again."""
    size = (*_SIZE, "--nodes", "1", "train.num_steps=12")
    go = tmp_path / "go"
    run = submit(tmp_path, "orphans", *size, env=at(held(go, 3))).run
    wait_step(run, 2)
    os.kill(int(str(read_history(run).attempts[0].job_id).removeprefix("local-")), signal.SIGKILL)
    gone = "is gone, its ranks go on"
    wait_until("its supervisor's end", lambda: read_situation(run).detail.endswith(gone), 60, run)
    assert read_situation(run).state is State.running
    again = [sys.executable, "-m", "r1hpc.submit", "--resume", "--run-root", str(tmp_path)]
    again += ["--run-name", "orphans", "--executor", "local"]
    refused = subprocess.run(again, cwd=CHECKOUT, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "orphans is running as job local-" in refused.stderr
    go.touch()
    (attempt,) = wait_over(run)
    assert (attempt.cause, attempt.inferred, attempt.last_committed_step) == (Cause.finished, True, 12)
    words = "its ranks finished; the supervisor died before recording it"
    for command in ("status", "report"):
        assert words in command_output(["-m", f"r1hpc.{command}", str(run.path)])
    now = time.time()
    first, later = (open_ledger(run, moment) for moment in (now, now + 3600))
    assert first.attempts[-1].cause == "finished"
    assert first.wall() == later.wall()
    finished = subprocess.run(again, cwd=CHECKOUT, capture_output=True, text=True)
    assert (finished.returncode, "orphans is finished" in finished.stderr) == (2, True)
    submit(tmp_path, "orphans", "--resume", "train.num_steps=16")
    attempts = wait_over(run)
    assert [a.cause for a in attempts] == [Cause.finished, Cause.finished]
    assert (attempts[0].detail, attempts[1].first_step) == (words, 13)
    assert audit_ledger(run).exactly_once


@contextmanager
def little_memory(limit: int) -> Iterator[Path]:
    """A memory cgroup of the first version, whose kernel kills what needs more."""
    group = _MEMORY / f"r1hpc-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(limit))
        yield group
    finally:
        wait_until("an empty cgroup", lambda: not (group / "cgroup.procs").read_text(), 60)
        group.rmdir()
