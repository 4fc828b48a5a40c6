"""A user's scancel holds, whatever moment of an attempt's end it falls into.

    pytest tests/test_cancel_slurm.py

The ranks only wait (tests/light_runs.py).
"""

import os
import random
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from r1hpc.attempt.state.state import State, read_situation
from r1hpc.telemetry.records.attempts import Cause
from tests.cluster import Cluster
from tests.light_runs import LightRun
from tests.runs import go_on, is_halted, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

_SCAVENGER = "--qos=scavenger"


def cancel_for_sure(cluster: Cluster, job: int) -> None:
    """As somebody who reads what scancel says: a job that is just being requeued it refuses, in words."""

    def is_taken() -> bool:
        done = cluster.run(["scancel", str(job)], check=False)
        if "Socket timed out" in done.stderr:
            return False
        return not done.stderr.strip() or cluster.state(job) == "CANCELLED"

    wait_until("scancel to be taken", is_taken, 30)


def cancel_at(cluster: Cluster, root: Path, moments: Sequence[float]) -> None:
    """Each run is preempted, and cancelled so many seconds later: it never comes back.

    In attempt 1 its rank takes a second to leave. Where the cancel comes after the requeue there may be an
    attempt 2, which lasts until then.
    """
    runs = [LightRun(root, f"at-{moment:.2f}", cluster) for moment in moments]
    for run in runs:
        run.submit(_SCAVENGER, R1HPC_LIGHT_SAVE_S="1", R1HPC_LIGHT_STARTED_S="600")
    for run in runs:
        run.wait_rank(1)
    start = time.monotonic()
    cluster.run(["scancel", "--signal=USR2", *(str(run.job) for run in runs)])
    for moment, run in sorted(zip(moments, runs, strict=True), key=lambda pair: pair[0]):
        time.sleep(max(0.0, start + moment - time.monotonic()))
        cancel_for_sure(cluster, run.job)
    for run in runs:
        cluster.wait_job(run.job, {"CANCELLED"})
    begun_before = {run.job: len(run.attempts) for run in runs}
    time.sleep(15)  # longer than a requeue takes here
    for moment, run in zip(moments, runs, strict=True):
        cluster.wait_job(run.job, {"CANCELLED"})
        at = f"cancelled {moment:.2f} s after the signal\n{run.log}"
        assert len(run.attempts) == begun_before[run.job], at
        assert read_situation(run.run).state is State.cancelled, at


def test_a_cancel_at_any_moment_holds(on_cluster: Cluster, tmp_path: Path) -> None:
    cancel_at(on_cluster, tmp_path, [0.5, 1.2, 2.0, 3.0])


@pytest.mark.soak
def test_fifty_cancels_from_the_signal_to_thirty_seconds_after_the_end(
    on_cluster: Cluster, tmp_path: Path
) -> None:
    seed = int(os.environ.get("R1HPC_SEED", time.time_ns() % 10**6))
    print(f"R1HPC_SEED={seed}")
    chance = random.Random(seed)
    for count in range(5):
        cancel_at(on_cluster, tmp_path / str(count), [chance.uniform(0, 35) for _ in range(10)])


def test_a_cancel_between_the_last_look_and_the_requeue_holds(on_cluster: Cluster, tmp_path: Path) -> None:
    """A plain `scontrol requeue` would have Slurm run the cancelled job again."""
    run = LightRun(tmp_path, "between", on_cluster)
    run.submit(_SCAVENGER, R1HPC_FAILPOINT="requeue.ask:stop")
    run.wait_rank(1)
    on_cluster.run(["scancel", "--signal=USR2", str(run.job)])
    wait_until("the end to halt", lambda: is_halted(run.run), 60, run.run)
    cancel_for_sure(on_cluster, run.job)
    go_on(run.run)
    assert on_cluster.wait_job(run.job) == "CANCELLED"
    assert [a.cause for a in run.attempts] == [Cause.cancelled]
    assert read_situation(run.run).state is State.cancelled
    assert "ended just before it could be requeued" in run.log
