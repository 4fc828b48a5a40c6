"""Begin, end and what lies between them on a Slurm that misbehaves: each fault is made by the real part.

    pytest tests/test_life_slurm.py

The ranks only wait (tests/light_runs.py); runs that train are in test_survival_slurm.py.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from r1hpc.attempt.state.state import State, newest_job, read_situation
from r1hpc.base.run_dir import RunDir
from r1hpc.slurm.requeue import resubmit
from r1hpc.telemetry.records.attempts import Cause
from tests.cluster import Cluster
from tests.cluster.daemons import GRACE_SECONDS
from tests.light_runs import LightRun
from tests.runs import CHECKOUT, go_on, is_halted, run_environment, submit, wait_over, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

_SCAVENGER = "--qos=scavenger"


@contextmanager
def frozen_controller(cluster: Cluster, seconds: float) -> Iterator[None]:
    """slurmctld stopped as by a long pause of its host, and going on after so long."""
    pid = cluster.state_record.processes["slurmctld"][0]
    os.kill(pid, signal.SIGSTOP)
    thaw = threading.Timer(seconds, os.kill, (pid, signal.SIGCONT))
    thaw.start()
    try:
        yield
    finally:
        thaw.join()


def jobs_of(cluster: Cluster, run: RunDir) -> list[str]:
    """Ids of all jobs there were of a run, oldest first."""
    lines = cluster.run(["squeue", "-h", "-t", "all", "-S", "i", "-o", "%A %Z"]).stdout.splitlines()
    return [line.split()[0] for line in lines if line.split()[1] == str(run.path)]


# -- an answer that was lost ----------------------------------------------------------------------------


def test_a_resubmission_whose_answer_was_lost_is_one_job(on_cluster: Cluster, tmp_path: Path) -> None:
    """slurmctld is frozen while sbatch asks: it times out, and the job is there all the same."""
    run = LightRun(tmp_path, "lost", on_cluster)
    with frozen_controller(on_cluster, 8), pytest.MonkeyPatch.context() as patch:
        patch.setenv("R1HPC_LIGHT_LAST", "1")
        job = resubmit(run.run.script)
    assert jobs_of(on_cluster, run.run) == [job]
    run.wait_over()
    assert [a.cause for a in run.attempts] == [Cause.finished]


def test_a_submission_whose_answer_was_lost_keeps_its_folder_and_is_one_job(
    on_cluster: Cluster, tmp_path: Path
) -> None:
    """The whole command, frozen out between the writing of the folder and sbatch."""
    command = [sys.executable, "-m", "r1hpc.submit", "jobs/smoke.yaml", "--executor", "slurm", "--json"]
    place = ["--run-root", str(tmp_path), "--run-name", "lost", "--nodes", "1", "-t", "5"]
    environment = run_environment(on_cluster.env(R1HPC_FAILPOINT="submit.written:sleep=2"))
    submission = subprocess.Popen(
        [*command, *place, "train.num_steps=2"],
        cwd=CHECKOUT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    run = RunDir(tmp_path / "lost")
    wait_until("the folder", run.script.is_file, 60)
    with frozen_controller(on_cluster, 9):
        said, _ = submission.communicate(timeout=60)
    assert submission.returncode == 0
    (job,) = jobs_of(on_cluster, run)
    assert json.loads(said)["job_id"] == job
    assert [a.cause for a in wait_over(run, 120)] == [Cause.finished]


# -- two at once ----------------------------------------------------------------------------------------


def resume_twice(cluster: Cluster, run: RunDir) -> tuple[str, str]:
    """Resume a run twice at the same time: the job of the winner, and what the loser was told."""
    words = ["--resume", "--run-root", str(run.path.parent), "--run-name", run.run_id, "--executor", "slurm"]
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "r1hpc.submit", *words, "--json"],
            cwd=CHECKOUT,
            env=run_environment(cluster.env()),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [one.communicate(timeout=120) for one in both]
    codes = [one.returncode for one in both]
    assert sorted(codes) == [0, 2], said
    return json.loads(said[codes.index(0)][0])["job_id"], said[codes.index(2)][1]


def resume_at_once(cluster: Cluster, root: Path, times: int) -> None:
    words = ("--executor", "slurm", "-t", "5", "train.num_steps=400", "--nodes", "1")
    run = submit(root, "twice", *words, env=cluster.env(R1HPC_FAILPOINT="step.begin:sleep=9")).run
    for count in range(1, times + 1):
        newest = newest_job(run)
        assert newest is not None
        cluster.cancel(int(newest.job_id))
        wait_until("its end", lambda: read_situation(run).state.is_over, 60, run)
        before = jobs_of(cluster, run)
        job, told = resume_twice(cluster, run)
        assert jobs_of(cluster, run) == [*before, job], count
        assert re.search(r"another submission|is locked: |is queued as job|is running as job", told), told


def test_of_two_resumes_at_once_one_wins_and_the_other_is_told(on_cluster: Cluster, tmp_path: Path) -> None:
    resume_at_once(on_cluster, tmp_path, 1)


@pytest.mark.soak
def test_twenty_times_two_resumes_at_once(on_cluster: Cluster, tmp_path: Path) -> None:
    resume_at_once(on_cluster, tmp_path, 20)


@pytest.mark.soak
def test_of_two_jobs_that_begin_at_once_one_leaves(on_cluster: Cluster, tmp_path: Path) -> None:
    """Submitted by hand, twice: both begin while neither is on record."""
    run = LightRun(tmp_path, "rivals", on_cluster)
    for _ in range(2):
        run.submit(R1HPC_FAILPOINT="begin:sleep=3", R1HPC_LIGHT_LAST="1", R1HPC_LIGHT_STARTED_S="60")
    run.wait_log("leaves it alone")
    assert len(run.attempts) == 1
    left = run.job if run.attempts[0].job_id != str(run.job) else run.job - 1
    wait_until("its end", lambda: on_cluster.state(left) == "FAILED", 60, run.run)


# -- an end that cannot run -----------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["kill9", "enospc"])
def test_where_end_dies_the_shell_asks_for_the_requeue(
    on_cluster: Cluster, tmp_path: Path, fault: str
) -> None:
    run = LightRun(tmp_path, "killed", on_cluster)
    run.submit(_SCAVENGER, R1HPC_FAILPOINT=f"end:{fault}:::1")
    run.wait_rank(1)
    on_cluster.run(["scancel", "--signal=USR2", str(run.job)])
    run.wait_over()
    assert [a.cause for a in run.attempts] == [Cause.preempted, Cause.finished]
    assert "could not be judged" in run.log


# -- a job that is forgotten ----------------------------------------------------------------------------


def test_a_cancel_is_known_when_slurm_has_forgotten_the_job(on_cluster: Cluster, tmp_path: Path) -> None:
    """One run is cancelled in its `begin`; of the other one nobody could write the end down."""
    early, late = (LightRun(tmp_path, name, on_cluster) for name in ("early", "late"))
    early.submit(R1HPC_FAILPOINT="begin:sleep=60")
    late.submit(R1HPC_FAILPOINT="end:kill9:::1")
    late.wait_rank(1)
    on_cluster.wait_job(early.job, {"RUNNING"})
    configuration = on_cluster.slurm_conf.read_text()
    try:
        on_cluster.slurm_conf.write_text(configuration.replace("MinJobAge=7200", "MinJobAge=2"))
        on_cluster.run(["scontrol", "reconfigure"])
        for run in (early, late):
            on_cluster.cancel(run.job)
        forgotten = "Invalid job id"
        for run in (early, late):  # slurmctld looks once a minute

            def is_forgotten(job: int = run.job) -> bool:
                done = on_cluster.run(["scontrol", "show", "job", str(job)], check=False)
                return forgotten in done.stderr + done.stdout

            wait_until("Slurm to forget", is_forgotten, 180, run.run)
    finally:
        on_cluster.slurm_conf.write_text(configuration)
        on_cluster.run(["scontrol", "reconfigure"])
    assert (len(early.attempts), len(late.attempts)) == (0, 1)
    for run in (early, late):
        situation = read_situation(run.run)
        assert (situation.state, situation.detail) == (
            State.cancelled,
            f"job {run.job} was CANCELLED (sacct)",
        )


# -- a batch script that dies ---------------------------------------------------------------------------


def test_a_batch_script_that_is_killed_while_its_rank_finishes(on_cluster: Cluster, tmp_path: Path) -> None:
    """SIGKILL to the shell: nobody runs `end`, and the rank does what it was at."""
    run = LightRun(tmp_path, "killed", on_cluster)
    run.submit(R1HPC_LIGHT_LAST="1", R1HPC_LIGHT_STARTED_S="10", R1HPC_LIGHT_DEAF="1")
    run.wait_rank(1)
    (shell,) = processes_with(f"/job{run.job:05d}/slurm_script")
    os.kill(shell, signal.SIGKILL)
    wait_until("its end", lambda: run.run.finished.is_file(), 30, run.run)
    assert on_cluster.wait_job(run.job) == "FAILED"
    situation = read_situation(run.run)
    (attempt,) = situation.history.attempts
    assert (situation.state, attempt.cause, attempt.inferred) == (State.finished, Cause.finished, True)
    assert "its ranks finished" in attempt.detail


def processes_with(words: str) -> list[int]:
    """Processes whose command line holds these words."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if words.encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


