"""Signals and files become wishes; nothing happens inside a handler."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from r1hpc.attempt.control.stop import Deadlines, StopRequests
from r1hpc.base.run_dir import RunDir


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path / "run")
    made.create()
    return made


@pytest.fixture
def requests(run: RunDir) -> Iterator[StopRequests]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGCONT)}
    made = StopRequests(run, rank=0)
    made.install()
    yield made
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_both_signals_mean_save_and_leave(requests: StopRequests, number: signal.Signals) -> None:
    assert requests.poll() == (False, False)
    os.kill(os.getpid(), number)
    assert requests.poll() == (True, False)
    assert requests.reason == number.name


def test_the_first_reason_stays(requests: StopRequests) -> None:
    os.kill(os.getpid(), signal.SIGUSR2)
    os.kill(os.getpid(), signal.SIGTERM)
    assert requests.reason == "SIGUSR2"


def test_save_is_answered_once(run: RunDir, requests: StopRequests) -> None:
    run.save.touch()
    assert requests.poll() == (False, True)
    requests.copied()
    assert requests.poll() == (False, False)
    requests.committed()
    assert not run.save.exists()
    assert requests.poll() == (False, False)


def test_save_that_comes_after_the_state_was_taken_needs_another(run: RunDir, requests: StopRequests) -> None:
    requests.poll()
    requests.copied()
    run.save.touch()
    requests.committed()
    time.sleep(1.1)  # the file is looked for once a second
    assert run.save.exists()
    assert requests.poll() == (False, True)


def test_save_asked_again_while_the_first_is_written_stays(run: RunDir, requests: StopRequests) -> None:
    run.save.touch()
    assert requests.poll() == (False, True)
    requests.copied()
    os.utime(run.save, ns=(1, 1))  # touched again
    requests.committed()
    assert requests.poll() == (False, True)
    requests.copied()
    requests.committed()
    assert not run.save.exists()


def test_time_is_left_until_the_limit_or_the_end_of_the_grace(run: RunDir) -> None:
    before = signal.getsignal(signal.SIGTERM)
    requests = StopRequests(run, 0, Deadlines(ends_at=time.monotonic() + 500, warning_window_s=30))
    assert 400 < (requests.seconds_left() or 0) <= 500
    requests.install()
    os.kill(os.getpid(), signal.SIGTERM)
    signal.signal(signal.SIGTERM, before)
    assert 10 < (requests.seconds_left() or 0) <= 30
    assert StopRequests(run, 0).seconds_left() is None


def test_stop_file_is_seen_by_rank_0_only(run: RunDir) -> None:
    run.stop.touch()
    assert StopRequests(run, rank=1).poll() == (False, False)
    first = StopRequests(run, rank=0)
    assert first.poll() == (True, False)
    assert first.reason == "STOP file"
