"""A run's state while it changes: what is read in two pieces is never put together wrongly."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from r1hpc.attempt.state import state
from r1hpc.attempt.state.cancel import cancel
from r1hpc.attempt.state.state import State, newest_job, read_situation
from r1hpc.base.run_dir import RunDir
from r1hpc.telemetry.records.attempts import read_history, record


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """Finished once in attempt 1."""
    run = RunDir(tmp_path / "run")
    run.create()
    record(run, "submitted", time=1.0, executor="local", job_id="local-1")
    record(run, "begin", time=2.0, attempt=1, executor="local", job_id="local-1")
    record(run, "end", time=3.0, attempt=1, cause="finished", exit_status=0)
    return run


@pytest.fixture
def supervisor(run: RunDir) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that looks like the run's, of a new submission."""
    command = [sys.executable, "-c", "import sys; sys.stdin.read()", str(run.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        record(run, "submitted", time=4.0, executor="local", job_id=f"local-{process.pid}")
        yield process
        process.kill()


def after_the_first(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], change: Callable[[], None]
) -> None:
    """Have `change` happen once, as soon as one of these functions of `state` has answered."""
    pending = [change]

    def watched(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            answer = original(*arguments)
            if pending:
                pending.pop()()
            return answer

        return call

    for name in names:
        monkeypatch.setattr(state, name, watched(getattr(state, name)))


@pytest.mark.parametrize("written_late", [False, True])
def test_a_login_node_whose_clock_is_ahead_hides_no_attempt(tmp_path: Path, written_late: bool) -> None:
    run = RunDir(tmp_path / "run")
    run.create()
    submitted: dict[str, Any] = {"event": "submitted", "time": 10.0, "executor": "slurm", "job_id": "7"}
    began: dict[str, Any] = {"event": "begin", "time": 6.0, "attempt": 1, "executor": "slurm", "job_id": "7"}
    for event in (began, submitted) if written_late else (submitted, began):
        record(run, **event)
    job = newest_job(run)
    assert job is not None
    assert job.event == "begin"
    assert [a.attempt for a in read_history(run).since_submission] == [1]
    record(run, "submitted", time=12.0, executor="slurm", job_id="8")
    assert (newest_job(run) or job).job_id == "8"
    assert read_history(run).since_submission == ()


def test_an_attempt_that_begins_meanwhile_is_no_finished_run(
    run: RunDir, supervisor: "subprocess.Popen[bytes]", monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin() -> None:
        record(run, "begin", time=5.0, attempt=2, executor="local", job_id=f"local-{supervisor.pid}")

    after_the_first(monkeypatch, ("corrected_history", "newest_job"), begin)
    assert not read_situation(run).state.is_over
    assert read_situation(run).state is State.running


def test_an_end_that_is_written_meanwhile_counts(
    run: RunDir, supervisor: "subprocess.Popen[bytes]", monkeypatch: pytest.MonkeyPatch
) -> None:
    record(run, "begin", time=5.0, attempt=2, executor="local", job_id=f"local-{supervisor.pid}")

    def end() -> None:
        record(run, "end", time=6.0, attempt=2, cause="stopped", exit_status=0)
        supervisor.kill()
        supervisor.wait()

    after_the_first(monkeypatch, ("corrected_history",), end)
    assert read_situation(run).state is State.stopped


def test_ranks_that_outlive_their_supervisor_are_seen_and_cancelled(run: RunDir) -> None:
    supervisor = subprocess.Popen([sys.executable, "-c", ""])
    supervisor.wait()
    job = f"local-{supervisor.pid}"
    record(run, "submitted", time=4.0, executor="local", job_id=job)
    record(run, "begin", time=5.0, attempt=2, executor="local", job_id=job)
    assert read_situation(run).state is State.failed
    command = [sys.executable, "-c", "print('up', flush=True); input()", str(run.path)]
    environment = {**os.environ, "R1HPC_LOCAL_JOB_ID": job}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as rank:
        assert rank.stdout is not None
        assert rank.stdout.readline() == "up\n"
        situation = read_situation(run)
        assert (situation.state, situation.detail) == (
            State.running,
            f"its process {supervisor.pid} is gone, its ranks go on",
        )
        assert "its ranks got SIGTERM" in cancel(run).text
        assert rank.wait() == -signal.SIGTERM
    assert read_situation(run).state is State.cancelled


@pytest.mark.parametrize(("here", "expected"), [("far", State.running), ("near", State.failed)])
def test_a_job_of_another_cluster_is_not_taken_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: str, expected: State
) -> None:
    """Two clusters that share a file system: only the job's own knows its id."""
    run = RunDir(tmp_path / "run")
    run.create()
    record(run, "submitted", time=1.0, executor="slurm", job_id="12")
    record(run, "begin", time=2.0, attempt=1, executor="slurm", job_id="12", cluster="near")
    program = tmp_path / "scontrol"
    program.write_text(
        f"#!/bin/sh\n[ $2 = config ] && exec echo 'ClusterName = {here}'\n"
        "echo 'slurm_load_jobs error: Invalid job id specified' >&2\nexit 1\n"
    )
    program.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = read_situation(run)
    assert found.state is expected
    assert ("job 12 is of cluster near: ask there" in found.detail) is (here == "far")


def test_why_nothing_began_is_told_of_a_submission_that_was_cut_off(tmp_path: Path) -> None:
    """Its job began, and found no payload; nobody wrote `submitted` down."""
    run = RunDir(tmp_path / "cut-off")
    run.create()
    record(run, "not_begun", job_id="9", cause="refused", detail="9_submitted.pkl did not appear")
    situation = read_situation(run)
    assert (situation.state, situation.detail) == (State.failed, "refused: 9_submitted.pkl did not appear")


_ROW = "7|{state}|{start}|{end}|1||1|n1|0:15|me|lab|gpu|normal|||demo"


@pytest.fixture
def forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunDir]:
    """Makes a run whose job slurmctld has forgotten, and which sacct remembers by these rows."""

    def make(began: bool, *rows: str) -> RunDir:
        run = RunDir(tmp_path / "run")
        run.create()
        record(run, "submitted", time=1e9, executor="slurm", job_id="7")
        if began:
            record(run, "begin", time=1e9 + 10, attempt=1, executor="slurm", job_id="7", ranks=1)
        unknown = "echo 'slurm_load_jobs error: Invalid job id specified' >&2\nexit 1\n"
        for name, body in (("scontrol", unknown), ("sacct", "".join(f"echo '{row}'\n" for row in rows))):
            (tmp_path / name).write_text(f"#!/bin/sh\n{body}")
            (tmp_path / name).chmod(0o700)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        return run

    return make


_ATTEMPTS_ROW = {"start": 10**9 + 5, "end": 10**9 + 60}
_WAITED = {"start": "None", "end": 10**9 + 90}


@pytest.mark.parametrize(
    ("began", "rows", "state", "detail"),
    [
        (
            True,
            [{"state": "CANCELLED by 0", **_ATTEMPTS_ROW}],
            State.cancelled,
            "job 7 was CANCELLED (sacct)",
        ),
        (False, [{"state": "CANCELLED by 0", **_WAITED}], State.cancelled, "job 7 was CANCELLED (sacct)"),
        (
            True,
            [{"state": "NODE_FAIL", **_ATTEMPTS_ROW}, {"state": "CANCELLED by 0", **_WAITED}],
            State.cancelled,
            "job 7 was CANCELLED (sacct)",
        ),
        (
            True,
            [{"state": "NODE_FAIL", **_ATTEMPTS_ROW}],
            State.failed,
            "node_fail: a node of the job went down",
        ),
        (
            True,
            [{"state": "TIMEOUT", **_ATTEMPTS_ROW}],
            State.failed,
            "timeout: its time limit, its reservation or",
        ),
        (
            False,
            [{"state": "FAILED", **_ATTEMPTS_ROW}],
            State.failed,
            "job 7 was FAILED (sacct); it never began",
        ),
        (True, [], State.failed, "ended without a record; Slurm no longer knows job 7"),
    ],
)
def test_what_became_of_a_job_that_slurm_has_forgotten(
    forgotten: Callable[..., RunDir], began: bool, rows: list[dict[str, Any]], state: State, detail: str
) -> None:
    run = forgotten(began, *(_ROW.format(**row) for row in rows))
    found = read_situation(run)
    assert (found.state, found.detail.startswith(detail)) == (state, True), found.detail


_PENDING = (
    "JobId=7 JobName=x UserId=me(1) JobState=PENDING Reason={} Restarts=0 ReqNodeList=n[1-2] ExcNodeList=n1 "
    "Comment={} StdErr=/x"
)


@pytest.mark.parametrize(
    ("reason", "comment", "detail"),
    [
        ("BadConstraints", "", "it will never start, since it asks for n1 and excludes it too"),
        ("JobHeldUser", "r1hpc: Disk quota exceeded: /runs", "(JobHeldUser): Disk quota exceeded: /runs"),
        ("JobHeldUser", "mine", "(JobHeldUser)"),
    ],
)
def test_a_job_that_does_not_start_says_why(
    forgotten: Callable[..., RunDir], tmp_path: Path, reason: str, comment: str, detail: str
) -> None:
    run = forgotten(False)
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho '{_PENDING.format(reason, comment)}'\n")
    found = read_situation(run)
    assert found.state is State.queued
    assert detail in found.detail
    assert found.detail.endswith(detail) or reason == "BadConstraints"


def test_why_a_run_is_not_continued_is_in_its_state(run: RunDir) -> None:
    limit = "3 attempts ended by crash since the last progress, and limits.max_crashes is 2"
    record(run, "submitted", time=4.0, executor="local", job_id="local-1")
    record(run, "begin", time=5.0, attempt=2, executor="local", job_id="local-1")
    ended = {"attempt": 2, "cause": "crash", "detail": "rank 0 on n1: ValueError", "requeued": False}
    record(run, "end", time=6.0, **ended)
    assert read_situation(run).detail == "crash: rank 0 on n1: ValueError"  # by an earlier version
    record(run, "end", time=7.0, **ended, not_continued=limit)
    assert read_situation(run).detail == f"crash: rank 0 on n1: ValueError; not continued: {limit}"
    # The reason of a held job repeats the words of its attempt.
    record(run, "end", time=8.0, **ended, not_continued=f"{ended['detail']}; 3 attempts ended like this")
    assert read_situation(run).detail == (
        "crash: rank 0 on n1: ValueError; not continued: 3 attempts ended like this"
    )


def test_emptied_records_are_no_run_that_was_never_submitted(run: RunDir) -> None:
    run.attempt_logs(1).mkdir()
    run.rank_log(1, 0).touch()
    run.attempts.write_text("")
    found = read_situation(run)
    assert (found.state, "never submitted" in found.detail) == (State.unknown, False)
    assert "attempts.jsonl is empty or gone: restore it" in found.detail


@pytest.mark.parametrize("skew", [-300.0, -40.0, 40.0, 300.0])
def test_a_resumed_run_waits_whatever_the_clock_of_its_first_host(tmp_path: Path, skew: float) -> None:
    """Slurm cannot be asked. The refusal of job 7 and a cancel of it are older than job 8."""
    run = RunDir(tmp_path / "run")
    run.create()
    now = time.time()
    record(run, "submitted", time=now, executor="slurm", job_id="7")
    record(run, "not_begun", time=now + 1 + skew, job_id="7", cause="stopped", detail="STOP was touched")
    assert read_situation(run).state is State.stopped
    record(run, "cancel_requested", time=now + 2)
    record(run, "submitted", time=now + 3, executor="slurm", job_id="8")
    found = read_situation(run)
    assert found.state is State.queued
    assert found.job is not None
    assert (found.job.job_id, found.job.event) == ("8", "submitted")
    record(run, "begin", time=now + 4 + skew, attempt=1, executor="slurm", job_id="8")
    found = read_situation(run)
    assert (found.state, found.job and found.job.event) == (State.running, "begin")
