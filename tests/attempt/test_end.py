"""The end of an attempt inside a job: its requeue, a cancel, and a job that is not alone."""

import os
from collections.abc import Sequence
from functools import partial
from unittest.mock import ANY

import pytest

from r1hpc import launch
from r1hpc.attempt.begin import begin, read_facts, write_needs
from r1hpc.attempt.end import CancelledError, OverError
from r1hpc.attempt.may_begin import MustNotGoOnError
from r1hpc.attempt.state.cause import STOPPED, RankOutcome, write_outcome
from r1hpc.attempt.state.state import JobRef, State, read_situation
from r1hpc.base.errors import R1hpcError
from r1hpc.base.files import read_records
from r1hpc.base.lock import hold
from r1hpc.base.run_dir import RunDir
from r1hpc.checkpoint.store import CheckpointStore
from r1hpc.config import load
from r1hpc.config.schema.run import RunConfig
from r1hpc.slurm.requeue import requeue
from r1hpc.slurm.shell.contract import OVER
from r1hpc.submission.chain.next_job import end_and_go_on
from r1hpc.telemetry.records.attempts import Cause, read_history, record
from r1hpc.telemetry.records.metrics import MetricWriter
from tests.attempt.ending_job import CANCELLED, CANCELLED_IN_GRACE, END_OF_GRACE, RUNNING, SHOWN, EndingJob
from tests.checkpoint.harness import save