# -- STOP between two attempts --------------------------------------------------------------------------


def test_stop_that_is_touched_between_two_attempts_is_seen(on_cluster: Cluster, tmp_path: Path) -> None:
    run = LightRun(tmp_path, "stopped", on_cluster)
    run.submit(_SCAVENGER, R1HPC_FAILPOINT="end.requeue:sleep=2")
    run.wait_rank(1)
    on_cluster.run(["scancel", "--signal=USR2", str(run.job)])
    run.wait_log("ended: preempted")
    run.run.stop.touch()
    wait_until("the answer", lambda: read_situation(run.run).state is State.stopped, 60, run.run)
    assert on_cluster.wait_job(run.job) == "COMPLETED"
    assert [a.cause for a in run.attempts] == [Cause.preempted]


# -- no grace at all ------------------------------------------------------------------------------------


def test_without_any_grace_it_comes_back_as_after_a_kill(on_cluster: Cluster, tmp_path: Path) -> None:
    """GraceTime 0, and a rank that needs longer than KillWait: Slurm kills it and starts the job again."""
    run = LightRun(tmp_path, "graceless", on_cluster)
    on_cluster.set_grace(0)
    try:
        run.submit(_SCAVENGER, R1HPC_LIGHT_SAVE_S="60")
        run.wait_rank(1)
        on_cluster.preempt(run.job)
        run.wait_over()
    finally:
        on_cluster.set_grace(GRACE_SECONDS)
    said = [(a.cause, a.detail) for a in run.attempts]
    assert [cause for cause, _ in said] == [Cause.preempted, Cause.finished], (said, run.log)
    assert on_cluster.job(run.job)["Restarts"] == "1"


