"""An older incarnation that makes its folder again, as DeepSpeed's save does with makedirs.

R1HPC_SEED repeats the seed that a failure printed.
"""

import os
import random
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest

from r1hpc.checkpoint.disk import at
from r1hpc.checkpoint.fence import SupersededError
from r1hpc.checkpoint.store import CheckpointStore
from tests.checkpoint.harness import (
    DONE,
    FILES,
    KILLED,
    SUPERSEDED,
    content,
    fault,
    history,
    holds_what_was_written,
    in_child,
    recorded_failpoints,
    save,
    start_child,
    verified_steps,
    wait_until_stopped,
)

SEED = int(os.environ.get("R1HPC_SEED", "20240229"))


def save_with_makedirs(root: Path, step: int) -> None:
    """Attempt 0 saves `step`: missing folders are made, and what is found in them is sealed."""
    store = CheckpointStore(root)
    folder = store.open_staging(step, 0, "t")
    with store.writing(folder):
        for name in FILES:
            with at("ghost.makedirs"):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with at("ghost.write"):
                (folder / name).write_bytes(content(step, name))
    with at("ghost.list"):
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    store.commit(step, 0, "t", store.seal(folder, names), {"global_step": step})


def begin_and_save(root: Path, step: int) -> None:
    """Attempt 1 begins, notes what it would resume from, and saves `step`."""
    store = CheckpointStore(root)
    store.begin(1, "u")
    newest = store.newest_verified()
    (root.parent / f"saw-{newest.step if newest else None}").touch()
    save(store, step, 1, "u")
    store.prune([])


def points_of(root: Path) -> tuple[list[str], list[str]]:
    """Every moment of the older one, and every moment of the newer one's begin."""
    history(root, 10)
    with recorded_failpoints() as older:
        save_with_makedirs(root, 20)
    with recorded_failpoints() as newer:
        CheckpointStore(root).begin(1, "u")
    return older, newer


def go_on(pid: int) -> int | None:
    os.kill(pid, signal.SIGCONT)
    return wait_until_stopped(pid)


def interleave(root: Path, rng: random.Random, older: list[str], newer: list[str], step: int) -> int:
    """The older one stops twice at random, the newer one once, each going on while the other stands still.

    Returns how the older one ended.
    """
    first, second = sorted(rng.sample(range(len(older)), 2))
    stops = f"{fault(older[first], 'stop')},{fault(older[second], 'stop')}"
    ghost = start_child(lambda: save_with_makedirs(root, 20), stops)
    assert wait_until_stopped(ghost) is None
    heir = start_child(lambda: begin_and_save(root, step), fault(rng.choice(newer), "stop"))
    assert wait_until_stopped(heir) is None
    ended = go_on(ghost)
    assert go_on(heir) == DONE
    return go_on(ghost) if ended is None else ended  # type: ignore[return-value]


def test_it_commits_whole_before_the_newer_one_looks_or_not_at_all(memory_path: Path) -> None:
    ends = meet_ghosts(memory_path, 300)
    assert min(ends.values()) > 300 // 20


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_thousand_that_came_too_late_are_all_refused(memory_path: Path) -> None:
    ends = meet_ghosts(memory_path, 1500)
    print(ends)
    assert ends[SUPERSEDED] >= 1000


def meet_ghosts(memory_path: Path, num_ghosts: int) -> Counter[int]:
    """How many older ones committed in time (DONE), and how many were refused (SUPERSEDED)."""
    older, newer = points_of(memory_path / "recorded")
    history(memory_path / "prepared", 10)
    ends: Counter[int] = Counter()
    for number in range(num_ghosts):
        rng = random.Random(f"{SEED}/{number}")
        note = f"seed {SEED}, ghost {number}"
        step = rng.choice([20, 30])
        root = memory_path / str(number) / "checkpoints"
        shutil.copytree(memory_path / "prepared", root)
        status = interleave(root, rng, older, newer, step)
        saw = 20 if (root.parent / "saw-20").exists() else 10
        assert status == (DONE if saw == 20 else SUPERSEDED), note
        found = CheckpointStore(root).list()
        assert verified_steps(CheckpointStore(root))[0] == step, note
        assert all(holds_what_was_written(checkpoint) for checkpoint in found), note
        assert found[0].manifest.attempt == 1, note
        assert {found.step for found in CheckpointStore(root).survey()} <= {10, saw, step}, note
        ends[status] += 1
        shutil.rmtree(root.parent)
    return ends


