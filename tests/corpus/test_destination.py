"""A destination that is there already, and one that several builds have at once."""

import errno
import fcntl
import os
import shutil
import socket
import threading
import time
from pathlib import Path

import pytest

from r1hpc.base.errors import UsageError
from r1hpc.corpus.build.build import build_dataset
from r1hpc.corpus.engine.work_dir import open_work
from r1hpc.data.format.errors import ShardMissingError
from r1hpc.data.format.manifest import INPUT_STATES
from r1hpc.data.read.reader import open_dataset
from tests.corpus.builds import names
from tests.corpus.corpus import build, write_recipe, write_texts


def test_second_build_does_nothing_and_says_so(tmp_path: Path) -> None:
    first = build(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in first.path.rglob("*")}
    second = build(tmp_path)
    assert (first.built, second.built, second.note) == (True, False, "")
    assert first.id == second.id
    assert {path: path.stat().st_mtime_ns for path in first.path.rglob("*")} == before
    (tmp_path / "docs/new.txt").write_text("more")
    assert "inputs have changed" in build(tmp_path).note


def test_foreign_destination_is_refused(tmp_path: Path) -> None:
    build(tmp_path)
    with pytest.raises(UsageError, match="another recipe"):
        build(tmp_path, part_bytes=77)
    with pytest.raises(UsageError, match="is no dataset"):
        build(tmp_path, "docs")
    with pytest.raises(UsageError, match="is not a folder"):
        build_dataset(tmp_path / "recipe.yaml", tmp_path / "recipe.yaml" / "below")
    (tmp_path / "empty").mkdir()
    assert build(tmp_path, "empty").built


@pytest.mark.parametrize("address", ["s3://bucket/x", "hf://datasets/a/b", "file:///x"])
def test_an_address_is_no_destination(tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path)
    before = set(tmp_path.iterdir())
    with pytest.raises(UsageError, match="is an address, not a folder"):
        build_dataset(recipe, Path(address))
    assert set(tmp_path.iterdir()) == before


def test_an_input_edited_at_the_same_size_is_noticed(tmp_path: Path) -> None:
    first = build(tmp_path)
    path = tmp_path / "docs" / "003.txt"
    path.write_text(path.read_text().swapcase())
    again = build(tmp_path)
    assert (again.built, again.id) == (False, first.id)
    assert "written again since (texts/docs/003.txt), with the same sizes" in again.note
    other = build(tmp_path, "other")  # the same inputs at another time
    os.utime(path)
    assert build(tmp_path, "third").id == other.id != first.id


def test_digests_tell_an_edit_from_a_copy(tmp_path: Path) -> None:
    write_texts(tmp_path)
    recipe, path = write_recipe(tmp_path), tmp_path / "docs" / "003.txt"
    assert build_dataset(recipe, tmp_path / "plain").note == ""
    assert "without --check-inputs" in build_dataset(recipe, tmp_path / "plain", check_inputs=True).note
    build_dataset(recipe, tmp_path / "out", check_inputs=True)
    state = path.stat()
    os.utime(path, ns=(0, 0))
    assert build_dataset(recipe, tmp_path / "out").note == ""
    path.write_text(path.read_text().swapcase())
    assert "have changed since (texts/docs/003.txt)" in build_dataset(recipe, tmp_path / "out").note
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert build_dataset(recipe, tmp_path / "out").note == ""
    assert "have changed since" in build_dataset(recipe, tmp_path / "out", check_inputs=True).note


def test_a_changed_file_beside_the_inputs_is_noticed(tmp_path: Path) -> None:
    write_texts(tmp_path)
    made = build_dataset(write_recipe(tmp_path), tmp_path / "first").path
    shutil.copytree(made / "tokenizer", tmp_path / "tok")
    held_out = tmp_path / "held.jsonl"
    held_out.write_text('{"text": "one two three four five six seven eight nine"}\n')
    own = {"kind": "path", "path": "tok"}
    recipe = write_recipe(tmp_path, tokenizer=own, decontaminate={"against": ["held.jsonl"]})
    assert build_dataset(recipe, tmp_path / "out").note == ""
    assert build_dataset(recipe, tmp_path / "out").note == ""
    before = held_out.read_text()
    held_out.write_text('{"text": "nine eight seven six five four three two one"}\n')
    assert "have changed since" in build_dataset(recipe, tmp_path / "out").note
    held_out.write_text(before)
    assert build_dataset(recipe, tmp_path / "out").note == ""
    (tmp_path / "tok" / "chat_template.jinja").write_text("{{ messages }}")
    assert "have changed since" in build_dataset(recipe, tmp_path / "out").note


def test_a_dataset_of_an_earlier_version_is_there_with_a_note(tmp_path: Path) -> None:
    first = build(tmp_path)
    (first.path / INPUT_STATES).unlink()
    again = build(tmp_path)
    assert (again.built, again.id) == (False, first.id)
    assert "an earlier version built it" in again.note


def test_damaged_destination_is_not_called_built(tmp_path: Path) -> None:
    report = build(tmp_path)
    (report.path / "parts/part-00000/tokens/c/1").unlink()
    with pytest.raises(ShardMissingError, match="tokens/c/1"):
        build(tmp_path)


def test_builds_at_once_agree(tmp_path: Path) -> None:
    """Every rank of a job may ask for the dataset; one publishes, all get it."""
    write_texts(tmp_path)
    recipe = write_recipe(tmp_path)
    reports = []

    def run() -> None:
        reports.append(build_dataset(recipe, tmp_path / "out"))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reports) == 4
    assert len({report.id for report in reports}) == 1
    assert [report.built for report in reports].count(True) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["docs", "out", "recipe.yaml"]


def test_a_link_to_a_folder_is_a_destination(tmp_path: Path) -> None:
    (tmp_path / "scratch" / "set").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "scratch" / "set")
    built = build(tmp_path, "out")
    assert built.path == tmp_path / "scratch" / "set"
    assert open_dataset(tmp_path / "out").id == built.id
    assert not build(tmp_path, "out").built
    assert names(tmp_path / "scratch") == {"set"}


def test_a_build_that_waits_says_for_whom(tmp_path: Path) -> None:
    write_texts(tmp_path)
    recipe = write_recipe(tmp_path)
    out = tmp_path / "data" / "out"
    said: list[str] = []
    with open_work(out):
        thread = threading.Thread(target=build_dataset, args=(recipe, out), kwargs={"report": said.append})
        thread.start()
        while not said:
            time.sleep(0.01)
    thread.join()
    assert said[0] == f"waiting for process {os.getpid()} on {socket.gethostname()}, which builds {out}"
    assert not any("waiting" in line for line in said[1:])


def test_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lustre without -o flock answers ENOSYS: builds at once then do double work and agree all the same."""

    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    write_texts(tmp_path)
    recipe = write_recipe(tmp_path, part_bytes=900)
    reports = []
    threads = [
        threading.Thread(target=lambda: reports.append(build_dataset(recipe, tmp_path / "out")))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reports) == 3
    assert len({report.id for report in reports}) == 1
    assert names(tmp_path) == {"docs", "recipe.yaml", "out"}
