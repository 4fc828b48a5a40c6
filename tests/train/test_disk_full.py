"""A disk that fills up in the middle of a run: the save fails by name, earlier checkpoints stay.

Needs root, to mount a small tmpfs of its own.
"""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from r1hpc.checkpoint.store import CheckpointStore
from r1hpc.telemetry.records.attempts import Cause
from tests.runs import assert_same_run, at, held, submit, wait_over, wait_step

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system"),
]

_SIZE = ("train.num_steps=24", "checkpoint.save_every=6", "train.global_batch_size=4")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, to be made smaller under a run that has checkpoints of 4.2 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def resize(disk: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def used(disk: Path) -> int:
    status = os.statvfs(disk)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def test_a_write_that_fails_half_way_is_named(small_disk: Path) -> None:
    resized = small_disk / "resized"
    run = submit(small_disk, "half", *_SIZE, env=at(held(resized, 4))).run
    wait_step(run, 3)
    resize(small_disk, used(small_disk) + (2 << 20))
    resized.touch()
    attempts = wait_over(run)
    assert attempts[-1].cause is Cause.cluster, "a full disk is no fault of the run"
    assert "writing checkpoint step 6 failed" in attempts[-1].detail
    assert CheckpointStore(run.checkpoints).list() == []


def test_a_full_disk_costs_nothing_that_was_committed(small_disk: Path) -> None:
    quiet = submit(small_disk, "quiet", *_SIZE).run
    wait_over(quiet)
    checkpoint_bytes = sum(f.size for f in CheckpointStore(quiet.checkpoints).list()[0].manifest.files)
    start = submit(small_disk, "full", *_SIZE, "train.num_steps=7").run
    wait_over(start)
    resize(small_disk, used(small_disk) + checkpoint_bytes // 2)

    submit(small_disk, "full", "--resume", "train.num_steps=24")
    attempts = wait_over(start)
    assert attempts[-1].cause is Cause.cluster
    assert "SaveError" in attempts[-1].detail
    log = start.rank_log(attempts[-1].attempt, 0).read_text()
    assert "free under" in log
    assert "Traceback" not in log
    assert CheckpointStore(start.checkpoints).newest_verified() is not None

    resize(small_disk, 200 << 20)
    submit(small_disk, "full", "--resume")
    assert wait_over(start)[-1].cause is Cause.finished
    assert CheckpointStore(start.checkpoints).list()[0].step == 24
    assert_same_run(start, quiet)
