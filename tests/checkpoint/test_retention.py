"""What prune removes, what it must never remove, and what a kill in the middle of it leaves."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from r1hpc.checkpoint.disk import walk
from r1hpc.checkpoint.fence import SupersededError
from r1hpc.checkpoint.store import CheckpointStore
from tests.checkpoint.harness import end_of, history, save, start_child, verified_steps, write_files

NUM_KILLS = 15


def test_older_ones_go(tmp_path: Path) -> None:
    store = history(tmp_path, 10, 20, 30, 40)
    assert store.prune([]) == [10, 20]
    assert verified_steps(store) == [40, 30]
    assert store.prune([]) == []


def test_keep_and_protect(tmp_path: Path) -> None:
    history(tmp_path, 10, 20, 30, 40, 50)
    assert CheckpointStore(tmp_path, keep=3).prune([10]) == [20]
    assert verified_steps(CheckpointStore(tmp_path)) == [50, 40, 30, 10]


def test_in_a_hurry_it_reads_nothing_and_removes_only_below_what_it_knows(tmp_path: Path) -> None:
    history(tmp_path, 10, 20, 30)
    later = CheckpointStore(tmp_path)
    later.begin(1, "t")
    save(later, 40, 1)
    assert later.prune([], hurry=True) == []  # of 30 it knows nothing
    save(later, 50, 1)
    assert later.prune([20], hurry=True) == [10, 30]
    assert verified_steps(later) == [50, 40, 20]
    assert len(list(tmp_path.glob(".incarnation-1-t/*"))) == 3, "renamed away, not deleted"
    CheckpointStore(tmp_path).begin(2, "t")
    assert not list(tmp_path.glob(".incarnation-1-t/*"))


def test_of_a_run_that_is_over_nothing_half_written_stays(tmp_path: Path) -> None:
    store = history(tmp_path, 10, 20)
    half = store.open_staging(30, 0, "t")
    write_files(half, 30)
    CheckpointStore(tmp_path).sweep(0)
    assert not half.exists()
    store.begin(1, "t")
    half = store.open_staging(30, 1, "t")
    CheckpointStore(tmp_path).sweep(0)
    assert half.exists(), "of an attempt that has begun since"
    assert verified_steps(CheckpointStore(tmp_path)) == [20, 10]


def test_ten_preemptions_never_leave_more_than_keep_and_one(tmp_path: Path) -> None:
    """Each attempt resumes, saves in a hurry and is gone, as in 7B runs that never reach a periodic save."""
    for attempt in range(10):
        store = CheckpointStore(tmp_path)
        store.begin(attempt, "t")
        resumed = store.newest_verified()
        if resumed:
            store.prune_surplus(resumed.step)
        save(store, 10 + attempt, attempt)
        assert len(list(store.survey())) <= store.keep + 1
        store.prune([10 + attempt], at=10 + attempt, hurry=True)
    assert verified_steps(store) == [19, 18]


def test_ones_that_were_passed_over_neither_count_nor_go(tmp_path: Path) -> None:
    """120 and 140 verify and could not be loaded: the attempt went on from 100, and was then killed."""
    history(tmp_path, 80, 100, 120, 140)
    store = CheckpointStore(tmp_path)
    store.begin(1, "t")
    assert store.prune_surplus(100) == []
    save(store, 105, 1)
    assert store.prune([105], at=105) == [80]
    save(store, 110, 1)
    assert CheckpointStore(tmp_path).prune_surplus(110) == [100]
    assert verified_steps(store) == [140, 120, 110, 105]


def test_what_killed_saves_left_goes_once_it_resumes_and_a_corrupt_one_does_not_count(tmp_path: Path) -> None:
    history(tmp_path, 10, 20, 30, 40, 50)
    (tmp_path / "step-00000050" / "mp_rank_00_model_states.pt").write_bytes(b"")
    store = CheckpointStore(tmp_path)
    store.begin(1, "t")
    assert store.prune_surplus(40) == [10, 20]
    assert store.prune_surplus(40) == []
    assert verified_steps(store) == [40, 30]


def test_a_corrupt_one_does_not_count_as_kept(tmp_path: Path) -> None:
    """The same store object committed them: what it remembers must not hide what happened since."""
    store = history(tmp_path, 10, 20, 30, 40)
    bad = tmp_path / "step-00000040" / "mp_rank_00_model_states.pt"
    status = bad.stat()
    raw = bad.read_bytes()
    bad.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    os.utime(bad, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert store.prune([]) == [10]
    assert verified_steps(store) == [30, 20]


def test_nothing_goes_while_fewer_than_two_verify(tmp_path: Path) -> None:
    store = history(tmp_path, 10, 20, 30, 40)
    for step in (20, 30, 40):
        (tmp_path / f"step-{step:08d}" / "manifest.json").unlink()
    assert store.prune([]) == []
    assert verified_steps(store) == [10]


def test_bad_ones_go_once_two_good_ones_are_newer(tmp_path: Path) -> None:
    store = history(tmp_path, 10, 20)
    (tmp_path / "step-00000010" / "manifest.json").unlink()
    (tmp_path / "step-00000020" / "rng/rank_0.json").unlink()
    save(store, 30, 0)
    save(store, 40, 0)
    assert store.prune([]) == [10, 20]


def test_what_dead_incarnations_left_goes(tmp_path: Path) -> None:
    store = history(tmp_path, 10)
    (tmp_path / ".incarnation-0-s" / "step-00000020").mkdir(parents=True)
    (tmp_path / ".trash-ab-step-00000005" / "zero").mkdir(parents=True)
    kept = store.open_staging(30, 0, "t")
    store.prune([])
    assert sorted(path.name for path in tmp_path.glob(".*")) == [".incarnation-0-t"]
    assert kept.is_dir()


def test_a_superseded_attempt_removes_nothing(tmp_path: Path) -> None:
    older = history(tmp_path, 10, 20, 30)
    CheckpointStore(tmp_path).begin(1, "u")
    with pytest.raises(SupersededError):
        older.prune([])
    assert verified_steps(older) == [30, 20, 10]


@pytest.mark.parametrize("seed", range(NUM_KILLS))
def test_a_kill_during_removal_leaves_whole_checkpoints(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    store = history(tmp_path, 10, 20, 30, 40)
    for step in (10, 20):
        for number in range(200):
            (tmp_path / f"step-{step:08d}" / f"extra_{number}").touch()
    pid = start_child(lambda: CheckpointStore(tmp_path).prune([]))
    time.sleep(rng.uniform(0, 0.02))
    os.kill(pid, signal.SIGKILL)
    end_of(pid)
    assert verified_steps(store) == [40, 30]
    for step in {10, 20} & {found.step for found in store.survey()}:
        assert sum(1 for _ in walk(tmp_path / f"step-{step:08d}")) > 200, (
            f"seed {seed}: half removed in place"
        )
    store.prune([])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".incarnation-0-t",
        "LATEST",
        "step-00000030",
        "step-00000040",
    ]
