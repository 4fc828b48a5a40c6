"""The end of an attempt inside a job, with a scontrol that answers as a test wants it."""

from functools import partial
from pathlib import Path

import pytest

from r1hpc import launch
from r1hpc.attempt.state import State, look
from r1hpc.base.files import read_records
from r1hpc.slurm.client import SlurmError
from r1hpc.slurm.requeue import requeue
from r1hpc.telemetry.attempts import Cause, read_history
from tests.recorded import RecordedRun

_RUNNING = (
    "JobId=7 JobName=demo UserId=me(1) JobState=RUNNING Reason=None Requeue=1 Restarts=0 TimeLimit=01:00:00 "
    "StartTime=1 EndTime=3601 PreemptTime=Unknown"
)


class _Job:
    """A run in its first attempt, in job 7; `bin/scontrol` answers from files."""

    def __init__(self, folder: Path) -> None:
        self.recorded = RecordedRun(folder / "demo")
        self.recorded.submit("7", "slurm")
        self.recorded.begin(host="n1")
        self.run = self.recorded.run
        self.bin = folder / "bin"
        self.bin.mkdir()
        (self.bin / "scontrol").write_text(
            f"#!/bin/bash\ncd {self.bin}\necho $* >> calls\n"
            f'[ "$1" = show ] && {{ echo "{_RUNNING}"; exit 0; }}\ncat requeue >&2; exit 1\n'
        )
        (self.bin / "scontrol").chmod(0o700)

    def end(self) -> int:
        """As the job script does after ranks that SIGTERM ended before they could listen."""
        return launch.main(["end", str(self.run.path), "--attempt", "1", "--status", "143"])


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Job:
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    monkeypatch.setattr("r1hpc.attempt.end.print_diagnosis", lambda *_: None)
    return _Job(tmp_path)


def test_a_requeue_that_never_came_about_is_taken_back(job: _Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("r1hpc.slurm.requeue.requeue", partial(requeue, patience_s=0))
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
    (job.bin / "requeue").write_text("Job is pending execution for job 7")
    assert job.end() == 0
    (end,) = [event for event in read_records(job.run.attempts) if event["event"] == "end"]
    assert (end["cause"], end["requeued"]) == ("preempted", True)
