"""Which processes are a run's."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from r1hpc.attempt.processes import _arguments, is_of_run, ranks_of


def test_a_process_is_the_runs_that_its_arguments_name(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", "input()", str(run)], stdin=subprocess.PIPE) as process:
        assert is_of_run(process.pid, run)  # at once, too
        assert not is_of_run(process.pid, tmp_path / "another")
        process.kill()
        while b") Z " not in Path(f"/proc/{process.pid}/stat").read_bytes():
            time.sleep(0.01)
        assert not is_of_run(process.pid, run)


def test_one_that_is_just_being_started_is_waited_for(tmp_path: Path) -> None:
    """Linux closes what exec closes, which tells the parent that all went well, before it has arguments."""
    (tmp_path / "cmdline").write_bytes(b"")
    (tmp_path / "exe").symlink_to(sys.executable)
    later = threading.Timer(0.3, (tmp_path / "cmdline").write_bytes, [b"python\0/run\0"])
    later.start()
    assert _arguments(tmp_path) == [b"python", b"/run", b""]
    later.join()


def test_of_all_that_runs_here_the_runs_ranks_are_found_in_no_time(tmp_path: Path) -> None:
    """Dozens of them are the kernel's, and have no arguments for good."""
    environment = {**os.environ, "R1HPC_LOCAL_JOB_ID": "local-1"}
    command = [sys.executable, "-c", "input()", str(tmp_path)]
    started = time.monotonic()
    with subprocess.Popen(command, stdin=subprocess.PIPE, env=environment) as process:
        assert ranks_of(tmp_path, "local-1") == [process.pid]
        assert ranks_of(tmp_path, "local-2") == []
        process.kill()
    assert time.monotonic() - started < 20


@pytest.mark.skipif(not Path("/proc/2/comm").exists(), reason="the kernel's threads are not seen from here")
def test_a_thread_of_the_kernel_has_no_arguments() -> None:
    with pytest.raises(OSError, match="exe"):
        _arguments(Path("/proc/2"))