# -- PreemptMode=CANCEL ---------------------------------------------------------------------------------


@contextmanager
def preempt_mode(cluster: Cluster, mode: str) -> Iterator[None]:
    set_mode = ["sacctmgr", "-i", "modify", "qos", "scavenger", "set"]
    cluster.run([*set_mode, f"preemptmode={mode}"])
    try:
        yield
    finally:
        cluster.run([*set_mode, "preemptmode=requeue"])


def test_a_step_longer_than_grace_and_kill_wait_where_slurm_cancels(
    on_cluster: Cluster, tmp_path: Path
) -> None:
    """Two runs at once: the job of one may be requeued, that of the other must be submitted again."""
    runs = [LightRun(tmp_path, name, on_cluster) for name in ("requeue", "resubmit")]
    with preempt_mode(on_cluster, "cancel"):
        for run in runs:
            run.submit(_SCAVENGER, "--exclusive", R1HPC_LIGHT_SAVE_S="90")
        on_cluster.run(["scontrol", "update", f"JobId={runs[1].job}", "Requeue=0"])
        for run in runs:
            run.wait_rank(1)
            on_cluster.preempt(run.job)
        for run in runs:
            run.wait_over()
    for run in runs:
        assert [a.cause for a in run.attempts] == [Cause.preempted, Cause.finished], run.log
        assert not run.attempts[0].inferred
    assert [len(jobs_of(on_cluster, run.run)) for run in runs] == [1, 2]


# -- a controller that is away --------------------------------------------------------------------------

_PHASES = {
    "before the verdict": "end:sleep=20:::1",
    "between verdict and requeue": "end.requeue:sleep=20:::1",
}


def lose_the_controller(cluster: Cluster, root: Path, away_s: float) -> None:
    """Killed at every phase of the end of three runs, one phase each; all of them come back once."""
    phases = [*_PHASES, "during the requeue"]
    runs = {phase: LightRun(root, phase.replace(" ", "-"), cluster) for phase in phases}
    for phase, run in runs.items():
        # The last one halts: it has yet to ask for its requeue when the controller is killed.
        run.submit(_SCAVENGER, R1HPC_FAILPOINT=_PHASES.get(phase, "end.requeue:stop:::1"))
    for run in runs.values():
        run.wait_rank(1)
    cluster.wait_saved([int(run.job) for run in runs.values()])
    last = runs["during the requeue"]
    cluster.run(["scancel", "--signal=USR2", str(last.job)])
    wait_until("the end to halt", lambda: is_halted(last.run), 60, last.run)
    held = [run for phase, run in runs.items() if phase in _PHASES]
    cluster.run(["scancel", "--signal=USR2", *(str(run.job) for run in held)])
    held[1].wait_log("ended: preempted")
    cluster.kill_controller()
    go_on(last.run)
    last.wait_log("trying again")
    time.sleep(away_s)
    cluster.start_controller()
    for phase, run in runs.items():
        assert [a.cause for a in run.wait_over(away_s + 200)] == [Cause.preempted, Cause.finished], phase
        assert cluster.job(run.job)["Restarts"] == "1", phase


def test_a_controller_that_is_killed_and_away_for_twelve_seconds(on_cluster: Cluster, tmp_path: Path) -> None:
    lose_the_controller(on_cluster, tmp_path, 12)


@pytest.mark.soak
@pytest.mark.parametrize("away_s", [60, 300])
def test_a_controller_that_is_away_for_long(on_cluster: Cluster, tmp_path: Path, away_s: float) -> None:
    lose_the_controller(on_cluster, tmp_path, away_s)
