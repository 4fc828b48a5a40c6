"""Chains on this machine: killed at every stage and submitted again. The same stage thrice, so that what was
disturbed can be compared, bit by bit, with what was not."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from r1hpc.attempt.state.state import State, newest_job, read_situation
from r1hpc.base.files import read_records
from r1hpc.base.run_dir import RunDir
from r1hpc.submission.chain.folder import ChainDir, supervisor_pid
from r1hpc.submission.chain.state import read_chain_situation
from r1hpc.telemetry.records.attempts import Cause, read_history
from tests.runs import assert_same_run, command_output, rank_pids, wait_step, wait_until
from tests.submission.chains import actions_of, jobs_of, submit, submitted, write_chain

_THRICE = "  - name: one\n  - name: two\n  - name: three\n"
_ASIDE = """\
  - {name: one, limits: {max_crashes: 0}}
  - {name: two}
  - name: aside
    stage: traces
    needs: []
    task: {name: chain_sum}
    generate: {num_items: 40, items_per_part: 10}
"""
pytestmark = pytest.mark.timeout(600)
_SLOW = "step.begin:sleep=3::*:1"


class Place:
    """A chain under a run root of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.file = write_chain(root, _THRICE)
        self.chain = ChainDir(root / "runs" / "small")
        self.one, self.two, self.three = map(self.chain.stage, ("one", "two", "three"))

    def words(self) -> list[str]:
        return [str(self.file), "--executor", "local", "train.num_steps=8"]

    def submit(self, failpoint: str = _SLOW) -> dict[str, Any]:
        return submitted(self.root, *self.words(), env={**os.environ, "R1HPC_FAILPOINT": failpoint})

    def supervisor(self) -> int:
        pid = supervisor_pid(self.chain)
        assert pid is not None
        return pid

    def wait_alone(self) -> None:
        wait_until("end of the supervisor", lambda: supervisor_pid(self.chain) is None, 120)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    yield place
    for run in (place.one, place.two, place.three):
        kill(run)
    pid = supervisor_pid(place.chain)
    if pid is not None:
        os.kill(pid, signal.SIGKILL)


def kill(run: RunDir) -> None:
    """SIGKILL to the supervisor of a stage and to its ranks."""
    job = newest_job(run)
    for pid in [*([job.pid] if job is not None and job.pid else []), *rank_pids(run).values()]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def test_a_chain_killed_at_every_stage_finishes_and_does_nothing_twice(place: Place) -> None:
    # The submission dies when the supervisor is there and nobody has written so down.
    dying = {**os.environ, "R1HPC_FAILPOINT": f"chain.supervising:kill9,{_SLOW}"}
    assert submit(place.root, *place.words(), env=dying).returncode == -9
    wait_until("the supervisor", lambda: supervisor_pid(place.chain) is not None, 60)
    first = place.supervisor()
    again = submitted(place.root, str(place.file), "--executor", "local")
    assert actions_of(again) == ["at work"] * 3
    assert jobs_of(again)[1:] == [f"local-{first}"] * 2
    assert place.supervisor() == first

    # The supervisor dies, its stage lives: the next one waits for it.
    wait_step(place.one, 2)
    os.kill(first, signal.SIGKILL)
    place.wait_alone()
    first_action, *others = actions_of(place.submit())
    assert first_action in ("at work", "finished")  # on a busy machine it may end before it is looked at
    assert others == ["resumed"] * 2

    # Everything dies.
    wait_step(place.two, 3)
    os.kill(place.supervisor(), signal.SIGKILL)
    kill(place.two)
    place.wait_alone()
    assert actions_of(place.submit()) == ["finished", "resumed", "resumed"]

    # A person cancels.
    wait_step(place.three, 3)
    said = command_output(["-m", "r1hpc.cancel", str(place.chain.path)])
    assert "three saves and ends for good" in said
    place.wait_alone()
    assert read_chain_situation(place.chain).state.value == "cancelled"
    done = submit(place.root, "--run-name", "small", "--follow")  # where it was, and without its file
    assert done.returncode == 0, done.stderr

    causes = [[attempt.cause for attempt in read_history(run).attempts] for run in (place.one, place.two)]
    assert causes == [[Cause.finished], [Cause.unknown, Cause.finished]]
    assert [a.cause for a in read_history(place.three).attempts] == [Cause.cancelled, Cause.finished]
    assert_same_run(place.two, place.one)
    assert_same_run(place.three, place.one)
    before = place.one.attempts.read_bytes()
    assert actions_of(submitted(place.root, str(place.file), "--executor", "local")) == ["finished"] * 3
    assert place.one.attempts.read_bytes() == before
    shown = command_output(["-m", "r1hpc.status", str(place.chain.path)])
    assert "small: finished  (3 of 3 stages finished)" in shown


def test_a_stage_that_fails_holds_back_those_alone_that_need_it(tmp_path: Path) -> None:
    file = write_chain(tmp_path, _ASIDE)
    chain, may_begin = ChainDir(tmp_path / "runs" / "small"), tmp_path / "may-begin"
    faults = f"step.begin:raise,begin:until={may_begin}"
    may_begin.touch()
    submitted(tmp_path, str(file), "--executor", "local", env={**os.environ, "R1HPC_FAILPOINT": faults})
    one = chain.stage("one")
    wait_until("begin of one", lambda: bool(read_history(one).attempts), 60, one)
    may_begin.unlink()  # `aside` waits
    wait_until("end of one", lambda: read_situation(one).state is State.failed, 60, one)
    again = submitted(tmp_path, str(file), "--executor", "local")
    assert any(
        note.startswith("stage one is failed: submit small again once process") for note in again["notes"]
    )
    may_begin.touch()
    done = submit(tmp_path, str(file), "--executor", "local", "--follow")  # to the end of what is at work
    assert done.returncode == 1
    wait_until("end of the supervisor", lambda: supervisor_pid(chain) is None, 60)
    states = {stage.name: stage.state for stage in read_chain_situation(chain).stages}
    assert states == {"one": "failed", "two": "waiting", "aside": "finished"}
    assert not read_history(chain.stage("two")).attempts
    assert not chain.stage("aside").all_gpu_metrics  # it holds no GPU, and watches nobody else's


@pytest.mark.soak
def test_a_stopped_stage_ends_the_chain(place: Place) -> None:
    place.submit()
    wait_step(place.one, 2)
    place.one.stop.touch()
    place.wait_alone()
    assert [a.cause for a in read_history(place.one).attempts] == [Cause.stopped]
    assert not read_history(place.two).attempts
    now = read_chain_situation(place.chain)
    assert [stage.state for stage in now.stages] == ["stopped", "waiting", "waiting"]
    assert now.state.value == "stopped"
    assert submit(place.root, str(place.file), "--executor", "local", "--follow").returncode == 0
    assert len([e for e in read_records(place.one.attempts) if e["event"] == "begin"]) == 2
