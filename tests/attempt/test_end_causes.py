"""The cause of an attempt that has ended, as the ranks, srun, Slurm and its accounting tell it."""

import os
import time
from dataclasses import replace

import pytest

from r1hpc import launch
from r1hpc.attempt.begin import begin, read_facts
from r1hpc.attempt.end import _reason_to_hold
from r1hpc.attempt.limits import reason_to_stop
from r1hpc.attempt.rank import _deadlines
from r1hpc.attempt.state.cause import STOPPED, RankOutcome, write_outcome
from r1hpc.attempt.state.slurm_records import kept_records, learn, record_of
from r1hpc.attempt.state.state import State, read_situation
from r1hpc.attempt.state.unended import corrected_history
from r1hpc.checkpoint.store import CheckpointStore
from r1hpc.config import load
from r1hpc.config.schema.run import LimitsConfig
from r1hpc.slurm.rank_env import current
from r1hpc.slurm.sacct import sacct_records
from r1hpc.slurm.shell.contract import NOT_THE_NODE
from r1hpc.submission.chain.next_job import end_and_go_on
from r1hpc.telemetry.records.attempts import Attempt, Cause, read_history, read_run_events, record
from tests.attempt.ending_job import RUNNING, SHOWN, EndingJob
from tests.checkpoint.harness import save


def test_hard_preemptions_without_accounting_are_no_crashes(
    job: EndingJob, monkeypatch: pytest.MonkeyPatch
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
    job: EndingJob, monkeypatch: pytest.MonkeyPatch
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


def test_an_attempt_killed_in_a_job_that_was_not_restarted_is_unknown(job: EndingJob) -> None:
    load.save(load.load(None, ["stage=traces"]), job.run.config)
    job.slurm_says("", "")  # it knows job 7 no more
    record(job.run, "submitted", executor="slurm", job_id="8")
    assert begin(job.run, "slurm", "8", ("n1",), 1) == 2
    assert read_history(job.run).attempts[0].cause is Cause.unknown


def test_a_begin_that_is_killed_after_its_record_is_no_node_failure(
    job: EndingJob, monkeypatch: pytest.MonkeyPatch
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


_TAKEN_BACK = SHOWN.format(state="PENDING,COMPLETING", end=500, preempted="None").replace(
    "Restarts=0", "Restarts=1"
)


def sacct_says(job: EndingJob, state: str, late: bool = False) -> None:
    began = int(read_history(job.run).attempts[0].start)
    row = f"7|{state}|{began - 1}|{began + 9}|10||1|n1|0:15|me|lab|gpu|normal|||demo"
    wait = f"[ -e {job.bin}/asked ] || {{ touch {job.bin}/asked; exit; }}\n" if late else ""
    (job.bin / "sacct").write_text(f"#!/bin/bash\n{wait}echo '{row}'\n")
    (job.bin / "sacct").chmod(0o700)


def stopped_by_term(job: EndingJob) -> None:
    job.run.attempt_dir(1).mkdir(parents=True, exist_ok=True)
    write_outcome(job.run, 1, RankOutcome(0, STOPPED, "n1", 30, "SIGTERM"))


@pytest.mark.parametrize(("state", "cause"), [("NODE_FAIL", "node_fail"), ("REQUEUED", "preempted")])
@pytest.mark.parametrize("seen_in_time", [True, False])
def test_a_node_that_slurm_takes_down_is_a_node_failure(
    job: EndingJob, monkeypatch: pytest.MonkeyPatch, seen_in_time: bool, state: str, cause: str
) -> None:
    """Its survivors get SIGTERM as in a preemption; accounting tells them apart, a little later."""
    load.save(load.load(None, ["stage=traces"]), job.run.config)
    stopped_by_term(job)
    job.slurm_says(*[_TAKEN_BACK if seen_in_time else RUNNING] * 9)
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
    job: EndingJob, monkeypatch: pytest.MonkeyPatch, mark: bool
) -> None:
    """The disk took no record of the end; only an empty file."""
    load.save(load.load(None, ["stage=traces"]), job.run.config)
    job.run.attempt_dir(1).mkdir(parents=True)
    if mark:
        (job.run.attempt_dir(1) / "requeued-139").touch()
    job.slurm_says(*[RUNNING] * 9)
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
        ("more of the site's own", (Cause.preempted, "stopped by SIGTERM before the ranks could listen")),
    ],
)
def test_what_srun_said_counts_though_the_end_was_killed(
    job: EndingJob, monkeypatch: pytest.MonkeyPatch, said: str, told: tuple[Cause, str]
) -> None:
    load.save(load.load(None, ["stage=traces"]), job.run.config)
    job.run.attempt_dir(1).mkdir(parents=True)
    (job.run.attempt_dir(1) / "requeued-143").touch()
    after = ["job: line 274: 21 Killed launch end", "attempt 1 could not be judged: the next one will do it"]
    begun = "demo: attempt 1 begins on n[1-2]"
    lines = ["srun: error: n1: task 0: Killed", begun, said, *after, "begin failed"]
    (job.run.logs / "slurm-7.out").write_text("\n".join(lines))
    job.slurm_says(*[RUNNING] * 9)
    sacct_says(job, "REQUEUED")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert begin(job.run, "slurm", "7", ("n1",), 1) == 2
    (ended, _) = read_history(job.run).attempts
    assert (ended.cause, ended.detail) == told


