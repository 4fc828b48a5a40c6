"""The end of an attempt inside a job, with a scontrol that answers as a test wants it."""

import os
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from unittest.mock import ANY

import pytest

from r1hpc import launch
from r1hpc.attempt.begin import begin, read_facts, write_needs
from r1hpc.attempt.end import CancelledError, OverError
from r1hpc.attempt.rank import _clock
from r1hpc.attempt.rivals import MustNotGoOnError
from r1hpc.attempt.state.cause import STOPPED, RankOutcome, write_outcome
from r1hpc.attempt.state.slurm_records import kept_records, record_of
from r1hpc.attempt.state.state import JobRef, State, read_situation
from r1hpc.base.errors import R1hpcError
from r1hpc.base.files import read_records
from r1hpc.base.lock import hold
from r1hpc.base.run_dir import RunDir
from r1hpc.checkpoint.store import CheckpointStore
from r1hpc.config import load
from r1hpc.config.schema.run import RunConfig
from r1hpc.slurm.contract import OVER
from r1hpc.slurm.rank_env import current
from r1hpc.slurm.requeue import requeue
from r1hpc.submission.chain.next_job import end_and_go_on
from r1hpc.telemetry.records.attempts import Cause, read_history, record
from r1hpc.telemetry.records.metrics import MetricWriter
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
            "[ $1 = show ] && { cat show$(grep -c show calls); exit 0; }\n"
            "[ -s requeue ] || exit 0\ncat requeue >&2; exit 1\n"
        )
        (self.bin / "scontrol").chmod(0o700)
        self.slurm_says(_RUNNING, _RUNNING)
        (self.bin / "requeue").write_text("Job is pending execution for job 7")

    def slurm_says(self, *shown: str) -> None:
        """At the verdict, ahead of the requeue, after it."""
        for count, text in enumerate(shown, start=1):
            (self.bin / f"show{count}").write_text(text)

    @property
    def asked_for(self) -> list[str]:
        """The requeues."""
        return [call for call in (self.bin / "calls").read_text().splitlines() if call.startswith("requeue")]

    def end(self) -> int:
        """As the job script does after ranks that SIGTERM ended before they could listen."""
        return end_and_go_on(self.run, 1, 143)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Job]:
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    monkeypatch.setattr("r1hpc.attempt.end.print_diagnosis", lambda *_: None)
    before = os.umask(0o077)  # launch keeps its files private, and would keep those of the tests after it
    yield _Job(tmp_path)
    os.umask(before)