def test_a_requeue_that_never_came_about_is_taken_back(
    job: EndingJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("r1hpc.submission.chain.next_job.requeue", partial(requeue, patience_s=0))
    (job.bin / "requeue").write_text("Unexpected message received for job 7")
    with pytest.raises(OverError, match="Unexpected message"):
        job.end()
    promised, kept = [event for event in read_records(job.run.attempts) if event["event"] == "end"]
    assert (promised["requeued"], kept["requeued"]) == (True, False)
    assert kept["ended"] == promised["time"]
    assert kept["exit_status"] == promised["exit_status"] == 143
    (attempt,) = read_history(job.run).attempts
    assert (attempt.cause, attempt.requeued, attempt.end) == (Cause.preempted, False, promised["time"])
    assert "not requeued: `scontrol requeue Incomplete 7` failed" in attempt.detail
    assert read_situation(job.run).state is State.failed


def test_the_job_script_can_tell_a_run_that_is_over_from_a_python_that_failed(job: EndingJob) -> None:
    job.slurm_says(RUNNING, CANCELLED)
    words = ["end", str(job.run.path), "--attempt", "1", "--status", "143", "--hurry"]
    assert launch.main(words) == OVER == 3


def test_an_end_that_cannot_be_judged_is_not_over(job: EndingJob) -> None:
    """The shell asks for the next attempt then, whose begin finds out: nothing is on record."""
    words = ["end", str(job.run.path), "--attempt", "1", "--status", "1", "--hurry"]
    job.run.train_metrics.mkdir()  # as a file that the file system does not give for a moment
    with pytest.raises(R1hpcError):
        launch.main(words)
    assert [e["event"] for e in read_records(job.run.attempts)] == ["submitted", "begin"]
    job.run.train_metrics.rmdir()
    assert launch.main(words) == 0


def test_the_checkpoints_of_a_run_that_is_over_leave_no_rest(job: EndingJob) -> None:
    store = CheckpointStore(job.run.checkpoints)
    store.begin(1, "0" * 16)
    for step in (10, 20, 30):
        save(store, step, 1, "0" * 16)
    assert store.prune([30], hurry=True) == [10]
    (rest,) = job.run.checkpoints.glob(".incarnation-*/.trash*")
    job.run.stop.touch()
    job.run.attempt_dir(1).mkdir(parents=True)
    write_outcome(job.run, 1, RankOutcome(0, STOPPED, "n1", 30, "STOP file"))
    assert end_and_go_on(job.run, 1, 0) == 0
    assert not rest.exists()


@pytest.mark.parametrize(("of_a_chain", "status"), [(True, OVER), (False, 0)])
def test_a_stop_between_two_attempts_fails_the_job_that_others_wait_for(
    job: EndingJob, monkeypatch: pytest.MonkeyPatch, of_a_chain: bool, status: int
) -> None:
    for name, value in (("JOB_ID", "7"), ("JOB_NODELIST", "n1"), ("TASKS_PER_NODE", "1")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    if of_a_chain:
        write_needs(job.run, [])
    job.end()
    job.run.stop.touch()
    assert launch.main(["begin", str(job.run.path)]) == status


def test_a_successor_counts_though_its_stages_could_not_be_moved(job: EndingJob) -> None:
    """Requeueing is forbidden, and the file of the chain it belongs to cannot be read."""
    (job.bin / "requeue").write_text("Requested operation is presently disabled for job 7")
    for name, says in (("sbatch", "12"), ("squeue", "")):
        (job.bin / name).write_text(f"#!/bin/bash\necho {says}\n")
        (job.bin / name).chmod(0o700)
    (job.run.path.parent / "chain.yaml").write_text("stages: [")
    assert job.end() == 0
    assert read_situation(job.run).job == JobRef("12", "slurm", "resubmitted", time=ANY)
    (attempt,) = read_history(job.run).attempts
    assert (attempt.cause, attempt.requeued) == (Cause.preempted, True)


def test_progress_after_a_checkpoint_that_could_not_be_loaded_is_seen(job: EndingJob) -> None:
    """step-100 is there and cannot be loaded; the attempt went on from step-80 and committed step-90."""
    token = "t" * 16
    store = CheckpointStore(job.run.checkpoints)
    store.begin(0, token)
    save(store, 80, 0, token)
    save(store, 100, 0, token)
    store.begin(1, token)
    MetricWriter(job.run, 1).event("resume", global_step=80)
    save(store, 90, 1, token)
    job.end()
    (attempt,) = read_history(job.run).attempts
    assert (attempt.resumed_from, attempt.last_committed_step) == (80, 90)


def test_an_accepted_requeue_stays_on_record(job: EndingJob) -> None:
    assert job.end() == 0
    assert job.asked_for == ["requeue Incomplete 7"]
    (end,) = [event for event in read_records(job.run.attempts) if event["event"] == "end"]
    assert (end["cause"], end["requeued"]) == ("preempted", True)


def assert_cancelled(job: EndingJob, asked_for: Sequence[str] = ()) -> None:
    with pytest.raises(CancelledError, match="demo is not requeued: it was cancelled"):
        job.end()
    assert job.asked_for == list(asked_for)
    (attempt,) = read_history(job.run).attempts
    assert (attempt.cause, attempt.requeued) == (Cause.cancelled, False)
    assert read_situation(job.run).state is State.cancelled
    with pytest.raises(MustNotGoOnError, match="the run is over: cancelled"):
        begin(job.run, "slurm", "7", ("n1",), 1)


@pytest.mark.parametrize("shown", [CANCELLED, CANCELLED_IN_GRACE])
def test_a_scancel_after_the_verdict_is_not_undone(job: EndingJob, shown: str) -> None:
    job.slurm_says(RUNNING, shown)
    assert_cancelled(job)


def test_a_scancel_in_the_second_of_the_warning_is_not_undone(job: EndingJob) -> None:
    """Then PreemptTime is the end as well, but it was so while the job was running."""
    job.slurm_says(SHOWN.format(state="RUNNING", end=900, preempted="500"), END_OF_GRACE)
    assert_cancelled(job)


def test_a_scancel_between_the_last_look_and_the_requeue_is_not_undone(job: EndingJob) -> None:
    """Slurm says nothing, and does nothing."""
    (job.bin / "requeue").write_text("")
    job.slurm_says(RUNNING, RUNNING, CANCELLED, CANCELLED)
    assert_cancelled(job, ["requeue Incomplete 7"])


def test_a_requeue_whose_answer_was_lost_is_not_asked_for_again(job: EndingJob) -> None:
    """It was carried out, and then its user cancelled the job: that holds."""
    (job.bin / "requeue").write_text("Socket timed out on send/recv operation")
    job.slurm_says(RUNNING, RUNNING, CANCELLED.replace("Restarts=0", "Restarts=1"))
    assert job.end() == 0
    assert job.asked_for == ["requeue Incomplete 7"]


def test_the_end_of_the_grace_time_is_no_cancel(job: EndingJob) -> None:
    job.slurm_says(RUNNING, END_OF_GRACE)
    assert job.end() == 0
    assert job.asked_for == ["requeue 7"]


def test_a_cancel_on_record_after_the_verdict_is_obeyed(
    job: EndingJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "r1hpc.attempt.end.print_diagnosis", lambda run, _: record(run, "cancel_requested", by="me")
    )
    assert_cancelled(job)


def test_a_cancelled_run_begins_again_when_it_is_submitted_again(job: EndingJob) -> None:
    """A job that was requeued at the very time of a cancel is started by Slurm, and leaves."""
    job.recorded.end("preempted")
    record(job.run, "cancel_requested", by="me")
    with pytest.raises(MustNotGoOnError, match=r"it was cancelled\. Use `submit --resume` to continue"):
        begin(job.run, "slurm", "7", ("n1",), 1)
    assert len(read_history(job.run).attempts) == 1
    load.save(load.load(None, ["stage=traces"]), job.run.config)  # a stage that reads no shards
    assert begin(job.run, "slurm", "8", ("n1",), 1) == 2  # started before its submission is on record
    record(job.run, "submitted", executor="slurm", job_id="8")
    assert begin(job.run, "slurm", "8", ("n1",), 1) == 3


def test_of_two_jobs_that_begin_at_once_the_second_sees_the_first(
    job: EndingJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither is on record yet when the second begins; the first is still in there."""
    load.save(load.load(None, ["stage=traces"]), job.run.config)
    monkeypatch.setattr("r1hpc.attempt.may_begin._LEAVING_S", 0.0)
    job.recorded.end("preempted")
    for count in range(1, 9):
        (job.bin / f"show{count}").write_text(RUNNING)
    held = hold(job.run.begin_lock, "job 8")
    assert held is not None
    with pytest.raises(MustNotGoOnError, match="job 8 begins an attempt of demo"):
        begin(job.run, "slurm", "9", ("n1",), 1)
    begin(job.run, "slurm", "8", ("n1",), 1)  # its own older self, on a node that Slurm lost
    os.close(held)
    with pytest.raises(MustNotGoOnError, match="is already running as job 8"):
        begin(job.run, "slurm", "9", ("n1",), 1)


def test_a_job_that_slurm_has_started_again_elsewhere_leaves_the_run_alone(
    job: EndingJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its batch host was lost for a while, in the hours in which it built its dataset."""
    load.save(load.load(None, ["stage=traces"]), job.run.config)
    job.recorded.end("preempted")
    job.slurm_says(*[RUNNING] * 19)

    def hours_later(self: object, run: RunDir, config: RunConfig) -> str:
        monkeypatch.setattr("r1hpc.train.workload.Training.prepare", lambda self, run, config: "data")
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        job.slurm_says(*[RUNNING.replace("Restarts=0", "Restarts=1")] * 19)
        assert begin(job.run, "slurm", "7", ("n2",), 1) == 2
        monkeypatch.delenv("SLURM_RESTART_COUNT")
        return "data"

    monkeypatch.setattr("r1hpc.attempt.may_begin._LEAVING_S", 0.0)
    monkeypatch.setattr("r1hpc.train.workload.Training.prepare", hours_later)
    for is_slurm_silent in (False, False, True):  # asked again, it hears it from Slurm, or sees the record
        if is_slurm_silent:
            (job.bin / "scontrol").write_text("#!/bin/bash\nexit 1\n")
        with pytest.raises(MustNotGoOnError, match="was started again on another node") as left:
            begin(job.run, "slurm", "7", ("n1",), 1)
        assert left.value.cause is None
    (live,) = job.run.path.glob("attempts/2")
    assert read_facts(job.run, 2).dataset_path == "data"
    assert live.is_dir()
    assert [e["attempt"] for e in read_records(job.run.attempts) if e["event"] == "begin"] == [1, 2]
