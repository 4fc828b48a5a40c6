"""Job states read from scontrol, and a requeue that outlives a restart of slurmctld."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from r1hpc.slurm.client import SlurmError, call
from r1hpc.slurm.requeue import (
    REQUEUE_PATIENCE_S,
    JobState,
    job_state,
    parse_job,
    requeue,
    resubmit,
)

# `SLURM_TIME_FORMAT=%s scontrol show job -o 11` of Slurm 24.11.5, between two attempts, its name changed.
PENDING = (
    "JobId=11 JobName=x JobState=RUNNING Restarts=9 UserId=root(0) GroupId=root(0) MCS_label=N/A Priority=1 "
    "Nice=0 Account=research QOS=scavenger JobState=PENDING Reason=BeginTime Dependency=(null) Requeue=1 "
    "Restarts=1 BatchFlag=1 Reboot=0 ExitCode=0:0 RunTime=00:00:00 TimeLimit=1-00:30:00 TimeMin=N/A "
    "SubmitTime=1795569173 EligibleTime=1795569179 AccrueTime=Unknown StartTime=1795569179 "
    "EndTime=1795570979 Deadline=N/A SuspendTime=None PreemptTime=None"
)


def test_a_job_between_two_attempts() -> None:
    state = parse_job(PENDING)
    assert state.states == {"PENDING"}
    assert (state.live, state.pending, state.requeue) == (True, True, True)
    assert (state.restarts, state.reason) == (1, "BeginTime")
    assert (state.end_time, state.preempt_time) == (1795570979, None)
    assert state.limit_at == 1795569179 + 88200
    suspended = PENDING.replace("SuspendTime=None", "SuspendTime=1795570000 SecsPreSuspend=300")
    assert parse_job(suspended).limit_at == 1795570000 - 300 + 88200


def test_a_job_that_is_being_preempted() -> None:
    text = PENDING.replace("JobState=PENDING", "JobState=RUNNING").replace(
        "PreemptTime=None", "PreemptTime=1795570000"
    )
    assert parse_job(text).preempt_time == 1795570000
    assert parse_job(text.replace("JobState=RUNNING Reason", "JobState=COMPLETED Reason")).live is False


def test_a_job_slurm_has_forgotten() -> None:
    assert parse_job("") == JobState(frozenset())
    assert parse_job("").live is False


def _program(folder: Path, body: str, name: str = "scontrol") -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\necho $* >> {folder}/calls\n{body}")
    (folder / name).chmod(0o700)


def _requeues(folder: Path, body: str) -> None:
    """A scontrol that shows a running job until `body`, which answers a requeue, has left with status 0."""
    running = PENDING.replace("JobState=PENDING", "JobState=RUNNING").replace("Restarts=1", "Restarts=0")
    _program(folder, body, "requeue")
    (folder / "shown").write_text(running)
    (folder / "pending").write_text(PENDING)
    (folder / "scontrol").write_text(
        f"#!/bin/bash\ncd {folder}\n[ $1 = show ] && exec cat shown\n./requeue $* || exit\ncp pending shown\n"
    )
    (folder / "scontrol").chmod(0o700)


@pytest.fixture
def answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    return tmp_path / "bin"


@pytest.mark.parametrize(
    ("said", "status", "accepted"),
    [
        ("", 0, True),
        ("Job is pending execution for job 11", 1, True),
        ("Requested operation is presently disabled for job 11", 1, False),
        ("Invalid job id specified for job 11", 1, False),
        ("Job/step already completing or completed for job 11", 1, False),
    ],
)
def test_the_answers_of_a_requeue(answers: Path, said: str, status: int, accepted: bool) -> None:
    _requeues(answers, f"echo '{said}' >&2\nexit {status}\n")
    assert requeue("11") is accepted
    assert (answers / "calls").read_text() == "requeue Incomplete 11\n"


def test_a_job_that_slurm_requeues_anyway_is_not_asked_for(answers: Path) -> None:
    _requeues(answers, "exit 1")
    (answers / "shown").write_text(PENDING)
    assert requeue("11") is True
    assert not (answers / "calls").exists()


class _Clock:
    """Time that passes in `sleep` alone."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.waits: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    made = _Clock()
    monkeypatch.setattr("r1hpc.slurm.client.time", made)
    return made


