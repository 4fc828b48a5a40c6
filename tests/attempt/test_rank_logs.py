"""Logs of ranks: their end, what follows over all attempts, and nothing that drives a terminal."""

import threading
import time
from pathlib import Path

import pytest

from r1hpc.attempt.state import logs
from r1hpc.base.run_dir import RunDir
from tests.recorded import RecordedRun
from tests.runs import wait_until


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        (b"\x1b[31mred\x1b[0m", "red"),
        (b"\x1b]0;title\x07text", "text"),
        (b"10%\r50%\r100%\r", "100%"),
        (b"a\x00b\x08c\x9b", "abc\N{REPLACEMENT CHARACTER}"),
        (b"tab\tstays", "tab\tstays"),
        ("bidi\u202etxt".encode(), "biditxt"),
        (b"\x1b", ""),
    ],
)
def test_a_log_cannot_drive_the_terminal(raw: bytes, shown: str) -> None:
    assert logs.clean(raw) == shown


def test_a_long_log_is_read_from_its_end(tmp_path: Path) -> None:
    path = tmp_path / "rank_0.out"
    path.write_bytes(b"".join(b"line %d\n" % n for n in range(50_000)) + b"unfinished")
    assert logs.tail(path, 2) == [b"line 49999", b"unfinished"]
    assert len(logs.tail(path, 30_000)) == 30_000


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RecordedRun:
    """A run at work in its first attempt, which has logged a line."""
    monkeypatch.setenv("PATH", str(tmp_path))  # no Slurm
    run = RecordedRun(tmp_path / "demo")
    run.submit("4711", "slurm")
    run.begin()
    run.log("one")
    return run


def test_what_came_while_the_next_attempt_began_is_followed_too(
    made: RecordedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begins_meanwhile(run: RunDir) -> int | None:
        monkeypatch.setattr(logs, "last_attempt", newest)
        with run.rank_log(1, 0).open("a") as file:
            file.write("two\nunfinished")
        made.end("preempted")
        made.begin()
        made.log("three")
        return newest(run)

    newest = logs.last_attempt
    lines = logs.follow(made.run, 0, None, 1)
    seen = [next(lines)]
    monkeypatch.setattr(logs, "last_attempt", begins_meanwhile)
    seen += [next(lines) for _ in range(4)]
    assert seen == ["one", "two", "unfinished", "==> attempt 2, rank 0 <==", "three"]


def test_follow_goes_on_with_the_next_attempt_until_the_end(made: RecordedRun) -> None:
    made.log("two")
    seen: list[str] = []
    reader = threading.Thread(target=lambda: seen.extend(logs.follow(made.run, 0, None, 1)))
    reader.start()
    wait_until("the last line", lambda: seen == ["two"], 60)
    made.log("three")
    made.end("preempted")
    made.begin()
    made.log("four")
    wait_until("the next attempt's", lambda: seen[-1] == "four", 60)
    with made.run.rank_log(2, 0).open("a") as file:
        file.write("fi")
        file.flush()
        time.sleep(0.5)  # it is read, and not taken for a line
        file.write("ve\nunfinished")
    made.end("finished", 2)
    reader.join(60)
    assert not reader.is_alive()
    assert seen == ["two", "three", "==> attempt 2, rank 0 <==", "four", "five", "unfinished"]
