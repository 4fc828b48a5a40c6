"""Ends of every kind on a real Slurm. Each recorded cause must be one that sacct's State allows by the table.

    .venv/bin/python -m tests.cluster box .venv/bin/python -m pytest tests/test_causes_slurm.py

A scenario is a function of a cluster and a run whose rank only waits (tests/light_runs.py). It returns the
causes that it expects; the run must finish, and sacct's record of each attempt must allow its cause.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from r1hpc.attempt.state.slurm_records import learn
from r1hpc.attempt.state.state import State, read_situation
from r1hpc.attempt.state.unended import corrected_history, record_of_attempt
from r1hpc.slurm.sacct import sacct_records
from r1hpc.slurm.shell.endings import BY_SACCT, of_states
from r1hpc.telemetry.records.attempts import Attempt, Cause
from tests.cluster import Cluster
from tests.light_runs import LightRun
from tests.runs import wait_until
from tests.test_node_faults_slurm import blind

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(600)]

_BY_THE_RANKS = {Cause.finished, Cause.crash, Cause.stopped, Cause.cluster, Cause.hang, Cause.oom}


def _start(run: LightRun, *options: str, last: int = 2) -> None:
    run.submit(*options, R1HPC_LIGHT_LAST=str(last))
    run.wait_rank(1)


def _is_alive(run: LightRun) -> bool:
    return read_situation(run.run).state in (State.running, State.unknown)


def preempted(cluster: Cluster, run: LightRun) -> list[str]:
    _start(run, "--qos=scavenger")
    cluster.preempt(run.job)
    return ["preempted", "finished"]


def limit_shortened(cluster: Cluster, run: LightRun) -> list[str]:
    _start(run)
    time.sleep(2)
    cluster.run(["scontrol", "update", f"jobid={run.job}", "timelimit=0:01"])
    return ["timeout", "finished"]


def reservation_ended(cluster: Cluster, run: LightRun) -> list[str]:
    node = cluster.node_names[-1]
    words = ["starttime=now", "duration=1", "users=root", f"nodes={node}", "flags=ignore_jobs"]
    cluster.run(["scontrol", "create", "reservation", "ReservationName=mine", *words])
    try:
        _start(run, "--reservation=mine")
        wait_until("its end", lambda: run.attempts[0].cause is not None, 150)
        cluster.run(["scontrol", "update", f"jobid={run.job}", "reservationname="], check=False)
        cluster.run(["scontrol", "release", str(run.job)], check=False)
    finally:
        cluster.run(["scontrol", "delete", "ReservationName=mine"], check=False)
    return ["timeout", "finished"]


def requeued_by_an_administrator(cluster: Cluster, run: LightRun) -> list[str]:
    _start(run)
    cluster.run(["scontrol", "requeue", str(run.job)])
    return ["preempted", "finished"]


def node_declared_down(cluster: Cluster, run: LightRun) -> list[str]:
    _start(run)
    node = cluster.job(run.job)["NodeList"]
    cluster.fail_node(node, how="crash", declare=True)
    run.wait_attempt(2)
    cluster.restore_node(node)
    return ["node_fail", "finished"]


def node_down_without_accounting(cluster: Cluster, run: LightRun) -> list[str]:
    """slurmdbd answers only after the next attempt has begun; status and reports then know better."""
    _start(run, last=2)
    node = cluster.job(run.job)["NodeList"]
    cluster.stop_accounting()
    try:
        cluster.fail_node(node, how="slurmd", declare=True)
        run.wait_attempt(2)
    finally:
        cluster.start_accounting()
        cluster.restore_node(node)
    return ["node_fail", "finished"]


def rank_killed(cluster: Cluster, run: LightRun) -> list[str]:
    _start(run)
    cluster.run(["scancel", "--signal=KILL", f"{run.job}.0"])
    return ["crash", "finished"]


def interpreter_missing_everywhere(cluster: Cluster, run: LightRun) -> list[str]:
    hidden = [blind(cluster, node, Path(sys.prefix)) for node in cluster.node_names]
    for each in hidden:
        each.__enter__()
    try:
        run.submit(R1HPC_LIGHT_LAST="1")
        held = f"{sys.executable} cannot be started, on "
        wait_until("a held job", lambda: held in read_situation(run.run).detail, 120)
        assert cluster.job(run.job)["ExcNodeList"] == "(null)", "no node is blamed"
    finally:
        for each in hidden:
            each.__exit__(None, None, None)
    cluster.run(["scontrol", "release", str(run.job)])
    return ["finished"]


def slurmctld_starts_without_its_state(cluster: Cluster, run: LightRun) -> None:
    """As `slurmctld -c` does, or a lost StateSaveLocation.

    The numbers of jobs go on: another test would find this test's jobs in accounting under its own number.
    """
    _start(run)
    cluster.stop_controller()
    with cluster.slurm_conf.open("a") as conf:
        conf.write(f"FirstJobId={run.job + 1}\n")
    subprocess.run(["find", str(cluster.directory / "ctld"), "-type", "f", "-delete"], check=True)
    cluster.start_controller()


@pytest.mark.parametrize(
    "scenario",
    [
        preempted,
        limit_shortened,
        reservation_ended,
        requeued_by_an_administrator,
        node_declared_down,
        node_down_without_accounting,
        rank_killed,
        interpreter_missing_everywhere,
    ],
)
def test_the_cause_is_one_that_accounting_allows(
    on_cluster: Cluster, tmp_path: Path, scenario: Callable[[Cluster, LightRun], list[str]]
) -> None:
    run = LightRun(tmp_path, scenario.__name__.replace("_", "-"), on_cluster, patience="1 1")
    expected = scenario(on_cluster, run)
    run.wait_over(180)
    attempts = _as_accounting_knows_them(run)
    assert [attempt.cause for attempt in attempts] == expected
    records = sacct_records(str(run.job))
    for attempt in attempts:
        seen = record_of_attempt(records, attempt)
        assert seen is not None
        assert seen.ending in BY_SACCT
        row = of_states({seen.ending})
        allowed = _BY_THE_RANKS if row is None or row.cause == Cause.preempted else set()
        # A requeue of our own is REQUEUED or PREEMPTED for Slurm, whatever it was for.
        allowed = allowed | (
            {Cause.timeout, Cause.preempted} if seen.state in ("REQUEUED", "PREEMPTED") else set()
        )
        assert attempt.cause in allowed | ({row.cause} if row else set()), (attempt, seen)


def _as_accounting_knows_them(run: LightRun) -> list[Attempt]:
    """Return the attempts after a reader has learnt every record, as `report` does."""

    def ended() -> bool:
        records = sacct_records(str(run.job))
        learn(run.run, records, time.time(), asked=time.time())
        return all(record_of_attempt(records, attempt) is not None for attempt in run.attempts)

    wait_until("the records of accounting", ended, 60)
    return list(corrected_history(run.run).attempts)


def test_a_controller_without_its_state_cancels_nobody(on_cluster: Cluster, tmp_path: Path) -> None:
    """Slurm forgets the job, and its nodes end it: the run failed by no fault of its own."""
    run = LightRun(tmp_path, "cold", on_cluster, patience="1 1")
    slurmctld_starts_without_its_state(on_cluster, run)
    wait_until("its end", lambda: not _is_alive(run), 120, run.run)
    situation = read_situation(run.run)
    assert situation.state is State.failed
    assert situation.detail.startswith("cluster: slurmctld lost the job")
