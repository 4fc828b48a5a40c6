"""Runs on this machine, two ranks of real DeepSpeed, disturbed in every way that needs no Slurm.

pytest tests/train/test_disturbed.py           # about four minutes on two cores
"""

import os
import signal
import time
from pathlib import Path

import pytest

from r1hpc.base.run_dir import RunDir
from r1hpc.checkpoint.store import CheckpointStore
from r1hpc.telemetry.records.attempts import Cause
from r1hpc.telemetry.records.metrics import read_steps
from tests.runs import (
    assert_same_data,
    assert_same_run,
    at,
    held,
    kill_rank,
    submit,
    until_stopped,
    wait_committed,
    wait_over,
    wait_step,
    wait_until,
)

pytestmark = [pytest.mark.timeout(600), pytest.mark.xdist_group("disturbed")]  # its fixture is a whole run

_SIZE = ("--nodes", "2", "train.num_steps=48", "checkpoint.save_every=10", "train.global_batch_size=8")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def undisturbed(root: Path) -> RunDir:
    job = submit(root, "undisturbed", *_SIZE)
    assert [a.cause for a in wait_over(job.run)] == [Cause.finished]
    return job.run


def slow(seconds: float) -> dict[str, str]:
    """Environment that makes each step take longer, so that there is a moment to disturb it."""
    return {**os.environ, "R1HPC_FAILPOINT": f"step.begin:sleep={seconds}::*"}


def test_saved_signalled_killed_and_hung_it_is_the_same_run(root: Path, undisturbed: RunDir) -> None:
    limits = ("limits.max_crashes=1", "limits.max_hangs=1", "train.hang_timeout_s=25")
    # Rank 0 waits where rank 1 is to be met: before step 14, before step 25 or 26, and before step 34.
    signalled, killed, hung = (root / f"{what}" for what in ("signalled", "killed", "hung"))
    waits = (
        held(signalled, 14, rank=0),
        held(killed, 11, rank=0, attempt=2),
        held(hung, 14, rank=0, attempt=3),
    )
    run = submit(root, "disturbed", *_SIZE, *limits, env=at("step.begin:sleep=0.3::*:1", *waits)).run
    wait_step(run, 3)
    run.save.touch()
    wait_until("an answer to SAVE", lambda: not run.save.exists(), 60, run)
    wait_step(run, 13)
    kill_rank(run, 1, signal.SIGTERM)
    signalled.touch()
    wait_step(run, 24, attempt=2)
    wait_committed(run, 20)
    kill_rank(run, 1, signal.SIGKILL)
    killed.touch()
    wait_step(run, 33, attempt=3)
    kill_rank(run, 1, signal.SIGSTOP)
    hung.touch()
    attempts = wait_over(run, 240)
    assert [a.cause for a in attempts] == [Cause.preempted, Cause.crash, Cause.hang, Cause.finished]
    assert "rank 1 left no outcome" in attempts[1].detail
    assert "nothing at all from rank 1" in attempts[2].detail
    assert "stacks follow" in run.rank_log(3, 0).read_text()
    assert attempts[0].last_committed_step == attempts[0].last_step  # asked in time: nothing lost
    assert attempts[1].last_committed_step == 20  # killed: at most one save interval
    assert read_steps(run).lost
    assert_same_run(run, undisturbed)


@pytest.mark.soak
def test_stopped_in_every_part_of_a_save_written_behind_training(root: Path, undisturbed: RunDir) -> None:
    """The second save of each attempt: in the copy, in the write, between write and commit, and after it."""
    slow_write = "save.written:sleep=1:*:*"  # longer than a step, so the signal finds it under way
    kills = ("save.copied:kill9:1:2:1", "save.written:kill9:0:2:2", "save.sealed:kill9:1:2:3")
    ends = ("save.copied:term:0:2:4", "save.written:term:1:2:5", "save.committed:kill9:0:2:6")
    env = {**os.environ, "R1HPC_FAILPOINT": ",".join((*kills, *ends, slow_write, "step.begin:sleep=0.2::*"))}
    size = ("checkpoint.save_every=4", "limits.max_crashes=9")
    run = submit(root, "parts", *_SIZE, *size, env=env).run
    attempts = wait_over(run, 560)
    crash, preempted = Cause.crash, Cause.preempted
    assert [a.cause for a in attempts] == [crash, crash, crash, preempted, preempted, crash, Cause.finished]
    for attempt in attempts[:3]:  # the one under way is lost, and no more
        assert attempt.last_committed_step == (attempt.resumed_from or 0) + 4
    for attempt in attempts[3:5]:
        assert attempt.last_committed_step == attempt.last_step
    assert_same_run(run, undisturbed)