def test_made_again_in_the_gap_before_the_tombstone(memory_path: Path) -> None:
    """The newer one stands still between its rename and its tombstone while the older one saves."""
    history(memory_path, 10)
    ghost = start_child(lambda: save_with_makedirs(memory_path, 20), "ghost.makedirs.before:stop:*:3")
    assert wait_until_stopped(ghost) is None
    heir = start_child(lambda: CheckpointStore(memory_path).begin(1, "u"), "begin.tombstone.before:stop")
    assert wait_until_stopped(heir) is None
    assert go_on(ghost) == SUPERSEDED
    assert (memory_path / ".incarnation-0-t").is_dir(), "the older one did not make its folder again"
    assert go_on(heir) == DONE
    assert (memory_path / ".incarnation-0-t").is_file()
    assert [found.step for found in CheckpointStore(memory_path).survey()] == [10]


@pytest.mark.parametrize("point", ["begin.evict_rename.after", "begin.tombstone.before"])
def test_a_newer_one_killed_in_the_gap(memory_path: Path, point: str) -> None:
    """Nobody makes the tombstone then; the next attempt finds what was made again and moves it away."""
    history(memory_path, 10)
    ghost = start_child(lambda: save_with_makedirs(memory_path, 20), "ghost.makedirs.before:stop:*:3")
    assert wait_until_stopped(ghost) is None
    assert in_child(lambda: CheckpointStore(memory_path).begin(1, "u"), f"{point}:kill9") == KILLED
    assert go_on(ghost) == SUPERSEDED
    store = CheckpointStore(memory_path)
    store.begin(2, "v")
    assert (memory_path / ".incarnation-0-t").is_file()
    assert not list(memory_path.glob(".trash-*"))
    assert [found.step for found in store.survey()] == [10]
    assert holds_what_was_written(save(store, 20, 2, "v"))


def test_a_folder_made_again_cannot_prune_or_open_another_step(memory_path: Path) -> None:
    store = history(memory_path, 10, 20, 30)
    own = memory_path / ".incarnation-0-t"
    CheckpointStore(memory_path).begin(1, "u")
    own.unlink()
    own.mkdir(mode=0o700)
    for act in (lambda: store.prune([]), lambda: store.open_staging(40, 0, "t")):
        with pytest.raises(SupersededError, match=r"attempt 1 \(token u\) has taken over"):
            act()
    assert verified_steps(store) == [30, 20, 10]


def test_the_tombstone_ends_makedirs_itself(memory_path: Path) -> None:
    history(memory_path, 10)
    CheckpointStore(memory_path).begin(1, "u")
    with pytest.raises(NotADirectoryError):
        os.makedirs(memory_path / ".incarnation-0-t" / "step-00000020" / "deepspeed", exist_ok=True)  # noqa: PTH103
    with pytest.raises(SupersededError):
        CheckpointStore(memory_path).begin(0, "t")


def test_a_resumed_attempts_own_copy_goes_before_an_older_ones(memory_path: Path) -> None:
    """Even one that verifies: it may be of other settings, or lack what its manifest does not list."""
    history(memory_path, 10, 20)
    newer = CheckpointStore(memory_path)
    newer.begin(1, "u")
    assert save(newer, 20, 1, "u").manifest.attempt == 1
    assert [found.manifest.attempt for found in newer.list()] == [1, 0]


@pytest.mark.parametrize("killed_too", ["", "begin.evict_rename.after"])
def test_the_older_copy_is_back_when_a_kill_interrupts_its_replacement(
    memory_path: Path, killed_too: str
) -> None:
    history(memory_path, 10, 20)
    newer = CheckpointStore(memory_path)
    newer.begin(1, "u")
    assert in_child(lambda: save(newer, 20, 1, "u"), "commit.replace.after:kill9") == KILLED
    assert verified_steps(newer) == [10]
    if killed_too:
        next_one = CheckpointStore(memory_path)
        assert in_child(lambda: next_one.begin(2, "v"), f"{killed_too}:kill9") == KILLED
    CheckpointStore(memory_path).begin(3, "w")
    assert verified_steps(newer) == [20, 10]
