"""A batch host whose clock is wrong, by libfaketime: nothing that Slurm or a person asked for may change.

pytest tests/test_clocks_slurm.py
"""

from pathlib import Path

import pytest

from r1hpc.attempt.state.cancel import cancel
from r1hpc.attempt.state.state import State, read_situation
from r1hpc.telemetry.records.attempts import Cause
from tests.cluster import Cluster
from tests.light_runs import LightRun

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


def skewed(root: Path, cluster: Cluster, clock: str, **options: str) -> LightRun:
    """Return a run whose batch host has this clock."""
    (library,) = Path("/usr/lib").glob("*/faketime/libfaketime.so.1")
    run = LightRun(root, f"clock{clock}", cluster)
    lines = [f"export LD_PRELOAD={library} FAKETIME={clock} FAKETIME_DONT_FAKE_MONOTONIC=1"]
    run.write_script(setup=lines, **options)
    return run


def test_cancel_resume_and_limits_hold_whatever_the_clock(
    idle_cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in idle_cluster.env().items():
        monkeypatch.setenv(name, value)
    behind = skewed(tmp_path, idle_cluster, "-300s", time="1", signal="USR2@20")
    behind.submit(R1HPC_LIGHT_SAVE_S="600")  # a step longer than all that is left
    others = [skewed(tmp_path, idle_cluster, clock) for clock in ("+40s", "+300s", "-40s")]
    for run in others:
        run.submit()
    for run in others:
        run.wait_rank(1)
        assert read_situation(run.run).state is State.running
        assert cancel(run.run).action == "scancel"
        (ended,) = run.wait_over()
        assert (ended.cause, read_situation(run.run).state) == (Cause.cancelled, State.cancelled)
        run.run.stop.touch()
        run.submit()
        idle_cluster.wait_job(run.job)
        assert read_situation(run.run).state is State.stopped
        run.run.stop.unlink()
        run.submit()
        assert not read_situation(run.run).state.is_over
        run.wait_over()
        assert read_situation(run.run).state is State.finished
        assert [a.cause for a in run.attempts] == [Cause.cancelled, Cause.finished]
        assert all(a.end is not None and 0 <= a.end - a.start < 60 for a in run.attempts)
    attempts = behind.wait_over(200)
    assert [a.cause for a in attempts] == [Cause.timeout, Cause.finished]
    assert attempts[0].requeued
    assert not attempts[0].inferred
