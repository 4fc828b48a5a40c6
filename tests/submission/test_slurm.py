"""Chains on a real Slurm: dependencies survive preemption, and end with the stage that failed or stopped."""

import signal
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from r1hpc.attempt.state.state import newest_job
from r1hpc.base.run_dir import RunDir
from r1hpc.submission.chain.folder import ChainDir
from r1hpc.submission.chain.state import read_chain_situation
from r1hpc.telemetry.records.attempts import Cause, read_history
from tests.cluster import Cluster
from tests.runs import assert_same_run, wait_attempt, wait_over, wait_step, wait_until
from tests.submission.chains import actions_of, jobs_of, submit, submitted, write_chain

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

_THRICE = "  - name: one\n  - name: two\n  - name: three\n"
_NAMES = ("one", "two", "three")


_SLOW = "step.begin:sleep=1.5::*:1,step.begin:sleep=1::*:2"
"""The attempts that are disturbed, so that none is over before that."""


class Place:
    """A chain of three equal stages in the scavenger queue of the cluster."""

    def __init__(self, root: Path, cluster: Cluster) -> None:
        self.root, self.cluster = root, cluster
        self.file = write_chain(root, _THRICE)
        self.chain = ChainDir(root / "runs" / "small")
        self.runs = [self.chain.stage(name) for name in _NAMES]

    def words(self, *words: str) -> list[str]:
        return [str(self.file), "--executor", "slurm", "--qos", "scavenger", "train.num_steps=24", *words]

    def submit(self, *words: str, failpoint: str = _SLOW) -> dict[str, Any]:
        return submitted(self.root, *self.words(*words), env=self.cluster.env(R1HPC_FAILPOINT=failpoint))

    def wait_state(self, job_id: str | None, *states: str) -> str:
        return self.cluster.wait_job(int(job_id or 0), states, 120)


@pytest.fixture
def place(tmp_path: Path, on_cluster: Cluster) -> Place:
    return Place(tmp_path, on_cluster)


def begins(run: RunDir) -> list[float]:
    return [attempt.start for attempt in read_history(run).attempts]


def test_preempted_killed_failed_and_stopped_the_chain_finishes_and_nothing_is_done_twice(
    place: Place,
) -> None:
    # The submission dies with the second stage's job unrecorded; the first is in the queue.
    dying = place.cluster.env(R1HPC_FAILPOINT=f"sbatch.answered:kill9::2,{_SLOW}")
    assert submit(place.root, *place.words(), env=dying).returncode == -signal.SIGKILL
    answer = place.submit()
    assert actions_of(answer) == ["at work", "found again", "submitted"]
    one, two, three = jobs_of(answer)
    shown = place.cluster.job(int(three or 0))
    assert shown["Dependency"] == f"afterok:{two}(unfulfilled)"

    # Preempted twice: the job comes back under its id, those that wait go on waiting.
    for attempt in (1, 2):
        wait_attempt(place.runs[0], attempt)
        wait_step(place.runs[0], 3 * attempt)
        place.cluster.preempt(int(one or 0))
    wait_attempt(place.runs[0], 3)
    assert place.cluster.state(int(two or 0)) == "PENDING"
    assert place.wait_state(one, "COMPLETED") == "COMPLETED"

    # The second stage is stopped by a colleague: the third must not begin.
    wait_step(place.runs[1], 4)
    place.runs[1].stop.touch()
    assert [a.cause for a in wait_over(place.runs[1])] == [Cause.stopped]
    assert place.wait_state(three, "CANCELLED") == "CANCELLED"
    assert read_chain_situation(place.chain).state.value == "stopped"
    again = place.submit()
    assert actions_of(again) == ["finished", "resumed", "resumed"]

    # Its node dies without a word, then the third stage crashes more often than it may.
    wait_over(place.runs[1], 200)
    assert place.wait_state(jobs_of(again)[1], "COMPLETED") == "COMPLETED"
    wait_step(place.runs[2], 3)
    subprocess.run(["scancel", str(jobs_of(again)[2])], check=True, env=place.cluster.env())
    assert [a.cause for a in wait_over(place.runs[2])] == [Cause.cancelled]
    wait_until(
        "the cancelled job's end", lambda: not read_chain_situation(place.chain).stages[2].is_at_work, 60
    )
    last = place.submit()
    assert actions_of(last) == ["finished", "finished", "resumed"]
    wait_over(place.runs[2], 200)

    assert [[a.cause for a in read_history(run).attempts] for run in place.runs] == [
        [Cause.preempted, Cause.preempted, Cause.finished],
        [Cause.stopped, Cause.finished],
        [Cause.cancelled, Cause.finished],
    ]
    for before, after in pairwise(place.runs):
        ended = read_history(before).attempts[-1].end
        assert ended is not None
        assert begins(after)[0] >= ended
        assert_same_run(after, before)
    assert actions_of(place.submit()) == ["finished"] * 3


def test_where_slurm_may_not_requeue_the_next_stage_waits_for_the_new_job(place: Place) -> None:
    one, two, _ = jobs_of(place.submit("limits.max_preemptions=3"))
    wait_step(place.runs[0], 3)
    place.cluster.run(["scontrol", "update", f"JobId={one}", "Requeue=0"])
    place.cluster.run(["scancel", "--signal=USR2", str(one)])
    wait_attempt(place.runs[0], 2)
    fresh = newest_job(place.runs[0])
    assert fresh is not None
    assert fresh.job_id not in (one, two)
    assert place.cluster.job(int(two or 0))["Dependency"] == f"afterok:{fresh.job_id}(unfulfilled)"
    assert place.wait_state(two, "RUNNING", "COMPLETED")
    assert [a.cause for a in read_history(place.runs[0]).attempts] == [Cause.preempted, Cause.finished]


def test_a_stage_that_fails_takes_those_that_wait_with_it(place: Place) -> None:
    answer = place.submit("limits.max_crashes=0", failpoint="step.begin:exit::3")
    one, two, three = jobs_of(answer)
    assert place.wait_state(one, "FAILED") == "FAILED"
    assert {place.wait_state(two, "CANCELLED"), place.wait_state(three, "CANCELLED")} == {"CANCELLED"}
    now = read_chain_situation(place.chain)
    assert [stage.state for stage in now.stages] == ["failed", "waiting", "waiting"]
    assert "submit the chain again" in now.stages[1].detail
    done = submit(place.root, *place.words("--follow"), env=place.cluster.env())
    assert done.returncode == 0, done.stderr
    assert [len(begins(run)) for run in place.runs] == [2, 1, 1]
