"""Feeders that die, hang, or do not finish: real processes, as a tracker's are."""

import os
import sys
import time
from pathlib import Path

import pytest

from r1hpc.telemetry.trackers import keeper
from r1hpc.telemetry.trackers.keeper import keep_feeders
from tests.runs import wait_until

_LIVE = """
import os, select, sys
open(sys.argv[1], "a").write(f"{os.getpid()}\\n")
while not select.select([0], [], [], 0.1)[0]:
    os.write(1, b".")
open(sys.argv[1], "a").write("finished\\n")
"""
_DIE = _LIVE.replace("while not", "os._exit(3)\nwhile not")
_HANG = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
open(sys.argv[1], "a").write(f"{child.pid}\\n")
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "_PAUSES_S", (0.1,))


def command(code: str, log: Path) -> list[str]:
    return [sys.executable, "-c", code, str(log)]


def lines(log: Path) -> list[str]:
    return log.read_text().split() if log.exists() else []


def is_gone(pid: str) -> bool:
    """Dead, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_each_lives_until_the_attempt_is_over_and_then_finishes(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    commands = {"a": command(_LIVE, a), "b": command(_LIVE, b)}
    keep_feeders(commands, lambda: bool(lines(a) and lines(b)))
    for log in (a, b):
        pid, last = lines(log)
        assert last == "finished"
        assert is_gone(pid)


def test_one_that_dies_is_started_again_and_costs_the_other_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    dying, living = tmp_path / "dying", tmp_path / "living"
    commands = {"dying": command(_DIE, dying), "living": command(_LIVE, living)}
    keep_feeders(commands, lambda: len(lines(dying)) >= 3)
    assert len(set(lines(dying))) >= 3, "three processes"
    assert [line for line in lines(living) if line != "finished"] == lines(living)[:1]
    assert "dying ended with status 3" in capfd.readouterr().err


def test_one_that_hangs_is_killed_with_what_it_started(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "_PATIENCE_S", 0.5)
    monkeypatch.setattr(keeper, "_FINISH_S", 0.1)
    log = tmp_path / "log"
    commands = {"wandb": command(_HANG, log)}
    keep_feeders(commands, lambda: len(lines(log)) >= 2)
    wait_until("end of all", lambda: all(map(is_gone, lines(log))), 10)
    said = capfd.readouterr().err
    assert "wandb gave no sign of life" in said
    assert "wandb did not finish" in said


def test_one_that_cannot_be_started_is_tried_again(tmp_path: Path) -> None:
    program = tmp_path / "program"
    begun = time.monotonic()

    def is_over() -> bool:
        if time.monotonic() - begun > 1 and not program.exists():
            program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "$CODE" {tmp_path / "log"}\n')
            program.chmod(0o700)
        return bool(lines(tmp_path / "log"))

    os.environ["CODE"] = _LIVE
    try:
        keep_feeders({"a": [str(program)]}, is_over)
    finally:
        del os.environ["CODE"]
    assert lines(tmp_path / "log")[-1] == "finished"