def test_a_later_look_at_the_cause_still_reads_what_srun_said_of_that_attempt(
    job: EndingJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attempts of one job share its log. Each `begin` looks again at every cause that was inferred."""
    load.save(load.load(None, ["stage=traces"]), job.run.config)
    stopped_by_term(job)
    (job.run.attempt_dir(1) / "requeued-137").touch()
    first = ["demo: attempt 1 begins on n[1-2]", "srun: error: n2: task 1: Killed", "srun: Terminating"]
    (job.run.logs / "slurm-7.out").write_text("\n".join(first))
    job.slurm_says(*[RUNNING] * 9)
    sacct_says(job, "REQUEUED")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    begin(job.run, "slurm", "7", ("n1",), 1)
    others = [f"demo: attempt {k} begins on n1\nsrun: error: n1: task 0: Terminated" for k in range(2, 30)]
    (job.run.logs / "slurm-7.out").write_text("\n".join(["of the site", *first, *others]))
    sacct_says(job, "REQUEUED")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    begin(job.run, "slurm", "7", ("n1",), 1)
    ended = read_history(job.run).attempts[0]
    assert (ended.cause, ended.detail) == (Cause.crash, "rank 1 on n2: Killed, says srun")


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
    job: EndingJob, said: str, told: str | None, peer: str
) -> None:
    """srun --kill-on-bad-exit ends the others, which may even save and leave."""
    before = "srun: error: n1: task 0: Killed\ndemo: attempt 1 begins on n[1-2]\n"
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
def test_a_cancelled_step_is_no_preemption(job: EndingJob, peer: str) -> None:
    """`scancel JOB.0`: the rank on the other node lived on until srun sent SIGTERM."""
    said = ["Job step aborted: Waiting up to 10 seconds for job step to finish.", "error: n1: task 0: Killed"]
    said += ["Terminating StepId=7.0", "error: n2: task 1: Terminated"]
    (job.run.logs / "slurm-7.out").write_text(
        "demo: attempt 1 begins on n[1-2]\n" + "".join(f"srun: {line}\n" for line in said)
    )
    if peer == "stopped":
        job.run.attempt_dir(1).mkdir(parents=True)
        write_outcome(job.run, 1, RankOutcome(1, STOPPED, "n2", 3, "SIGTERM"))
    job.end()
    (attempt,) = read_history(job.run).attempts
    assert (attempt.cause, attempt.detail) == (Cause.crash, "its step was cancelled, as `scancel JOB.0` does")


def test_what_srun_said_of_the_attempt_before_does_not_count(
    job: EndingJob, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Slurm killed that attempt's `end` before it printed anything."""
    for name, value in (("JOB_ID", "7"), ("JOB_NODELIST", "n1"), ("TASKS_PER_NODE", "1")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    load.save(load.load(None, ["stage=traces"]), job.run.config)
    job.slurm_says(*[RUNNING] * 9)
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


def test_an_end_that_the_disk_does_not_take_leaves_a_mark(
    job: EndingJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(122, "Disk quota exceeded")

    job.run.attempt_dir(1).mkdir(parents=True)
    monkeypatch.setattr("r1hpc.attempt.end.record", refuse)
    assert job.end() == 0
    assert job.asked_for == ["requeue Incomplete 7"]
    assert (job.run.attempt_dir(1) / "requeued-143").is_file()


def test_the_limit_that_ends_a_run_is_on_record(job: EndingJob) -> None:
    load.save(load.load(None, ["stage=traces", "limits.max_crashes=0"]), job.run.config)
    job.slurm_says(RUNNING)
    assert end_and_go_on(job.run, 1, 1) == 1
    situation = read_situation(job.run)
    assert situation.state is State.failed
    assert "not continued: 1 attempts ended by crash since the last progress" in situation.detail
    assert "limits.max_crashes is 0" in situation.history.attempts[0].not_continued


_LIMITED = RUNNING.replace("UNLIMITED", "00:10:00")


@pytest.mark.parametrize(("now", "cause"), [(690, Cause.timeout), (400, Cause.preempted)])
def test_the_time_left_is_by_the_clock_of_slurmctld(job: EndingJob, now: int, cause: Cause) -> None:
    """RunTime of a running job is by this host's clock: INVALID where that is behind."""
    shown = _LIMITED.replace("TimeLimit", "RunTime=INVALID TimeLimit")
    job.slurm_says(shown, f"Configuration data as of {now}\n", shown, shown)
    job.run.attempt_dir(1).mkdir(parents=True)
    write_outcome(job.run, 1, RankOutcome(0, STOPPED, "n1", 30, "SIGUSR2"))
    job.end()
    assert read_history(job.run).attempts[0].cause is cause


def test_the_ranks_learn_when_the_limit_ends_the_job_whatever_the_clock(
    job: EndingJob, monkeypatch: pytest.MonkeyPatch
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
    clock = _deadlines(job.run, load.load(None, ["stage=traces"]), context)
    assert clock.ends_at == ends_at
    assert 80 < (clock.first_save_at or 0) - time.monotonic() <= 100


@pytest.mark.parametrize("skew", [-300, -40, 40, 300])
def test_an_attempt_that_was_killed_is_found_in_accounting_whatever_the_clock(
    job: EndingJob, monkeypatch: pytest.MonkeyPatch, skew: int
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


def test_the_end_of_a_reservation_is_a_time_that_ended_and_the_run_goes_on(job: EndingJob) -> None:
    """Slurm shows it as a time limit long before the limit; sacct says TIMEOUT."""
    stopped_by_term(job)
    shown = SHOWN.format(state="COMPLETING", end=500, preempted="None").replace(
        "Reason=None", "Reason=TimeLimit"
    )
    job.slurm_says(*[shown.replace("UNLIMITED", "01:00:00")] * 4)
    assert job.end() == 0
    (ended,) = read_history(job.run).attempts
    assert (ended.cause, ended.requeued) == (Cause.timeout, True)
    assert ended.detail.startswith("Slurm ended it 3200 s before its time limit: its reservation")
    assert job.asked_for == ["requeue 7"]


def test_a_node_failure_that_accounting_names_late_is_corrected_and_counts(
    job: EndingJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """slurmdbd is away at the next begin. Then every reader knows better, and the begin after records it."""
    load.save(load.load(None, ["stage=traces"]), job.run.config)
    stopped_by_term(job)
    job.slurm_says(*[_TAKEN_BACK] * 40)
    assert job.end() == 0
    sacct_says(job, "NODE_FAIL")
    answers = (job.bin / "sacct").read_text()
    (job.bin / "sacct").write_text("#!/bin/bash\necho 'Connection refused' >&2; exit 1\n")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert begin(job.run, "slurm", "7", ("n1",), 1) == 2
    assert read_history(job.run).attempts[0].cause is Cause.preempted, "all that its ranks knew"

    (job.bin / "sacct").write_text(answers)
    records = sacct_records("7")
    learn(job.run, records, time.time(), asked=time.time())  # as `report` does
    assert [a.cause for a in read_history(job.run).attempts] == [Cause.preempted, None], (
        "nothing is rewritten"
    )
    assert corrected_history(job.run).attempts[0].cause is Cause.node_fail
    assert read_situation(job.run).history.attempts[0].cause is Cause.node_fail

    assert reason_to_stop(corrected_history(job.run).attempts[:1], LimitsConfig(max_node_failures=0))
    (job.bin / "scontrol").write_text("#!/bin/bash\necho 'Invalid job id specified' >&2; exit 1\n")
    assert begin(job.run, "slurm", "8", ("n1",), 1) == 3
    ends = [e for e in read_run_events(job.run)[0] if e["event"] == "end" and e["attempt"] == 1]
    assert [e["cause"] for e in ends] == ["preempted", "node_fail"]


@pytest.mark.parametrize(("state", "cause"), [("CANCELLED by 1000", "cancelled"), ("CANCELLED", "cluster")])
def test_a_job_that_slurmctld_lost_was_cancelled_by_nobody(job: EndingJob, state: str, cause: str) -> None:
    """A cold start, `slurmctld -c`: it knows no job 7, and accounting closes the record."""
    load.save(load.load(None, ["stage=traces"]), job.run.config)
    (job.bin / "scontrol").write_text("#!/bin/bash\necho 'Invalid job id specified' >&2; exit 1\n")
    sacct_says(job, state)
    situation = read_situation(job.run)
    assert situation.state is (State.cancelled if cause == "cancelled" else State.failed)
    assert ("cancelled by a user" in situation.detail) is False
    record(job.run, "submitted", executor="slurm", job_id="8")
    assert begin(job.run, "slurm", "8", ("n1",), 1) == 2
    assert read_history(job.run).attempts[0].cause == cause


def test_the_same_words_on_a_second_node_hold_the_job(
    job: EndingJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """srun could not confirm its allocation: no crash is counted, however often."""
    load.save(load.load(None, ["stage=traces", "limits.max_crashes=0"]), job.run.config)
    job.slurm_says(*[RUNNING] * 99)
    error = "srun: error: Unable to confirm allocation for job 7: Socket timed out\n"
    left = []
    for attempt, node in enumerate(["n1", "n1", "n2"], start=1):
        if attempt > 1:
            monkeypatch.setenv("SLURM_RESTART_COUNT", str(attempt - 1))
            assert begin(job.run, "slurm", "7", (node,), 1) == attempt
        job.run.logs.mkdir(exist_ok=True)
        job.run.rank_log(attempt, 0).unlink(missing_ok=True)
        (job.run.logs / "slurm-7.out").write_text(f"demo: attempt {attempt} begins on {node}\n{error}")
        read_end, write_end = os.pipe()
        monkeypatch.setenv("R1HPC_REASON_FD", str(write_end))
        left.append(end_and_go_on(job.run, attempt, 1))
        os.close(write_end)
        reason = os.read(read_end, 999).decode()
    assert left == [0, 0, NOT_THE_NODE]
    assert reason.startswith(
        "srun started no rank: Unable to confirm allocation for job 7: Socket timed out; 3"
    )
    assert reason.endswith("attempts on n1, n2 ended like this")
    assert {a.cause for a in read_history(job.run).attempts} == {Cause.cluster}


def test_three_times_on_one_node_hold_the_job_too() -> None:
    """A job pinned to one node never meets a second one."""
    attempts = [
        Attempt(k, Cause.cluster, 0, 1, 1, 0, None, None, None, node_names=("n1",), detail=f"job {k} no")
        for k in (1, 2, 3)
    ]
    assert _reason_to_hold(attempts[:2]) is None
    assert _reason_to_hold(attempts) == "job 3 no; 3 attempts on n1 ended like this"
    other = replace(attempts[1], detail="another error")
    assert _reason_to_hold([attempts[0], other, attempts[2]]) is None
    assert reason_to_stop(attempts, LimitsConfig(max_crashes=0)) is None, "no crash, and no idle attempt"
