"""The end of an attempt inside a job, with a scontrol that answers as a test wants it."""

import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from r1hpc import launch
from r1hpc.attempt.begin import MustNotGoOnError, begin, read_facts
from r1hpc.attempt.end import CancelledError
from r1hpc.attempt.state import State, look
from r1hpc.base.files import read_records
from r1hpc.checkpoint.store import CheckpointStore
from r1hpc.config import load
from r1hpc.slurm.client import SlurmError
from r1hpc.slurm.requeue import requeue
from r1hpc.telemetry.attempts import Cause, read_history, record
from tests.checkpoint.harness import save
from tests.recorded import RecordedRun

_SHOWN = (
    "JobId=7 JobName=demo UserId=me(1) JobState={state} Reason=None Requeue=1 Restarts=0 TimeLimit=UNLIMITED "
    "StartTime=100 EndTime={end} PreemptTime={preempted}\n"
)
_RUNNING = _SHOWN.format(state="RUNNING", end=900, preempted="None")
# As Slurm 24.11 shows a job whose batch script lives on: after scancel, also in the grace time of a
# preemption, and at the end of that time where PreemptMode is CANCEL.
_CANCELLED = _SHOWN.format(state="COMPLETING", end=500, preempted="None")
_CANCELLED_IN_GRACE = _SHOWN.format(state="COMPLETING", end=500, preempted="490")
_END_OF_GRACE = _SHOWN.format(state="COMPLETING", end=500, preempted="500")


class _Job:
    """A run in its first attempt, in job 7; `bin/scontrol` answers from files."""

    def __init__(self, folder: Path) -> None:
        self.recorded = RecordedRun(folder / "demo")
        self.recorded.clock = time.time() - 60
        self.recorded.submit("7", "slurm")
        self.recorded.begin(host="n1")
        self.run = self.recorded.run
        self.bin = folder / "bin"
        self.bin.mkdir()
        (self.bin / "scontrol").write_text(
            f"#!/bin/bash\ncd {self.bin}\necho $* >> calls\n"
            "[ $1 = show ] && { cat show$(grep -c show calls); exit 0; }\ncat requeue >&2; exit 1\n"
        )
        (self.bin / "scontrol").chmod(0o700)
        self.slurm_says(_RUNNING, _RUNNING)
        (self.bin / "requeue").write_text("Job is pending execution for job 7")

    def slurm_says(self, at_the_verdict: str, at_the_requeue: str) -> None:
        (self.bin / "show1").write_text(at_the_verdict)
        (self.bin / "show2").write_text(at_the_requeue)

    @property
    def was_requeued(self) -> bool:
        return "requeue 7" in (self.bin / "calls").read_text().splitlines()

    def end(self) -> int:
        """As the job script does after ranks that SIGTERM ended before they could listen."""
        return launch.main(["end", str(self.run.path), "--attempt", "1", "--status", "143"])


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Job]:
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    monkeypatch.setattr("r1hpc.attempt.end.print_diagnosis", lambda *_: None)
    before = os.umask(0o077)  # launch keeps its files private, and would keep those of the tests after it
    yield _Job(tmp_path)
    os.umask(before)


def test_a_requeue_that_never_came_about_is_taken_back(job: _Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("r1hpc.submission.next_job.requeue", partial(requeue, patience_s=0))
    (job.bin / "requeue").write_text("Unexpected message received for job 7")
    with pytest.raises(SlurmError, match="Unexpected message"):
        job.end()
    promised, kept = [event for event in read_records(job.run.attempts) if event["event"] == "end"]
    assert (promised["requeued"], kept["requeued"]) == (True, False)
    assert kept["ended"] == promised["time"]
    assert kept["exit_status"] == promised["exit_status"] == 143
    (attempt,) = read_history(job.run).attempts
    assert (attempt.cause, attempt.requeued, attempt.end) == (Cause.preempted, False, promised["time"])
    assert "not requeued: `scontrol requeue 7` failed" in attempt.detail
    assert look(job.run).state is State.failed


def test_an_accepted_requeue_stays_on_record(job: _Job) -> None:
    assert job.end() == 0
    assert job.was_requeued
    (end,) = [event for event in read_records(job.run.attempts) if event["event"] == "end"]
    assert (end["cause"], end["requeued"]) == ("preempted", True)


def assert_cancelled(job: _Job) -> None:
    with pytest.raises(CancelledError, match="demo is not requeued: it was cancelled"):
        job.end()
    assert not job.was_requeued
    (attempt,) = read_history(job.run).attempts
    assert (attempt.cause, attempt.requeued) == (Cause.cancelled, False)
    assert look(job.run).state is State.cancelled
    with pytest.raises(MustNotGoOnError, match="the run is over: cancelled"):
        begin(job.run, "slurm", "7", ("n1",), 1)


@pytest.mark.parametrize("shown", [_CANCELLED, _CANCELLED_IN_GRACE])
def test_a_scancel_after_the_verdict_is_not_undone(job: _Job, shown: str) -> None:
    job.slurm_says(_RUNNING, shown)
    assert_cancelled(job)


def test_the_end_of_the_grace_time_is_no_cancel(job: _Job) -> None:
    job.slurm_says(_RUNNING, _END_OF_GRACE)
    assert job.end() == 0
    assert job.was_requeued


def test_a_cancel_on_record_after_the_verdict_is_obeyed(job: _Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "r1hpc.attempt.end.print_diagnosis", lambda run, _: record(run, "cancel_requested", by="me")
    )
    assert_cancelled(job)


def test_a_cancelled_run_begins_again_when_it_is_submitted_again(job: _Job) -> None:
    """A job that was requeued at the very time of a cancel is started by Slurm, and leaves."""
    job.recorded.end("preempted")
    record(job.run, "cancel_requested", by="me")
    with pytest.raises(MustNotGoOnError, match=r"it was cancelled\. `submit --resume` asks for more"):
        begin(job.run, "slurm", "7", ("n1",), 1)
    assert len(read_history(job.run).attempts) == 1
    load.save(load.load(None, ["stage=traces"]), job.run.config)  # a stage that reads no shards
    assert begin(job.run, "slurm", "8", ("n1",), 1) == 2  # started before its submission is on record
    record(job.run, "submitted", executor="slurm", job_id="8")
    assert begin(job.run, "slurm", "8", ("n1",), 1) == 3


def test_hard_preemptions_without_accounting_are_no_crashes(
    job: _Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm kills everything at once and starts the job again; there is no sacct to ask why."""
    load.save(load.load(None, ["stage=traces"]), job.run.config)
    for restart in range(1, 11):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        assert begin(job.run, "slurm", "7", ("n1",), 1) == restart + 1
        token = read_facts(job.run, restart + 1).token
        save(CheckpointStore(job.run.checkpoints), 10 * restart, restart + 1, token)
    attempts = read_history(job.run).attempts
    assert {a.cause for a in attempts[:-1]} == {Cause.node_fail}
    assert "Slurm started the job again" in attempts[0].detail


def test_an_attempt_killed_in_a_job_that_was_not_restarted_is_unknown(job: _Job) -> None:
    load.save(load.load(None, ["stage=traces"]), job.run.config)
    record(job.run, "submitted", executor="slurm", job_id="8")
    assert begin(job.run, "slurm", "8", ("n1",), 1) == 2
    assert read_history(job.run).attempts[0].cause is Cause.unknown
