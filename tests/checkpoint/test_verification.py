"""Every kind of file, damaged in every way: the problem names the file and an older checkpoint is used."""

import errno
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from r1hpc.checkpoint.manifest import digest_fd, read_plain
from r1hpc.checkpoint.store import CheckpointStore, NoUsableCheckpointError
from tests.checkpoint.harness import FILES, history, save, write_files

PAGE = 4096


def flip_a_byte(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0x10
    path.write_bytes(raw)


def zero_a_page(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    start = PAGE if len(raw) > PAGE else 0
    end = min(start + PAGE, len(raw))
    raw[start:end] = bytes(end - start)
    path.write_bytes(raw)


def delete(path: Path) -> None:
    path.unlink()


def truncate_by_one(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def grow_by_one(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def swap_from_another_step(path: Path) -> None:

    source = Path(*[part if part != "step-00000020" else "step-00000010" for part in path.parts])

    path.write_bytes(source.read_bytes())


def add_a_file_beside(path: Path) -> None:
    (path.parent / f"{path.name}.extra").write_bytes(b"")


DAMAGES: list[Callable[[Path], None]] = [
    flip_a_byte,
    zero_a_page,
    delete,
    truncate_by_one,
    grow_by_one,
    swap_from_another_step,
    add_a_file_beside,
]
CASES = [
    (name, damage)
    for name in [*FILES, "manifest.json"]
    for damage in DAMAGES
    # An empty file has no byte to flip and is the same in every step.
    if name != "empty.lock" or damage in (delete, grow_by_one, add_a_file_beside)
]


@pytest.mark.parametrize(("name", "damage"), CASES, ids=lambda case: getattr(case, "__name__", case))
def test_damage_is_named_and_the_older_one_used(
    tmp_path: Path, name: str, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    store = history(tmp_path, 10, 20)
    damage(tmp_path / "step-00000020" / name)
    found = store.newest_verified()
    assert found is not None
    assert found.step == 10
    assert f"step-00000020/{name}" in caplog.text


@pytest.mark.parametrize(("name", "damage"), CASES, ids=lambda case: getattr(case, "__name__", case))
def test_all_damaged_is_an_error_that_names_each(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    store = history(tmp_path, 20)
    save(store, 30, 0)
    (tmp_path / "step-00000010").mkdir(mode=0o700)
    (tmp_path / "step-00000030" / "manifest.json").unlink()
    if damage is not swap_from_another_step:
        damage(tmp_path / "step-00000020" / name)
    else:
        (tmp_path / "step-00000020" / name).write_bytes(b"of another step")
    with pytest.raises(NoUsableCheckpointError) as caught:
        CheckpointStore(tmp_path).newest_verified()
    for text in ("step-00000010: ", f"step-00000020/{name}", "step-00000030: "):
        assert text in str(caught.value)


def test_a_page_swapped_within_a_file_is_found(tmp_path: Path) -> None:
    store = history(tmp_path, 10)
    path = tmp_path / "step-00000010" / "mp_rank_00_model_states.pt"
    raw = path.read_bytes()
    path.write_bytes(raw[PAGE : 2 * PAGE] + raw[:PAGE] + raw[2 * PAGE :])
    assert "mp_rank_00_model_states.pt" in store.verify(store.list()[0])[0]


def test_every_bad_file_is_listed(tmp_path: Path) -> None:
    store = history(tmp_path, 10)
    found = store.list()[0]
    damaged = [name for name in FILES if FILES[name]]
    for name in damaged:
        flip_a_byte(found.path / name)
    problems = store.verify(found)
    assert [[name in problem for problem in problems].count(True) for name in damaged] == [1] * len(damaged)


def test_a_read_that_fails_once_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An older checkpoint in its place would cost its steps, and this one would be replaced."""
    store = history(tmp_path, 10, 20)
    whole, failures = digest_fd, [errno.EIO, errno.ESTALE]

    def hiccup(fd: int) -> tuple[int, str]:
        if failures:
            raise OSError(failures.pop(), "hiccup")
        return whole(fd)

    monkeypatch.setattr("r1hpc.checkpoint.verification.digest_fd", hiccup)
    monkeypatch.setattr("r1hpc.checkpoint.disk._PAUSES_S", (0.0, 0.0, 0.0))
    found = CheckpointStore(store.root).newest_verified()
    assert (found.step if found else None) == 20
    assert not failures


def test_a_manifest_that_cannot_be_read_once_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = history(tmp_path, 10, 20)
    whole, failures = read_plain, [errno.EIO]

    def hiccup(path: Path) -> bytes:
        if failures:
            raise OSError(failures.pop(), "hiccup")
        return whole(path)

    monkeypatch.setattr("r1hpc.checkpoint.manifest.read_plain", hiccup)
    monkeypatch.setattr("r1hpc.checkpoint.disk._PAUSES_S", (0.0, 0.0, 0.0))
    assert [each.step for each in store.list()] == [20, 10]


def test_a_nan_in_what_is_kept_beside_the_weights_is_no_change(tmp_path: Path) -> None:
    """As another rank has it, by a pickle: it is not equal to itself."""
    store = history(tmp_path)
    folder = store.open_staging(10, 0, "t")
    write_files(folder, 10)
    store.commit(10, 0, "t", store.seal(folder, FILES), {"validation": [float("nan")]})
    sent = pickle.loads(pickle.dumps(store.list()[0]))
    assert store.verify(sent) == []


def test_a_manifest_changed_after_it_was_read_is_noticed(tmp_path: Path) -> None:
    store = history(tmp_path, 10)
    found = store.list()[0]
    (found.path / "manifest.json").unlink()
    assert "manifest.json" in store.verify(found)[0]
