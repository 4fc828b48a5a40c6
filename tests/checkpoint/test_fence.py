"""Two incarnations of a run at once, one of them stopped at every place where it touches the store."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from r1hpc.base.errors import UsageError
from r1hpc.checkpoint.disk import CheckpointWriteError
from r1hpc.checkpoint.fence import SupersededError
from r1hpc.checkpoint.store import CheckpointStore
from tests.checkpoint.harness import (
    DONE,
    KILLED,
    SUPERSEDED,
    WRITE_ERROR,
    end_of,
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


def points_of(root: Path, act: Callable[[Path], object]) -> list[str]:
    history(root, 10)
    with recorded_failpoints() as points:
        act(root)
    return points


def begun(root: Path, attempt: int, token: str) -> CheckpointStore:
    store = CheckpointStore(root)
    store.begin(attempt, token)
    return store


def may_write(root: Path, attempt: int, token: str) -> bool:
    try:
        CheckpointStore(root).open_staging(99, attempt, token)
    except SupersededError:
        return False
    return True


def test_the_older_one_is_refused_everywhere_and_told_why(memory_path: Path) -> None:
    store = history(memory_path, 10)
    folder = store.open_staging(20, 0, "t")
    (folder / "a").write_bytes(b"a")
    records = store.seal(folder, ["a"])
    begun(memory_path, 1, "u")
    for act in (
        lambda: store.open_staging(30, 0, "t"),
        lambda: store.seal(folder, ["a"]),
        lambda: store.commit(20, 0, "t", records, {}),
        lambda: store.begin(0, "t"),
        lambda: store.begin(0, "other"),
    ):
        with pytest.raises(SupersededError, match=r"attempt 1 \(token u\) has taken over"):
            act()
    with pytest.raises(SupersededError), store.writing(folder):
        (folder / "b").write_bytes(b"b")
    assert verified_steps(store) == [10]


def test_files_vanishing_under_a_check_are_the_fence_too(memory_path: Path) -> None:
    """The newer one removes the folder while the older one's commit is listing it."""
    store = history(memory_path)
    folder = store.open_staging(10, 0, "t")
    with pytest.raises(CheckpointWriteError), store.writing(folder):
        raise CheckpointWriteError("a.pt is missing")
    begun(memory_path, 1, "u")
    with pytest.raises(SupersededError), store.writing(folder):
        raise CheckpointWriteError("a.pt is missing")


def test_begin_again_is_harmless(memory_path: Path) -> None:
    store = history(memory_path)
    folder = store.open_staging(10, 0, "t")
    store.begin(0, "t")
    assert folder.is_dir()


def test_the_same_attempt_number_started_again_takes_over(memory_path: Path) -> None:
    """A launch killed before it recorded its attempt is followed by one with the same number."""
    history(memory_path)
    for token in ("z", "a"):
        begun(memory_path, 0, token)
        assert may_write(memory_path, 0, token)
    assert not may_write(memory_path, 0, "z")


def test_without_begin_nothing_can_be_written(memory_path: Path) -> None:
    with pytest.raises(SupersededError, match="never began"):
        CheckpointStore(memory_path).open_staging(10, 0, "t")


@pytest.mark.parametrize("token", ["../x", "a/b", "", "-x\n"])
def test_a_token_cannot_leave_the_folder(memory_path: Path, token: str) -> None:
    with pytest.raises(UsageError):
        CheckpointStore(memory_path).begin(0, token)


@pytest.mark.parametrize("newer_step", [20, 30])
def test_the_older_one_stopped_anywhere_in_a_save(memory_path: Path, newer_step: int) -> None:
    """Either its commit was before the fence and the newer one saw it, or it is refused."""

    def older(root: Path) -> None:
        save(CheckpointStore(root), 20, 0)

    points = points_of(memory_path / "recorded", older)
    outcomes = []
    for number, point in enumerate(points):
        root = memory_path / str(number)
        history(root, 10)
        pid = start_child(lambda root=root: older(root), fault(point, "stop"))  # type: ignore[misc]
        assert wait_until_stopped(pid) is None, point
        newer = begun(root, 1, "u")
        seen = newer.newest_verified()
        assert seen is not None, point
        committed = save(newer, newer_step, 1, "u")
        os.kill(pid, signal.SIGCONT)
        status = end_of(pid)
        assert status == (DONE if seen.step == 20 else SUPERSEDED), point
        assert newer.verify(committed) == [], point
        assert holds_what_was_written(committed), point
        assert verified_steps(newer) == sorted({10, seen.step, newer_step}, reverse=True), point
        assert committed.manifest.attempt == 1, point
        assert (root / ".incarnation-0-t").is_file(), point
        outcomes.append(status)
        shutil.rmtree(root)
    assert {DONE, SUPERSEDED} == set(outcomes)