@pytest.mark.parametrize(
    "said",
    [
        "slurm_requeue error: Unable to contact slurm controller (connect failure)",
        "Unexpected message received for job 11",  # of 24.11.5, its slurmctld killed
        "Job can not be altered now, try again later for job 11",
        "something that a later release says",
    ],
)
def test_a_requeue_waits_for_slurmctld(answers: Path, clock: _Clock, said: str) -> None:
    _requeues(answers, f"[ $(wc -l < {answers}/calls) -ge 4 ] && exit 0\necho '{said}' >&2; exit 1\n")
    assert requeue("11") is True
    assert clock.waits == [1.0, 2.0, 4.0]


def test_a_requeue_gives_up_after_ten_minutes(answers: Path, clock: _Clock) -> None:
    _requeues(answers, "echo 'Unexpected message received for job 11' >&2; exit 1")
    with pytest.raises(SlurmError, match="Unexpected message"):
        requeue("11")
    assert REQUEUE_PATIENCE_S - 30 <= sum(clock.waits) <= REQUEUE_PATIENCE_S == 600


def test_the_time_that_a_call_takes_counts_too(answers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _requeues(answers, "echo 'Socket timed out on send/recv operation' >&2; exit 1")
    times = iter(range(0, 10_000, 60))
    clock = SimpleNamespace(sleep=lambda _: None, monotonic=lambda: float(next(times)))
    monkeypatch.setattr("r1hpc.slurm.client.time", clock)
    with pytest.raises(SlurmError, match="Socket timed out"):
        requeue("11")
    assert len((answers / "calls").read_text().splitlines()) == 10


@pytest.mark.parametrize("said", ["Access/permission denied", "Only batch jobs are accepted or processed"])
def test_a_refusal_is_not_repeated(answers: Path, clock: _Clock, said: str) -> None:
    _requeues(answers, f"echo '{said} for job 11' >&2; exit 1")
    with pytest.raises(SlurmError, match=said):
        requeue("11")
    assert not clock.waits
    assert (answers / "calls").read_text() == "requeue Incomplete 11\n"


def test_without_scontrol_there_is_nothing_to_wait_for(
    tmp_path: Path, clock: _Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmError, match="scontrol is not on PATH"):
        requeue("11")
    assert not clock.waits


def test_an_unknown_answer_is_shown_whole(answers: Path) -> None:
    _requeues(answers, "echo out; echo 'no such thing' >&2; exit 3")
    with pytest.raises(
        SlurmError, match=r"`scontrol requeue Incomplete 11` failed with exit status 3"
    ) as raised:
        requeue("11", patience_s=0)
    assert "stderr: no such thing" in str(raised.value)
    assert "stdout: out" in str(raised.value)


def test_an_invalid_id_is_a_forgotten_job(answers: Path) -> None:
    _program(answers, "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert job_state("11").states == frozenset()


def test_a_resubmission_carries_the_payload_over(answers: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "submitit").mkdir(parents=True)
    (run / "submitit" / "7_submitted.pkl").write_bytes(b"payload")
    _program(answers, "", "squeue")
    _program(answers, "echo '12;cluster'", "sbatch")
    assert resubmit(run / "job.sh", after="7") == "12"
    assert (run / "submitit" / "12_submitted.pkl").read_bytes() == b"payload"
    asked = (answers / "calls").read_text().splitlines()
    assert asked[-1] == f"--parsable --dependency=afterany:7 {run}/job.sh"


def test_a_resubmission_waits_for_slurmctld(answers: Path, clock: _Clock, tmp_path: Path) -> None:
    said = "Unable to contact slurm controller (connect failure)"
    _program(answers, f"[ $(wc -l < {answers}/calls) -ge 4 ] && exit 0\necho '{said}' >&2; exit 1", "squeue")
    _program(answers, "echo 12", "sbatch")
    (tmp_path / "submitit").mkdir()
    assert resubmit(tmp_path / "job.sh") == "12"
    assert clock.waits == [1.0, 2.0, 4.0]


def test_a_slow_command_is_ended(answers: Path) -> None:
    _program(answers, "echo partial; exec sleep 30")
    with pytest.raises(SlurmError, match=r"did not answer within 0\.3 s") as raised:
        call(["scontrol", "ping"], 0.3)
    assert raised.value.timed_out
    assert raised.value.unreachable


def test_a_missing_command_names_the_way_out(answers: Path) -> None:
    with pytest.raises(SlurmError, match=r"no-such-slurm is not on PATH.*--executor local"):
        call(["no-such-slurm"])
