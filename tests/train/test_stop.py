"""Signals and files become wishes; nothing happens inside a handler."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from r1hpc.base.rundir import RunDir
from r1hpc.train.stop import StopRequests


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
    assert requests.signalled_at is not None


def test_the_first_reason_stays(requests: StopRequests) -> None:
    os.kill(os.getpid(), signal.SIGUSR2)
    os.kill(os.getpid(), signal.SIGTERM)
    assert requests.reason == "SIGUSR2"


def test_save_is_answered_once(run: RunDir, requests: StopRequests) -> None:
    run.save.touch()
    assert requests.poll() == (False, True)
    requests.saved()
    assert not run.save.exists()
    assert requests.poll() == (False, False)


def test_stop_file_is_seen_by_rank_0_only(run: RunDir) -> None:
    run.stop.touch()
    assert StopRequests(run, rank=1).poll() == (False, False)
    first = StopRequests(run, rank=0)
    assert first.poll() == (True, False)
    assert first.reason == "STOP file"
