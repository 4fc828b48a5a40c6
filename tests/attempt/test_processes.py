"""Which processes are a run's."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from r1hpc.attempt.state import state
from r1hpc.attempt.state.state import _arguments, is_of_run, ranks_of


def test_a_process_is_the_runs_that_its_arguments_name(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", "input()", str(run)], stdin=subprocess.PIPE) as process:
        assert is_of_run(process.pid, run)  # at once, too
        assert not is_of_run(process.pid, tmp_path / "another")
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert not is_of_run(process.pid, run)


def test_one_that_is_just_being_started_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux closes what exec closes, which tells the parent that all went well, before it has arguments."""
    (tmp_path / "cmdline").write_bytes(b"")
    (tmp_path / "exe").symlink_to(sys.executable)
    monkeypatch.setattr(state, "_LOOKS", 1000)
    later = threading.Timer(0.3, (tmp_path / "cmdline").write_bytes, [b"python\0/run\0"])
    later.start()
    assert _arguments(tmp_path) == [b"python", b"/run", b""]
    later.join()


def test_one_that_has_no_arguments_for_good_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A zombie, or a thread of the kernel's own: /proc has dozens of them."""

    def pause(seconds: float) -> None:
        raise AssertionError("it waits")

    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        monkeypatch.setattr(time, "sleep", pause)
        assert not is_of_run(process.pid, tmp_path)
        monkeypatch.undo()


def test_ranks_are_found_by_the_job_that_started_them(tmp_path: Path) -> None:
    environment = {**os.environ, "R1HPC_LOCAL_JOB_ID": "local-1"}
    command = [sys.executable, "-c", "input()", str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, env=environment) as process:
        assert ranks_of(tmp_path, "local-1") == [process.pid]
        assert ranks_of(tmp_path, "local-2") == []
        process.kill()
