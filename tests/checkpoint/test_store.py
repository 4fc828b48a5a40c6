"""What the store promises when nothing goes wrong, and what it refuses."""

import ctypes
import json
import os
import stat
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from r1hpc.base.errors import StateError
from r1hpc.checkpoint import commit
from r1hpc.checkpoint.disk import CheckpointWriteError, walk
from r1hpc.checkpoint.fence import BEGUN
from r1hpc.checkpoint.store import Checkpoint, CheckpointStore, NoUsableCheckpointError
from r1hpc.checkpoint.verification import find_layout_problems
from tests.checkpoint.harness import (
    DONE,
    FILES,
    content,
    end_of,
    history,
    holds_what_was_written,
    save,
    start_child,
    verified_steps,
)
from tests.checkpoint.two_ranks import PipeRanks


def test_a_commit_is_found_with_its_content_and_meta(tmp_path: Path) -> None:
    store = history(tmp_path / "checkpoints", 10)
    found = CheckpointStore(store.root).newest_verified()
    assert found is not None
    assert found.path == store.root / "step-00000010"
    assert holds_what_was_written(found)
    assert found.manifest.meta == {"global_step": 10}
    assert {record.name: record.size for record in found.manifest.files} == FILES


def test_commit_returns_what_a_reader_reads(tmp_path: Path) -> None:
    store = history(tmp_path)
    committed = save(store, 10, 0)
    assert CheckpointStore(tmp_path).newest_verified() == committed