def test_a_requeue_that_never_came_about_is_taken_back(job: _Job, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_the_job_script_can_tell_a_run_that_is_over_from_a_python_that_failed(job: _Job) -> None:
    job.slurm_says(_RUNNING, _CANCELLED)
    words = ["end", str(job.run.path), "--attempt", "1", "--status", "143", "--hurry"]
    assert launch.main(words) == OVER == 3


def test_an_end_that_cannot_be_judged_is_not_over(job: _Job) -> None:
    """The shell asks for the next attempt then, whose begin finds out: nothing is on record."""
    words = ["end", str(job.run.path), "--attempt", "1", "--status", "1", "--hurry"]
    job.run.train_metrics.mkdir()  # as a file that the file system does not give for a moment
    with pytest.raises(R1hpcError):
        launch.main(words)
    assert [e["event"] for e in read_records(job.run.attempts)] == ["submitted", "begin"]
    job.run.train_metrics.rmdir()
    assert launch.main(words) == 0


def test_the_checkpoints_of_a_run_that_is_over_leave_no_rest(job: _Job) -> None:
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
    job: _Job, monkeypatch: pytest.MonkeyPatch, of_a_chain: bool, status: int
) -> None:
    for name, value in (("JOB_ID", "7"), ("JOB_NODELIST", "n1"), ("TASKS_PER_NODE", "1")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    if of_a_chain:
        write_needs(job.run, [])
    job.end()
    job.run.stop.touch()
    assert launch.main(["begin", str(job.run.path)]) == status


def test_a_successor_counts_though_its_stages_could_not_be_moved(job: _Job) -> None:
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


def test_progress_after_a_checkpoint_that_could_not_be_loaded_is_seen(job: _Job) -> None:
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


def test_an_accepted_requeue_stays_on_record(job: _Job) -> None:
    assert job.end() == 0
    assert job.asked_for == ["requeue Incomplete 7"]
    (end,) = [event for event in read_records(job.run.attempts) if event["event"] == "end"]
    assert (end["cause"], end["requeued"]) == ("preempted", True)


def assert_cancelled(job: _Job, asked_for: Sequence[str] = ()) -> None:
    with pytest.raises(CancelledError, match="demo is not requeued: it was cancelled"):
        job.end()
    assert job.asked_for == list(asked_for)
    (attempt,) = read_history(job.run).attempts
    assert (attempt.cause, attempt.requeued) == (Cause.cancelled, False)
    assert read_situation(job.run).state is State.cancelled
    with pytest.raises(MustNotGoOnError, match="the run is over: cancelled"):
        begin(job.run, "slurm", "7", ("n1",), 1)


@pytest.mark.parametrize("shown", [_CANCELLED, _CANCELLED_IN_GRACE])
def test_a_scancel_after_the_verdict_is_not_undone(job: _Job, shown: str) -> None:
    job.slurm_says(_RUNNING, shown)
    assert_cancelled(job)


def test_a_scancel_in_the_second_of_the_warning_is_not_undone(job: _Job) -> None:
    """Then PreemptTime is the end as well, but it was so while the job was running."""
    job.slurm_says(_SHOWN.format(state="RUNNING", end=900, preempted="500"), _END_OF_GRACE)
    assert_cancelled(job)


def test_a_scancel_between_the_last_look_and_the_requeue_is_not_undone(job: _Job) -> None:
    """Slurm says nothing, and does nothing."""
    (job.bin / "requeue").write_text("")
    job.slurm_says(_RUNNING, _RUNNING, _CANCELLED, _CANCELLED)
    assert_cancelled(job, ["requeue Incomplete 7"])


def test_a_requeue_whose_answer_was_lost_is_not_asked_for_again(job: _Job) -> None:
    """It was carried out, and then its user cancelled the job: that holds."""
    (job.bin / "requeue").write_text("Socket timed out on send/recv operation")
    job.slurm_says(_RUNNING, _RUNNING, _CANCELLED.replace("Restarts=0", "Restarts=1"))
    assert job.end() == 0
    assert job.asked_for == ["requeue Incomplete 7"]


def test_the_end_of_the_grace_time_is_no_cancel(job: _Job) -> None:
    job.slurm_says(_RUNNING, _END_OF_GRACE)
    assert job.end() == 0
    assert job.asked_for == ["requeue 7"]


def test_a_cancel_on_record_after_the_verdict_is_obeyed(job: _Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "r1hpc.attempt.end.print_diagnosis", lambda run, _: record(run, "cancel_requested", by="me")
    )
    assert_cancelled(job)


def test_a_cancelled_run_begins_again_when_it_is_submitted_again(job: _Job) -> None:
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
    job: _Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither is on record yet when the second begins; the first is still in there."""
    load.save(load.load(None, ["stage=traces"]), job.run.config)
    monkeypatch.setattr("r1hpc.attempt.rivals._LEAVING_S", 0.0)
    job.recorded.end("preempted")
    for count in range(1, 9):
        (job.bin / f"show{count}").write_text(_RUNNING)
    held = hold(job.run.begin_lock, "job 8")
    assert held is not None
    with pytest.raises(MustNotGoOnError, match="job 8 begins an attempt of demo"):
        begin(job.run, "slurm", "9", ("n1",), 1)
    begin(job.run, "slurm", "8", ("n1",), 1)  # its own older self, on a node that Slurm lost
    os.close(held)
    with pytest.raises(MustNotGoOnError, match="is already running as job 8"):
        begin(job.run, "slurm", "9", ("n1",), 1)


def test_a_job_that_slurm_has_started_again_elsewhere_leaves_the_run_alone(
    job: _Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its batch host was lost for a while, in the hours in which it built its dataset."""
    load.save(load.load(None, ["stage=traces"]), job.run.config)
    job.recorded.end("preempted")
    job.slurm_says(*[_RUNNING] * 19)

    def hours_later(self: object, run: RunDir, config: RunConfig) -> str:
        monkeypatch.setattr("r1hpc.train.workload.Training.prepare", lambda self, run, config: "data")
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        job.slurm_says(*[_RUNNING.replace("Restarts=0", "Restarts=1")] * 19)
        assert begin(job.run, "slurm", "7", ("n2",), 1) == 2
        monkeypatch.delenv("SLURM_RESTART_COUNT")
        return "data"

    monkeypatch.setattr("r1hpc.attempt.rivals._LEAVING_S", 0.0)
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


def test_killed_in_the_second_of_its_begin_it_is_what_accounting_says(
    job: _Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sacct prints whole seconds: the job ended at 210, the attempt had begun at 210.24."""
    load.save(load.load(None, ["stage=traces"]), job.run.config)
    began = read_history(job.run).attempts[0].start
    row = f"7|PREEMPTED|{int(began) - 1}|{int(began)}|1||1|n1|0:15|me|lab|gpu|normal|||demo"
    (job.bin / "sacct").write_text(f"#!/bin/bash\necho '{row}'\n")
    (job.bin / "sacct").chmod(0o700)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert begin(job.run, "slurm", "7", ("n1",), 1) == 2
    assert read_history(job.run).attempts[0].cause is Cause.preempted


def test_an_attempt_killed_in_a_job_that_was_not_restarted_is_unknown(job: _Job) -> None:
    load.save(load.load(None, ["stage=traces"]), job.run.config)
    job.slurm_says("", "")  # it knows job 7 no more
    record(job.run, "submitted", executor="slurm", job_id="8")
    assert begin(job.run, "slurm", "8", ("n1",), 1) == 2
    assert read_history(job.run).attempts[0].cause is Cause.unknown


def test_a_begin_that_is_killed_after_its_record_is_no_node_failure(
    job: _Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job was started again before that: the shell begins once more in the same start of the job."""
    load.save(load.load(None, ["stage=traces"]), job.run.config)
    job.recorded.end("preempted")
    (job.bin / "sacct").write_text(f"#!/bin/bash\ntouch {job.bin}/asked\n")
    (job.bin / "sacct").chmod(0o700)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv("SLURM_JOB_START_TIME", "100")
    assert begin(job.run, "slurm", "7", ("n1",), 1) == 2
    (job.bin / "asked").unlink()
    for ahead, path in enumerate(
        (job.run.attempt_dir(2) / "attempt.json", job.run.rank_log(2, 0)), start=300
    ):
        path.touch()
        os.utime(path, (time.time() + ahead, time.time() + ahead))
    assert begin(job.run, "slurm", "7", ("n1",), 1) == 3
    (_, killed, _) = read_history(job.run).attempts
    assert (killed.cause, killed.detail) == (Cause.unknown, "ended without a record")
    assert killed.end is not None
    assert 0 < killed.end - killed.start < 30, "the clock of the file system is 300 s ahead"
    assert not (job.bin / "asked").exists(), "the job goes on: accounting has no end of it"


_TAKEN_BACK = _SHOWN.format(state="PENDING,COMPLETING", end=500, preempted="None").replace(
    "Restarts=0", "Restarts=1"
)


def sacct_says(job: _Job, state: str, late: bool = False) -> None:
    began = int(read_history(job.run).attempts[0].start)
    row = f"7|{state}|{began - 1}|{began + 9}|10||1|n1|0:15|me|lab|gpu|normal|||demo"
    wait = f"[ -e {job.bin}/asked ] || {{ touch {job.bin}/asked; exit; }}\n" if late else ""
    (job.bin / "sacct").write_text(f"#!/bin/bash\n{wait}echo '{row}'\n")
    (job.bin / "sacct").chmod(0o700)


def stopped_by_term(job: _Job) -> None:
    job.run.attempt_dir(1).mkdir(parents=True, exist_ok=True)
    write_outcome(job.run, 1, RankOutcome(0, STOPPED, "n1", 30, "SIGTERM"))


@pytest.mark.parametrize(("state", "cause"), [("NODE_FAIL", "node_fail"), ("REQUEUED", "preempted")])
@pytest.mark.parametrize("seen_in_time", [True, False])
def test_a_node_that_slurm_takes_down_is_a_node_failure(
    job: _Job, monkeypatch: pytest.MonkeyPatch, seen_in_time: bool, state: str, cause: str
) -> None:
    """Its survivors get SIGTERM as in a preemption; accounting tells them apart, a little later."""
    load.save(load.load(None, ["stage=traces"]), job.run.config)
    stopped_by_term(job)
    job.slurm_says(*[_TAKEN_BACK if seen_in_time else _RUNNING] * 9)
    assert job.end() == 0
    assert (read_history(job.run).attempts[0].cause is None) is seen_in_time
    sacct_says(job, state, late=True)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert begin(job.run, "slurm", "7", ("n1",), 1) == 2
    (ended, _) = read_history(job.run).attempts
    assert ended.cause is not None
    assert ended.cause.value == cause
    assert ended.requeued


@pytest.mark.parametrize("mark", [True, False])
def test_a_requeue_of_our_own_is_no_preemption(
    job: _Job, monkeypatch: pytest.MonkeyPatch, mark: bool
) -> None:
    """The disk took no record of the end; only an empty file."""
    load.save(load.load(None, ["stage=traces"]), job.run.config)
    job.run.attempt_dir(1).mkdir(parents=True)
    if mark:
        (job.run.attempt_dir(1) / "requeued-139").touch()
    job.slurm_says(*[_RUNNING] * 9)
    sacct_says(job, "REQUEUED")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert begin(job.run, "slurm", "7", ("n1",), 1) == 2
    (ended, _) = read_history(job.run).attempts
    told = (ended.cause, ended.detail)
    ours = (Cause.crash, "rank 0 left no outcome, ended by SIGSEGV")
    assert told == (ours if mark else (Cause.preempted, "requeued by scontrol"))


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("srun: error: n2: task 1: Killed", (Cause.crash, "rank 1 on n2: Killed, says srun")),
        ("demo: more of attempt 0", (Cause.preempted, "stopped by SIGTERM before the ranks could listen")),
    ],
)
def test_what_srun_said_counts_though_the_end_was_killed(
    job: _Job, monkeypatch: pytest.MonkeyPatch, said: str, told: tuple[Cause, str]
) -> None:
    load.save(load.load(None, ["stage=traces"]), job.run.config)
    job.run.attempt_dir(1).mkdir(parents=True)
    (job.run.attempt_dir(1) / "requeued-143").touch()
    after = ["job: line 274: 21 Killed launch end", "attempt 1 could not be judged: the next one will do it"]
    lines = ["srun: error: n1: task 0: Killed", "demo: attempt 0 ended: crash", said, *after, "begin failed"]
    (job.run.logs / "slurm-7.out").write_text("\n".join(lines))
    job.slurm_says(*[_RUNNING] * 9)
    sacct_says(job, "REQUEUED")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert begin(job.run, "slurm", "7", ("n1",), 1) == 2
    (ended, _) = read_history(job.run).attempts
    assert (ended.cause, ended.detail) == told


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("task 1: Killed", "rank 1 on n2: Killed, says srun"),
        ("tasks 1-3: Exited with exit code 1", "rank 1 on n2: Exited with exit code 1, says srun"),
        ("task 1: Terminated", None),
        ("Job step aborted: Waiting up to 32 seconds for job step to finish.", None),
    ],
)
@pytest.mark.parametrize("peer", ["killed", "stopped"])
def test_the_sigterm_of_srun_to_the_peers_is_no_preemption(
    job: _Job, said: str, told: str | None, peer: str
) -> None:
    """srun --kill-on-bad-exit ends the others, which may even save and leave."""
    before = "srun: error: n1: task 0: Killed\ndemo: attempt 0 ended: crash\n"
    after = "srun: Terminating StepId=7.0\nslurmstepd: error: x\nsrun: error: n1: task 0: Killed\n"
    said = said if "aborted" in said else f"error: n2: {said}"
    (job.run.logs / "slurm-7.out").write_text(f"{before}srun: {said}\n{after}")
    if peer == "stopped":
        job.run.attempt_dir(1).mkdir(parents=True)
        write_outcome(job.run, 1, RankOutcome(0, STOPPED, "n1", 3, "SIGTERM"))
    job.end()
    (attempt,) = read_history(job.run).attempts
    assert attempt.cause is (Cause.crash if told else Cause.preempted)
    assert attempt.detail == (told or attempt.detail)