def test_a_suspension_is_no_hang(root: Path, undisturbed: RunDir) -> None:
    run = submit(root, "suspended", *_SIZE, "train.hang_timeout_s=20", env=slow(0.3)).run
    wait_step(run, 13)
    for number, seconds in ((signal.SIGSTOP, 30), (signal.SIGCONT, 0)):
        for rank in (0, 1):
            kill_rank(run, rank, number)
        time.sleep(seconds)
    assert [a.cause for a in wait_over(run)] == [Cause.finished]
    assert_same_run(run, undisturbed)


@pytest.mark.parametrize("zero_stage", [pytest.param(2, marks=pytest.mark.soak), 3])
def test_stopped_and_resumed_under_zero(root: Path, zero_stage: int) -> None:
    size = (*_SIZE, f"deepspeed.zero_stage={zero_stage}", "train.num_steps=16")
    quiet = submit(root, f"quiet-{zero_stage}", *size).run
    wait_over(quiet)
    name = f"stopped-{zero_stage}"
    run = submit(root, name, *size, env=until_stopped(root / name, 8)).run
    wait_step(run, 7)
    run.stop.touch()
    assert [a.cause for a in wait_over(run)] == [Cause.stopped]
    with pytest.raises(AssertionError, match=f"a checkpoint of ZeRO {zero_stage}, .* only between 1 and 2"):
        submit(root, run.run_id, "--resume", "deepspeed.zero_stage=0")
    submit(root, run.run_id, "--resume")
    assert [a.cause for a in wait_over(run)] == [Cause.stopped, Cause.finished]
    assert_same_run(run, quiet)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param("0", ("--nodes", "1"), id="ZeRO 0 on one rank"),
        pytest.param("0", ("--nodes", "4"), id="ZeRO 0 on four ranks"),
        pytest.param("3", ("--nodes", "1"), id="ZeRO 3 on one rank"),
        pytest.param("1", ("deepspeed.zero_stage=2",), id="ZeRO 1 to 2"),
    ],
)
def test_another_layout_sees_the_same_data_and_nearly_the_same_loss(
    root: Path, before: str, after: tuple[str, ...]
) -> None:
    size = (*_SIZE, f"deepspeed.zero_stage={before}", "checkpoint.save_every=5")
    name = f"layout-{before}-{after[-1][-1]}"
    quiet = submit(root, f"quiet-{name}", *size, "train.num_steps=10").run
    run = submit(root, name, *size, "train.num_steps=5").run
    for each in (quiet, run):
        wait_over(each)
    submit(root, run.run_id, "--resume", *after, "train.num_steps=10")
    assert wait_over(run)[-1].cause is Cause.finished
    assert_same_data(run, quiet)
    pairs = zip(read_steps(run).column("loss"), read_steps(quiet).column("loss"), strict=True)
    assert max(abs(ours - theirs) / theirs for ours, theirs in pairs) < 1e-3


def test_a_flipped_byte_costs_one_interval_and_nothing_else(root: Path, undisturbed: RunDir) -> None:
    run = submit(root, "flipped", *_SIZE, env=until_stopped(root / "flipped", 25)).run
    wait_step(run, 24)
    run.stop.touch()
    wait_over(run)
    newest, older = CheckpointStore(run.checkpoints).list()[:2]
    victim = max((f for f in newest.path.rglob("*.pt")), key=lambda f: f.stat().st_size)
    raw = bytearray(victim.read_bytes())
    raw[len(raw) // 2] ^= 1
    victim.write_bytes(raw)
    submit(root, run.run_id, "--resume")
    attempts = wait_over(run)
    assert attempts[-1].cause is Cause.finished
    assert attempts[-1].first_step == older.step + 1
    assert victim.name in run.rank_log(2, 0).read_text()
    assert_same_run(run, undisturbed)


def test_an_exploding_gradient_ends_the_run_with_its_step(root: Path) -> None:
    run = submit(root, "explodes", *_SIZE, "train.stop_grad_norm=0.01").run
    attempts = wait_over(run)
    assert [a.cause for a in attempts] == [Cause.refused]
    assert "step 1: the gradient norm is" in attempts[0].detail
    assert not run.finished.exists()


def test_another_dataset_is_refused_at_resume(root: Path) -> None:
    run = submit(root, "swapped", *_SIZE, env=slow(0.2)).run
    wait_step(run, 3)
    run.stop.touch()
    wait_over(run)
    text = run.config.read_text()
    run.config.write_text(text.replace("seed: 0\n  verify", "seed: 1\n  verify"))
    submit(root, run.run_id, "--resume")
    attempts = wait_over(run)
    assert attempts[-1].cause is Cause.refused
    assert "plan_hash" in attempts[-1].detail