def test_sizes_that_a_client_remembers_of_a_file_still_being_written_fail_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS, where rank 0 has listed the folder before another node wrote on."""

    def remembered(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
        for name, status in walk(folder):
            yield name, os.stat_result((*status[:6], status.st_size // 2, *status[7:]))

    store = history(tmp_path)
    monkeypatch.setattr(commit, "walk", remembered)
    assert holds_what_was_written(save(store, 10, 0))


def test_a_first_start_has_no_checkpoint(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "missing").newest_verified() is None
    assert history(tmp_path).newest_verified() is None


def test_newest_is_by_step_and_not_by_time(tmp_path: Path) -> None:
    """A clock that jumps back an hour must not bring an old checkpoint back."""
    store = history(tmp_path, 10, 20)
    os.utime(tmp_path / "step-00000010", (2**31, 2**31))
    os.utime(tmp_path / "step-00000020", (0, 0))
    assert [found.step for found in store.list()] == [20, 10]


@pytest.mark.parametrize(
    "hint", [b"", b"step-0000", b"\xff\x00" * 40, b"step-00009999\n", b"../../etc", b"step-00000010\n"]
)
def test_latest_is_only_a_hint(tmp_path: Path, hint: bytes, caplog: pytest.LogCaptureFixture) -> None:
    store = history(tmp_path, 10, 20)
    (tmp_path / "LATEST").write_bytes(hint)
    found = store.newest_verified()
    assert found is not None
    assert found.step == 20
    assert "LATEST" in caplog.text


def test_latest_names_the_newest(tmp_path: Path) -> None:
    history(tmp_path, 10, 20)
    assert (tmp_path / "LATEST").read_text() == "step-00000020\n"


@pytest.mark.parametrize("umask", [0o000, 0o077, 0o777])
def test_modes_do_not_depend_on_the_umask(tmp_path: Path, umask: int) -> None:
    tmp_path.chmod(0o755)
    before = os.umask(umask)
    try:
        store = CheckpointStore(tmp_path / "checkpoints")
        store.begin(0, "t")
        folder = store.open_staging(10, 0, "t")
        (folder / "sub").mkdir()
        (folder / "sub").chmod(0o775)
        (folder / "sub" / "file").write_bytes(b"x")
        (folder / "sub" / "file").chmod(0o664)
        store.commit(10, 0, "t", store.seal(folder, ["sub/file"]), {})
    finally:
        os.umask(before)
    modes = {name: stat.S_IMODE(status.st_mode) for name, status in walk(tmp_path)}
    assert {mode for name, mode in modes.items() if (tmp_path / name).is_file()} == {0o600}
    assert {mode for name, mode in modes.items() if (tmp_path / name).is_dir()} == {0o700}


def test_saving_a_step_again_keeps_the_good_one(tmp_path: Path) -> None:
    store = history(tmp_path, 10)
    first = store.list()[0]
    assert save(store, 10, 0) == first
    assert [path.name for path in (tmp_path / ".incarnation-0-t").iterdir()] == [BEGUN]


def test_saving_a_step_again_replaces_a_corrupt_one(tmp_path: Path) -> None:
    store = history(tmp_path, 10)
    (tmp_path / "step-00000010" / "empty.lock").write_bytes(b"x")
    replaced = save(store, 10, 0)
    assert store.verify(replaced) == []
    assert holds_what_was_written(replaced)
    assert [path.name for path in (tmp_path / ".incarnation-0-t").iterdir()] == [BEGUN]


def test_a_save_starts_from_an_empty_folder(tmp_path: Path) -> None:
    store = history(tmp_path)
    (store.open_staging(10, 0, "t") / "left_over").write_bytes(b"x")
    assert "left_over" not in {name for name, _ in walk(save(store, 10, 0).path)}


@pytest.mark.parametrize("kind", ["unsealed", "missing", "grown", "twice"])
def test_commit_refuses_a_folder_that_is_not_as_sealed(tmp_path: Path, kind: str) -> None:
    store = history(tmp_path, 5)
    folder = store.open_staging(10, 0, "t")
    (folder / "a.pt").write_bytes(b"aa")
    records = store.seal(folder, ["a.pt"])
    if kind == "unsealed":
        (folder / "a.pt").rename(folder / "b.pt")
        (folder / "a.pt").write_bytes(b"aa")
    elif kind == "missing":
        (folder / "a.pt").unlink()
    elif kind == "grown":
        (folder / "a.pt").write_bytes(b"aaa")
    else:
        records *= 2
    with pytest.raises(CheckpointWriteError, match=r"b\.pt" if kind == "unsealed" else r"a\.pt"):
        store.commit(10, 0, "t", records, {})
    assert verified_steps(store) == [5]
    assert not folder.exists()


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "a/../b", "a//b", "", ".", "a\nb", "manifest.json"])
def test_seal_refuses_names_that_leave_the_folder(tmp_path: Path, name: str) -> None:
    store = history(tmp_path)
    with pytest.raises(StateError):
        store.seal(store.open_staging(10, 0, "t"), [name])


def test_seal_refuses_a_link(tmp_path: Path) -> None:
    store = history(tmp_path)
    (tmp_path / "secret").write_bytes(b"x")
    folder = store.open_staging(10, 0, "t")
    (folder / "a.pt").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointWriteError, match=r"a\.pt"):
        store.seal(folder, ["a.pt"])


def test_each_rank_verifies_its_share(tmp_path: Path) -> None:
    store = history(tmp_path, 10)
    found = store.list()[0]
    shares = [found.manifest.share(rank, 3) for rank in range(3)]
    assert sorted(name for share in shares for name in share) == sorted(FILES)
    bad = "zero/rank_1_optim_states.pt"
    raw = content(10, bad)
    (found.path / bad).write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    reports = [store.verify(found, share) for share in shares]
    assert [bool(report) for report in reports] == [bad in share for share in shares]
    assert all(bad in problem for report in reports for problem in report)


def choose_on_two_ranks(root: Path) -> list[tuple[Checkpoint | str | None, list[str]]]:
    """What each of two ranks gets, or the message it raises, and what it reports."""
    pipes = [os.pipe(), os.pipe()]

    def choose(rank: int) -> tuple[Checkpoint | str | None, list[str]]:
        reported: list[str] = []
        ranks = PipeRanks(rank, pipes[rank][1], os.fdopen(pipes[1 - rank][0]))
        try:
            return CheckpointStore(root).newest_verified(ranks, reported.append), reported
        except StateError as error:
            return f"{type(error).__name__}: {error}", reported

    with ThreadPoolExecutor(2) as pool:
        chosen = list(pool.map(choose, (0, 1)))
    for pipe in pipes:
        os.close(pipe[1])
    return chosen


@pytest.mark.parametrize("name", [*FILES, "manifest.json", "extra"])
def test_ranks_agree_though_only_one_sees_the_damage(tmp_path: Path, name: str) -> None:
    older = history(tmp_path, 10, 20).list()[1]
    with (tmp_path / "step-00000020" / name).open("ab") as file:
        file.write(b"x")
    (chosen, reported), (theirs, nothing) = choose_on_two_ranks(tmp_path)
    assert chosen == theirs == older
    assert reported[0].startswith("checkpoint not usable, trying an older one: step-00000020: ")
    assert name in reported[0]
    assert nothing == []


def test_ranks_agree_that_nothing_can_be_used(tmp_path: Path) -> None:
    history(tmp_path, 10)
    (tmp_path / "step-00000010" / "empty.lock").unlink()
    (message, _), (theirs, _) = choose_on_two_ranks(tmp_path)
    assert message == theirs
    assert str(message).startswith("NoUsableCheckpointError: no checkpoint can be used")


def test_ranks_agree_that_the_folder_cannot_be_listed(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    (message, _), (theirs, _) = choose_on_two_ranks(tmp_path / "checkpoints")
    assert message == theirs
    assert "cannot be listed" in str(message)


def test_the_layout_check_finds_extra_files_that_shares_do_not(tmp_path: Path) -> None:
    store = history(tmp_path, 10)
    found = store.list()[0]
    assert find_layout_problems(found) == []
    (found.path / "zero" / "extra.pt").write_bytes(b"x")
    assert [
        problem for rank in range(2) for problem in store.verify(found, found.manifest.share(rank, 2))
    ] == []
    assert ["zero/extra.pt" in problem for problem in find_layout_problems(found)] == [True]


def test_verify_names_a_file_that_is_not_in_the_manifest(tmp_path: Path) -> None:
    store = history(tmp_path, 10)
    assert "other.pt" in store.verify(store.list()[0], ["other.pt"])[0]


def test_a_linked_checkpoint_is_refused(tmp_path: Path) -> None:
    store = history(tmp_path / "checkpoints", 10, 20)
    newest = store.root / "step-00000020"
    newest.rename(tmp_path / "elsewhere")
    newest.symlink_to(tmp_path / "elsewhere")
    assert verified_steps(store) == [10]


@pytest.mark.parametrize("name", ["zero", "zero/rank_0_optim_states.pt", "manifest.json"])
def test_a_link_inside_a_checkpoint_is_refused(tmp_path: Path, name: str) -> None:
    store = history(tmp_path / "checkpoints", 10, 20)
    inside = store.root / "step-00000020" / name
    inside.rename(tmp_path / "elsewhere")
    inside.symlink_to(tmp_path / "elsewhere")
    assert verified_steps(store) == [10]
    assert name.partition("/")[0] in next(iter(store.survey())).problem + "".join(
        problem for found in store.list() for problem in store.verify(found)
    )


@pytest.mark.parametrize("name", ["", "zero", "zero/rank_0_optim_states.pt", "manifest.json"])
def test_what_others_may_write_is_not_loaded(tmp_path: Path, name: str) -> None:
    store = history(tmp_path, 10, 20)
    (tmp_path / "step-00000020" / name).chmod(0o722)
    assert verified_steps(store) == [10]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("name", ["", "zero", "zero/rank_0_optim_states.pt", "manifest.json"])
def test_what_belongs_to_others_is_not_loaded(tmp_path: Path, name: str) -> None:
    store = history(tmp_path, 10, 20)
    os.chown(tmp_path / "step-00000020" / name, 12345, 12345)
    assert verified_steps(store) == [10]


def test_a_pipe_in_place_of_a_file_does_not_hang_the_load(tmp_path: Path) -> None:
    store = history(tmp_path, 10, 20, 30)
    for step, name in ((30, "manifest.json"), (20, "rng/rank_0.json")):
        path = tmp_path / f"step-{step:08d}" / name
        path.unlink()
        os.mkfifo(path, 0o600)
    assert verified_steps(store) == [10]


def test_no_usable_checkpoint_is_never_a_fresh_start(tmp_path: Path) -> None:
    store = history(tmp_path, 10, 20)
    (tmp_path / "step-00000010" / "rng/rank_0.json").unlink()
    (tmp_path / "step-00000020" / "manifest.json").write_text("{")
    with pytest.raises(NoUsableCheckpointError) as caught:
        store.newest_verified()
    message = str(caught.value)
    assert "step-00000010: " in message
    assert "rng/rank_0.json is missing" in message
    assert "step-00000020: " in message
    assert "manifest.json is truncated" in message


def test_an_empty_step_folder_is_not_a_fresh_start(tmp_path: Path) -> None:
    (tmp_path / "step-00000010").mkdir(mode=0o700)
    with pytest.raises(NoUsableCheckpointError):
        CheckpointStore(tmp_path).newest_verified()


def test_two_are_kept_at_least(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path, keep=1).keep == 2


def test_a_folder_of_checkpoints_that_others_may_write_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(StateError, match="chmod go-w"):
        CheckpointStore(tmp_path).begin(0, "t")


def test_the_checkpoint_folder_may_be_reached_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir(mode=0o700)
    (tmp_path / "checkpoints").symlink_to("scratch")
    assert verified_steps(history(tmp_path / "checkpoints", 10)) == [10]


def test_the_manifest_is_readable_json(tmp_path: Path) -> None:
    store = history(tmp_path, 10)
    body = json.loads((store.root / "step-00000010" / "manifest.json").read_text())
    assert set(body) == {"digest", "format", "step", "attempt", "created", "files", "meta"}


@pytest.mark.skipif(os.getuid() != 0, reason="only root can show a process another directory")
@pytest.mark.parametrize("blind", [0, 1])
def test_ranks_agree_though_one_does_not_see_the_newest_yet(tmp_path: Path, blind: int) -> None:
    """As with an old listing of a network file system: that rank has a mount namespace of its own."""
    history(tmp_path / "checkpoints", 10, 20)
    (tmp_path / "empty").mkdir(mode=0o700)
    pipes = [os.pipe(), os.pipe()]

    def choose(rank: int) -> None:
        os.close(pipes[1 - rank][1])  # else the other rank's end would never be noticed
        if rank == blind:
            hide(tmp_path / "checkpoints" / "step-00000020", tmp_path / "empty")
        ranks = PipeRanks(rank, pipes[rank][1], os.fdopen(pipes[1 - rank][0]))
        chosen = CheckpointStore(tmp_path / "checkpoints").newest_verified(ranks)
        (tmp_path / f"chosen-by-{rank}").write_text(str(chosen and chosen.step))

    pids = [start_child(lambda rank=rank: choose(rank)) for rank in (0, 1)]  # type: ignore[misc]
    for end in (*pipes[0], *pipes[1]):
        os.close(end)
    assert [end_of(pid) for pid in pids] == [DONE, DONE]
    assert [(tmp_path / f"chosen-by-{rank}").read_text() for rank in (0, 1)] == ["10", "10"]


def hide(folder: Path, behind: Path) -> None:
    """Show this process `behind` in the place of `folder`."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(0x00020000) == 0  # CLONE_NEWNS
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "--bind", str(behind), str(folder)], check=True)