@pytest.mark.parametrize("peer", ["killed", "stopped"])
def test_a_cancelled_step_is_no_preemption(job: _Job, peer: str) -> None:
    """`scancel JOB.0`: the rank on the other node lived on until srun sent SIGTERM."""
    said = ["Job step aborted: Waiting up to 10 seconds for job step to finish.", "error: n1: task 0: Killed"]
    said += ["Terminating StepId=7.0", "error: n2: task 1: Terminated"]
    (job.run.logs / "slurm-7.out").write_text("".join(f"srun: {line}\n" for line in said))
    if peer == "stopped":
        job.run.attempt_dir(1).mkdir(parents=True)
        write_outcome(job.run, 1, RankOutcome(1, STOPPED, "n2", 3, "SIGTERM"))
    job.end()
    (attempt,) = read_history(job.run).attempts
    assert (attempt.cause, attempt.detail) == (Cause.crash, "its step was cancelled, as `scancel JOB.0` does")


def test_what_srun_said_of_the_attempt_before_does_not_count(
    job: _Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Slurm killed that attempt's `end` before it printed anything."""
    for name, value in (("JOB_ID", "7"), ("JOB_NODELIST", "n1"), ("TASKS_PER_NODE", "1")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    load.save(load.load(None, ["stage=traces"]), job.run.config)
    job.slurm_says(*[_RUNNING] * 9)
    job.end()
    capsys.readouterr()
    assert launch.main(["begin", str(job.run.path)]) == 0
    log = (
        "srun: Job step aborted: Waiting up to 10 seconds for job step to finish.\n" + capsys.readouterr().err
    )
    log += "srun: error: n1: task 0: Killed\nsrun: Terminating StepId=7.0\n"
    (job.run.logs / "slurm-7.out").write_text(log)
    end_and_go_on(job.run, 2, 137)
    assert read_history(job.run).attempts[-1].detail == "rank 0 on n1: Killed, says srun"


def test_an_end_that_the_disk_does_not_take_leaves_a_mark(job: _Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(122, "Disk quota exceeded")

    job.run.attempt_dir(1).mkdir(parents=True)
    monkeypatch.setattr("r1hpc.attempt.end.record", refuse)
    assert job.end() == 0
    assert job.asked_for == ["requeue Incomplete 7"]
    assert (job.run.attempt_dir(1) / "requeued-143").is_file()


def test_the_limit_that_ends_a_run_is_on_record(job: _Job) -> None:
    load.save(load.load(None, ["stage=traces", "limits.max_crashes=0"]), job.run.config)
    job.slurm_says(_RUNNING)
    assert end_and_go_on(job.run, 1, 1) == 1
    situation = read_situation(job.run)
    assert situation.state is State.failed
    assert "not continued: 1 attempts ended by crash since the last progress" in situation.detail
    assert "limits.max_crashes is 0" in situation.history.attempts[0].not_continued


_LIMITED = _RUNNING.replace("UNLIMITED", "00:10:00")


@pytest.mark.parametrize(("now", "cause"), [(690, Cause.timeout), (400, Cause.preempted)])
def test_the_time_left_is_by_the_clock_of_slurmctld(job: _Job, now: int, cause: Cause) -> None:
    """RunTime of a running job is by this host's clock: INVALID where that is behind."""
    shown = _LIMITED.replace("TimeLimit", "RunTime=INVALID TimeLimit")
    job.slurm_says(shown, f"Configuration data as of {now}\n", shown, shown)
    job.run.attempt_dir(1).mkdir(parents=True)
    write_outcome(job.run, 1, RankOutcome(0, STOPPED, "n1", 30, "SIGUSR2"))
    job.end()
    assert read_history(job.run).attempts[0].cause is cause


def test_the_ranks_learn_when_the_limit_ends_the_job_whatever_the_clock(
    job: _Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Job 7 has 200 s left by slurmctld's clock, which is decades behind this one."""
    load.save(load.load(None, ["stage=traces"]), job.run.config)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    monkeypatch.setenv("SLURM_JOB_START_TIME", "100")
    monkeypatch.setenv("SLURM_JOB_END_TIME", "700")
    (job.bin / "scontrol").write_text(
        f"#!/bin/bash\n[ $2 = config ] && exec echo Configuration data as of 500\necho '{_LIMITED.strip()}'\n"
    )
    assert begin(job.run, "slurm", "7", ("n1",), 1) == 2
    ends_at = read_facts(job.run, 2).ends_at
    assert ends_at is not None
    assert 190 < ends_at - time.monotonic() <= 200
    assert read_history(job.run).attempts[1].job_start == 100
    context = current({"R1HPC_ATTEMPT": "2", "R1HPC_LOCAL_RANK": "0", "R1HPC_LOCAL_WORLD_SIZE": "1"})
    clock = _clock(job.run, load.load(None, ["stage=traces"]), context)
    assert clock.ends_at == ends_at
    assert 80 < (clock.first_save_at or 0) - time.monotonic() <= 100


@pytest.mark.parametrize("skew", [-300, -40, 40, 300])
def test_an_attempt_that_was_killed_is_found_in_accounting_whatever_the_clock(
    job: _Job, monkeypatch: pytest.MonkeyPatch, skew: int
) -> None:
    load.save(load.load(None, ["stage=traces"]), job.run.config)
    start = int(time.time()) - 1000
    record(job.run, "end", attempt=1, cause="preempted", requeued=True)
    record(
        job.run, "begin", time=start + 5.5 + skew, attempt=2, job_id="7", executor="slurm", job_start=start
    )
    rows = [
        f"7|{state}|{began}|{began + length}|{length}||1|n1|0:15|me|lab|gpu|normal|||demo"
        for state, began, length in (("PREEMPTED", start - 400, 390), ("NODE_FAIL", start, 20))
    ]
    (job.bin / "sacct").write_text("#!/bin/bash\n" + "".join(f"echo '{row}'\n" for row in rows))
    (job.bin / "sacct").chmod(0o700)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert begin(job.run, "slurm", "7", ("n1",), 1) == 3
    attempt = read_history(job.run).attempts[1]
    assert attempt.cause is Cause.node_fail
    assert attempt.end is not None
    assert 0 < attempt.end - attempt.start <= 20
    records = kept_records(job.run).records
    found = record_of(records, "7", attempt.start, attempt.end, attempt.job_start)
    assert found is not None
    assert (found.state, found.start) == ("NODE_FAIL", start)
