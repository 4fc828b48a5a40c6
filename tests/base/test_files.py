"""Files that survive a kill: whole or not at all, and torn lines left out."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1hpc.base.errors import StateError
from r1hpc.base.files import (
    append_record,
    check_owned,
    iter_objects,
    iter_records,
    read_json,
    read_records,
    write_atomic,
    write_json,
)

_RECORDS = st.lists(st.dictionaries(st.text(max_size=4), st.integers() | st.text(max_size=4), max_size=3))


@settings(max_examples=40)
@given(records=_RECORDS, cut=st.integers(0, 200), later=_RECORDS)
def test_a_torn_line_costs_only_itself(
    tmp_path_factory: pytest.TempPathFactory, records: list[Any], cut: int, later: list[Any]
) -> None:
    path = tmp_path_factory.mktemp("records") / "x.jsonl"
    for record in records:
        append_record(path, record, durable=False)
    raw = path.read_bytes() if records else b""
    kept = raw[: max(0, len(raw) - cut)]
    path.write_bytes(kept)
    for record in later:
        append_record(path, record, durable=False)
    whole = kept.count(b"\n")
    # A cut exactly before the newline leaves a whole object; the next append gives it its line back.
    complete = bool(kept) and not kept.endswith(b"\n") and kept.split(b"\n")[-1].endswith(b"}")
    survived = read_records(path)
    expected = records[:whole] + ([records[whole]] if complete and _is_json(kept) else []) + later
    assert survived == expected


def _is_json(raw: bytes) -> bool:
    try:
        json.loads(raw.split(b"\n")[-1])
    except ValueError:
        return False
    return True


def test_lines_that_are_no_objects_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'[1]\n\xff\xfe\n{"a": 1}\n3\n\n{"b"')
    assert read_records(path) == [{"a": 1}]
    assert list(iter_records(tmp_path / "none")) == []


def test_a_line_that_is_being_written_is_not_taken_for_two(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n' * 255 + b'{"a": ')
    found = iter_objects(path)
    before = [next(found) for _ in range(256)]
    with path.open("ab") as file:
        file.write(b'2}\n{"a": 3}\n')
    assert list(found) == []
    assert before[-2:] == [(255 * 9, {"a": 1}), (255 * 9 + 6, None)]
    assert list(iter_objects(path, 255 * 9)) == [(256 * 9, {"a": 2}), (257 * 9, {"a": 3})]


def test_a_record_is_one_line(tmp_path: Path) -> None:
    append_record(tmp_path / "x", {"text": "a\nb\u2028c"})
    assert (tmp_path / "x").read_bytes().count(b"\n") == 1
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o600


def test_appends_of_many_processes_do_not_mix(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from r1hpc.base.files import append_record\n"
        "for i in range(200):\n"
        "    append_record(Path(sys.argv[1]), {'n': sys.argv[2] * 300, 'i': i}, durable=False)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "x")]
    processes = [subprocess.Popen([*command, name]) for name in "abc"]
    assert [process.wait() for process in processes] == [0, 0, 0]
    records = read_records(tmp_path / "x")
    for name in "abc":
        assert [record["i"] for record in records if record["n"] == name * 300] == list(range(200))


def test_write_atomic_does_not_wait_for_a_reader(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "state.json")
    write_atomic(tmp_path / "state.json", "{}")
    assert (tmp_path / "state.json").read_text() == "{}"


def test_write_atomic_leaves_a_device_in_place(tmp_path: Path) -> None:
    link = tmp_path / "null"
    link.symlink_to("/dev/null")
    write_atomic(link, "text")
    assert link.is_symlink()
    assert link.is_char_device()


@pytest.mark.parametrize("content", ["text", b"\x00bytes", ""])
def test_write_atomic_replaces_the_whole(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "x"
    write_atomic(path, "something longer than what follows")
    write_atomic(path, content, mode=0o640)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.mkdir()  # os.replace onto a folder fails, after the temporary file was written
    with pytest.raises(OSError, match="x"):
        write_atomic(path, "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


def test_json_round_trip_and_its_error(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": [1.5, None]})
    assert read_json(path) == {"a": [1.5, None]}
    for raw in (b"{", b"\xff"):
        path.write_bytes(raw)
        with pytest.raises(StateError, match=r"x\.json is not valid JSON"):
            read_json(path)


class TestCheckOwned:
    def test_an_own_private_file(self, tmp_path: Path) -> None:
        write_atomic(tmp_path / "x", "")
        check_owned(tmp_path / "x")

    @pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
    def test_others_may_write(self, tmp_path: Path, mode: int) -> None:
        (tmp_path / "x").touch()
        (tmp_path / "x").chmod(mode)
        with pytest.raises(StateError, match="chmod go-w"):
            check_owned(tmp_path / "x")

    def test_a_link(self, tmp_path: Path) -> None:
        write_atomic(tmp_path / "x", "")
        (tmp_path / "link").symlink_to("x")
        with pytest.raises(StateError, match="symbolic link"):
            check_owned(tmp_path / "link")

    @pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
    def test_a_foreign_file(self, tmp_path: Path) -> None:
        (tmp_path / "x").touch(0o600)
        os.chown(tmp_path / "x", 12345, -1)
        with pytest.raises(StateError, match="belongs to uid 12345"):
            check_owned(tmp_path / "x")