def test_the_older_one_saves_while_the_newer_one_begins(memory_path: Path) -> None:
    def begin(root: Path) -> None:
        store = begun(root, 1, "u")
        newest = store.newest_verified()
        (root.parent / f"{root.name}-saw-{newest.step if newest else None}").touch()

    for number, point in enumerate(points_of(memory_path / "recorded", begin)):
        root = memory_path / str(number)
        history(root, 10)
        pid = start_child(lambda root=root: begin(root), fault(point, "stop"))  # type: ignore[misc]
        assert wait_until_stopped(pid) is None, point
        status = in_child(lambda root=root: save(CheckpointStore(root), 20, 0))  # type: ignore[misc]
        os.kill(pid, signal.SIGCONT)
        assert end_of(pid) == DONE, point
        expected = {DONE: 20, SUPERSEDED: 10}[status]
        assert (memory_path / f"{number}-saw-{expected}").exists(), point


@pytest.mark.parametrize(
    ("first", "second"), [((5, "b"), (5, "a")), ((5, "a"), (5, "b")), ((5, "a"), (6, "a"))]
)
def test_of_two_that_begin_at_once_one_remains(
    memory_path: Path, first: tuple[int, str], second: tuple[int, str]
) -> None:
    points = points_of(memory_path / "recorded", lambda root: begun(root, *first))
    for number, point in enumerate(points):
        root = memory_path / str(number)
        history(root, 10)
        pid = start_child(lambda root=root: begun(root, *first), fault(point, "stop"))  # type: ignore[misc]
        assert wait_until_stopped(pid) is None, point
        assert in_child(lambda root=root: begun(root, *second)) == DONE, point  # type: ignore[misc]
        os.kill(pid, signal.SIGCONT)
        status = end_of(pid)
        alive = [who for who in (first, second) if may_write(root, *who)]
        assert len(alive) == 1, point
        if first[0] != second[0]:
            assert alive == [second], point
        assert status == (DONE if alive == [first] else SUPERSEDED) or second in alive, point


def test_a_commit_killed_while_it_replaces_a_bad_one_is_not_a_fresh_start(memory_path: Path) -> None:
    """The only checkpoint is bad, and the kill comes while its good successor has not arrived yet."""
    store = history(memory_path, 10)
    (memory_path / "step-00000010" / "empty.lock").write_bytes(b"x")
    assert in_child(lambda: save(store, 10, 0), "commit.replace.after:kill9") == KILLED
    next_one = begun(memory_path, 1, "u")
    assert [found.step for found in next_one.survey()] == [10]
    assert holds_what_was_written(save(next_one, 10, 1, "u"))


def test_a_save_that_fails_while_it_replaces_a_bad_one_puts_it_back(memory_path: Path) -> None:
    store = history(memory_path, 10)
    (memory_path / "step-00000010" / "empty.lock").write_bytes(b"x")
    assert in_child(lambda: save(store, 10, 0), "commit.rename.before:eio") == WRITE_ERROR
    assert [found.step for found in store.survey()] == [10]


def test_a_save_superseded_while_it_replaces_a_bad_one_puts_it_back(memory_path: Path) -> None:
    store = history(memory_path, 10, 20)
    (memory_path / "step-00000020" / "empty.lock").write_bytes(b"x")
    pid = start_child(lambda: save(store, 20, 0), "commit.replace.after:stop")
    assert wait_until_stopped(pid) is None
    newer = begun(memory_path, 1, "u")
    os.kill(pid, signal.SIGCONT)
    assert end_of(pid) == SUPERSEDED
    assert [found.step for found in newer.survey()] == [20, 10]
    assert verified_steps(newer) == [10]


def test_a_rename_whose_answer_was_lost_counts(memory_path: Path) -> None:
    """NFS repeats a rename whose answer was lost, and then reports that there is nothing to rename."""
    store = history(memory_path, 10)
    assert in_child(lambda: save(store, 20, 0), "commit.rename.after:eio") == DONE
    assert verified_steps(store) == [20, 10]


def test_a_root_that_cannot_be_synced_fails_the_save(memory_path: Path) -> None:
    store = history(memory_path, 10)
    assert in_child(lambda: save(store, 20, 0), "commit.fsync_root.before:eio") == WRITE_ERROR
    assert verified_steps(store) == [10]
