"""Faults happen where, when and on the rank that they were asked for."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from r1hpc.base import failpoints
from r1hpc.base.failpoints import failpoint


@pytest.fixture(autouse=True)
def _from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failpoints, "_calls", {})
    monkeypatch.delenv("RANK", raising=False)


def _ask(monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    monkeypatch.setenv("R1HPC_FAILPOINT", wanted)


def test_nothing_is_asked_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("R1HPC_FAILPOINT", raising=False)
    failpoint("save")
    _ask(monkeypatch, "other:raise")
    failpoint("save")


@pytest.mark.parametrize(("action", "code"), [("enospc", errno.ENOSPC), ("eio", errno.EIO)])
def test_file_system_errors(monkeypatch: pytest.MonkeyPatch, action: str, code: int) -> None:
    _ask(monkeypatch, f"save:{action}")
    with pytest.raises(OSError, match="failpoint save") as caught:
        failpoint("save")
    assert caught.value.errno == code


def test_the_nth_call_only(monkeypatch: pytest.MonkeyPatch) -> None:
    _ask(monkeypatch, "save:raise::3,load:raise")
    failpoint("save")
    failpoint("save")
    with pytest.raises(RuntimeError, match="failpoint save"):
        failpoint("save")
    failpoint("save")
    with pytest.raises(RuntimeError, match="failpoint load"):
        failpoint("load")


@pytest.mark.parametrize(("rank", "own", "hit"), [("1", "1", True), ("1", "0", False), ("*", "7", True)])
def test_the_rank_only(monkeypatch: pytest.MonkeyPatch, rank: str, own: str, hit: bool) -> None:
    monkeypatch.setenv("RANK", own)
    _ask(monkeypatch, f"save:raise:{rank}")
    if hit:
        with pytest.raises(RuntimeError):
            failpoint("save")
    else:
        failpoint("save")


def test_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    _ask(monkeypatch, "save:sleep=0.05")
    before = time.monotonic()
    failpoint("save")
    assert time.monotonic() - before >= 0.05


def test_until_a_file_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    go = tmp_path / "go"
    _ask(monkeypatch, f"save:until={go}")
    monkeypatch.setattr(failpoints, "_UNTIL_S", 0.1)
    with pytest.raises(TimeoutError, match=f"failpoint save: no {go} in"):
        failpoint("save")
    go.touch()
    _ask(monkeypatch, f"save:until={go}::2")
    failpoint("save")


def test_an_unknown_action(monkeypatch: pytest.MonkeyPatch) -> None:
    _ask(monkeypatch, "save:explode")
    with pytest.raises(ValueError, match="unknown action 'explode'"):
        failpoint("save")


@pytest.mark.parametrize(("action", "status"), [("kill9", -signal.SIGKILL), ("exit", 3)])
def test_ends_of_the_process(action: str, status: int) -> None:
    code = "from r1hpc.base.failpoints import failpoint; failpoint('save'); print('alive')"
    environment = os.environ | {"R1HPC_FAILPOINT": f"save:{action}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (status, "")
