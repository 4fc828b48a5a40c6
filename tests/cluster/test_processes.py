"""Processes are known by pid and start time, and a wait that fails shows the log."""

import os
import signal
from pathlib import Path

import pytest

from tests.cluster.processes import ClusterError, alive, call, end, spawn, this_process, until


def test_end_ends_a_process_that_ignores_sigterm(tmp_path: Path) -> None:
    process = spawn(
        ["bash", "-c", "trap '' TERM; echo deaf; while :; do sleep 0.1; done"], tmp_path / "log", {}
    )
    until("the trap", lambda: "deaf" in (tmp_path / "log").read_text(), 10)
    assert alive(process)
    end(process, signal.SIGTERM, patience=0.3)
    assert not alive(process)


def test_another_process_with_the_same_pid_is_not_ours() -> None:
    pid, started = this_process()
    assert not alive((pid, started - 1))
    end((pid, started - 1))  # must not kill this test
    assert os.getpid() == pid


def test_a_wait_that_fails_says_what_and_shows_the_log(tmp_path: Path) -> None:
    log = tmp_path / "slurmd.log"
    log.write_text("fatal: the cause\n")
    with pytest.raises(ClusterError, match=r"node up: not within 0 s\n.*slurmd.log\nfatal: the cause"):
        until("node up", lambda: False, 0.2, log)


def test_a_failed_command_is_reported_with_its_own_words() -> None:
    with pytest.raises(ClusterError, match=r"exited 2: .*No such file"):
        call(["ls", "/no/such"])
