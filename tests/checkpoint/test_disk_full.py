"""A real small tmpfs that fills up, runs out of inodes or turns read-only while a checkpoint is saved."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from r1hpc.checkpoint.disk import CheckpointWriteError
from r1hpc.checkpoint.fence import BEGUN
from r1hpc.checkpoint.store import CheckpointStore
from tests.checkpoint.harness import history, save, verified_steps

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="only root can mount a small file system")
PAGE_KIB = 4
Remount = Callable[[str], None]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[tuple[Path, Remount]]:
    """(root of a store with steps 10 and 20 on a tmpfs, a function that remounts it with options)."""
    place = tmp_path / "small"
    place.mkdir()
    try:
        mount("-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place))
    except subprocess.CalledProcessError as error:
        pytest.skip(f"cannot mount here: {error.stderr}")
    history(place / "checkpoints", 10, 20)
    yield place / "checkpoints", lambda options: mount("-o", f"remount,{options}", str(place))
    subprocess.run(["umount", str(place)], check=True)


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True, text=True)


def used(root: Path) -> tuple[int, int]:
    """(KiB, inodes) in use on the file system of `root`."""
    status = os.statvfs(root)
    blocks = (status.f_blocks - status.f_bfree) * status.f_frsize // 1024
    return blocks, status.f_files - status.f_ffree


def save_until_it_fits(root: Path, remount: Remount, option: Callable[[int], str]) -> list[str]:
    """Save step 30 with ever more room until it succeeds; the messages of the failures before."""
    messages = []
    for room in range(100):
        remount(option(room))
        before = used(root)
        try:
            save(CheckpointStore(root), 30, 0)
        except CheckpointWriteError as error:
            messages.append(str(error))
            assert verified_steps(CheckpointStore(root)) == [20, 10], room
            assert [path.name for path in (root / ".incarnation-0-t").iterdir()] == [BEGUN], room
            assert used(root) == before, f"room {room}: a failed save left something behind"
        else:
            assert verified_steps(CheckpointStore(root)) == [30, 20, 10]
            return messages
    pytest.fail("never fitted")


def test_disk_full_after_every_page(small: tuple[Path, Remount]) -> None:
    root, remount = small
    kib, _ = used(root)
    messages = save_until_it_fits(root, remount, lambda room: f"size={kib + room * PAGE_KIB}k")
    assert len(messages) >= 10
    for message in messages:
        assert "No space left on device" in message
        assert "what was committed before is intact" in message
        assert str(root) in message


def test_no_inodes_left_after_every_file(small: tuple[Path, Remount]) -> None:
    root, remount = small
    _, inodes = used(root)
    messages = save_until_it_fits(root, remount, lambda room: f"nr_inodes={inodes + room}")
    assert len(messages) >= 8
    assert all("inodes free" in message for message in messages)


def test_read_only(small: tuple[Path, Remount]) -> None:
    root, remount = small
    store = CheckpointStore(root)
    remount("ro")
    for act in (lambda: save(store, 30, 0), lambda: store.begin(1, "u")):
        with pytest.raises(CheckpointWriteError, match="Read-only file system"):
            act()
    newest = store.newest_verified()
    assert newest is not None
    assert newest.step == 20


def test_read_only_between_seal_and_commit(small: tuple[Path, Remount]) -> None:
    root, remount = small
    store = CheckpointStore(root)
    folder = store.open_staging(30, 0, "t")
    (folder / "a").write_bytes(b"a")
    records = store.seal(folder, ["a"])
    remount("ro")
    with pytest.raises(CheckpointWriteError, match="Read-only file system"):
        store.commit(30, 0, "t", records, {})
    remount("rw")
    assert verified_steps(store) == [20, 10]
    assert save(store, 30, 0).step == 30
