"""Every row of the table that decides why an attempt ended."""

from dataclasses import replace
from pathlib import Path

import pytest

from r1hpc.attempt.state.cause import (
    FAILED,
    FINISHED,
    HANG,
    STOPPED,
    Evidence,
    RankOutcome,
    SchedulerView,
    decide,
    failures_in_logs,
    same_words,
    unstarted_by_srun,
)
from r1hpc.base.run_dir import RunDir
from r1hpc.telemetry.records.attempts import Cause


def said(
    kind: str, rank: int = 0, reason: str = "", cause: str | None = None, detail: str = ""
) -> RankOutcome:
    return RankOutcome(rank, kind, f"n{rank}", reason=reason, cause=cause, detail=detail)


def view(*states: str, preempted: bool = False, left: float | None = 1000.0) -> SchedulerView:
    return SchedulerView(frozenset(states), preempted, left)


STOPPED_BY_TERM = [said(STOPPED, 0, "SIGTERM"), said(STOPPED, 1, "SIGTERM")]
STOPPED_BY_USR2 = [said(STOPPED, 0, "SIGUSR2"), said(STOPPED, 1)]


@pytest.mark.parametrize(
    ("evidence", "cause"),
    [
        pytest.param(Evidence(2, [said(FINISHED)], 0), Cause.finished, id="finished"),
        pytest.param(
            Evidence(2, [said(FINISHED), said(FAILED, 1)], 1),
            Cause.finished,
            id="one fell over on its way out",
        ),
        pytest.param(
            Evidence(2, [said(FAILED, detail="OSError: disk full"), said(FINISHED, 1)], 1),
            Cause.crash,
            id="rank 0 could not write what the run leaves",
        ),
        pytest.param(
            Evidence(2, [said(FINISHED, 1)], 137, view("PREEMPTED")),
            Cause.preempted,
            id="rank 0 was killed before it wrote what the run leaves",
        ),
        pytest.param(
            Evidence(
                2, [said(FAILED, detail="RuntimeError: Connection closed by peer")], 253, view("RUNNING")
            ),
            Cause.oom,
            id="a task was killed for memory, which Slurm says of the task alone",
        ),
        pytest.param(Evidence(2, [said(STOPPED, reason="STOP file")], 0), Cause.stopped, id="STOP file"),
        pytest.param(
            Evidence(2, STOPPED_BY_TERM, 0, view("RUNNING")), Cause.preempted, id="SIGTERM in the grace time"
        ),
        pytest.param(
            Evidence(2, STOPPED_BY_TERM, 0, view("RUNNING", preempted=True, left=5)),
            Cause.preempted,
            id="preempted with little time left",
        ),
        pytest.param(
            Evidence(2, STOPPED_BY_TERM, 0, view("PENDING", "COMPLETING")),
            Cause.preempted,
            id="already requeued by Slurm",
        ),
        pytest.param(
            Evidence(2, STOPPED_BY_USR2, 0, view("RUNNING", left=80), signal_lead_s=60),
            Cause.timeout,
            id="warned of the time limit",
        ),
        pytest.param(
            Evidence(2, STOPPED_BY_USR2, 0, view("RUNNING", left=500), signal_lead_s=60),
            Cause.preempted,
            id="USR2 long before the limit: send_user_signal",
        ),
        pytest.param(
            Evidence(2, STOPPED_BY_TERM, 0, view("RUNNING", left=100), signal_lead_s=60),
            Cause.preempted,
            id="preempted shortly before the limit",
        ),
        pytest.param(
            Evidence(2, STOPPED_BY_TERM, 0, view("CANCELLED", "COMPLETING")), Cause.cancelled, id="scancel"
        ),
        pytest.param(
            Evidence(2, STOPPED_BY_TERM, 0, cancel_requested=True), Cause.cancelled, id="r1hpc cancel"
        ),
        pytest.param(
            Evidence(2, [said(FAILED, 0, cause="crash", detail="Connection closed")], 1, view("NODE_FAIL")),
            Cause.node_fail,
            id="a node went down and its peers failed",
        ),
        pytest.param(Evidence(2, [], 0, view("TIMEOUT")), Cause.timeout, id="killed at the limit"),
        pytest.param(Evidence(2, [], 0, view("PREEMPTED")), Cause.preempted, id="killed by preemption"),
        pytest.param(Evidence(2, [], 137, view("OUT_OF_MEMORY")), Cause.oom, id="cgroup OOM"),
        pytest.param(
            Evidence(2, [said(FAILED, 1, cause="oom", detail="CUDA out of memory"), said(FAILED, 0)], 1),
            Cause.oom,
            id="CUDA OOM on one rank",
        ),
        pytest.param(
            Evidence(2, [said(FAILED, cause="refused", detail="wrong dataset")], 1),
            Cause.refused,
            id="refused",
        ),
        pytest.param(Evidence(2, [said(HANG, detail="60 s in step 3")], 75), Cause.hang, id="hang"),
        pytest.param(
            Evidence(2, [said(HANG, 1)], 75, by_srun=said(FAILED, detail="Killed, says srun")),
            Cause.crash,
            id="a rank was killed, and Slurm did not end the other, which waited for it",
        ),
        pytest.param(
            Evidence(2, [said(HANG), said(FAILED, 1, detail="Connection reset by peer")], 75),
            Cause.hang,
            id="hang and a peer that lost the connection",
        ),
        pytest.param(
            Evidence(2, [said(FAILED, cause="crash")], 1, view("RUNNING")), Cause.crash, id="exception"
        ),
        pytest.param(Evidence(2, [], 139, view("RUNNING")), Cause.crash, id="segmentation fault"),
        pytest.param(Evidence(2, [], 1), Cause.crash, id="nothing at all"),
        pytest.param(
            Evidence(2, [said(FAILED, cause="crash", detail="ValueError: bad")], 0, view("REQUEUED")),
            Cause.crash,
            id="our shell asked for the requeue after an exception",
        ),
        pytest.param(
            Evidence(2, [said(FAILED, cause="crash", detail="Connection closed")], 0, view("REQUEUED")),
            Cause.preempted,
            id="requeued from outside",
        ),
        pytest.param(
            Evidence(2, STOPPED_BY_TERM, 143, view("NODE_FAIL")),
            Cause.node_fail,
            id="a node went down and its survivors got SIGTERM",
        ),
        pytest.param(
            Evidence(2, [], None, view("REQUEUED"), requeued_by_us=True),
            Cause.crash,
            id="our shell asked for the requeue, and nothing says why",
        ),
        pytest.param(
            Evidence(2, STOPPED_BY_TERM, 0, view("REQUEUED"), requeued_by_us=True),
            Cause.preempted,
            id="our shell asked for the requeue after a preemption",
        ),
        pytest.param(
            Evidence(2, [], 1, view("RUNNING"), in_logs=[said(FAILED, 1, cause="oom", detail="CUDA")]),
            Cause.oom,
            id="no memory, by the log alone",
        ),
        pytest.param(
            Evidence(
                2, STOPPED_BY_TERM[:1], 0, view("RUNNING"), in_logs=[said(FAILED, 1, detail="ValueError")]
            ),
            Cause.preempted,
            id="an error in the log of a rank that the preemption killed",
        ),
        pytest.param(Evidence(2, [], 143), Cause.preempted, id="SIGTERM while Python was starting"),
        pytest.param(Evidence(2, [], 140), Cause.preempted, id="SIGUSR2 while Python was starting"),
        pytest.param(
            Evidence(2, [], 140, SchedulerView(seconds_left=200), signal_lead_s=180),
            Cause.timeout,
            id="SIGUSR2 while Python was starting, near the time limit",
        ),
    ],
)
def test_the_cause_is_what_the_evidence_says(evidence: Evidence, cause: Cause) -> None:
    assert decide(evidence)[0] is cause


def test_the_rank_that_was_stopped_is_named() -> None:
    hung = [said(HANG, 0, detail="9 s in step 4"), said(HANG, 2, detail="9 s in step 4")]
    _, detail = decide(Evidence(3, hung, 137))
    assert "nothing at all from rank 1" in detail


def test_the_first_failure_is_named_and_not_its_echo() -> None:
    outcomes = [
        said(FAILED, 0, cause="crash", detail="RuntimeError: Connection closed by peer"),
        said(FAILED, 1, cause="crash", detail="ValueError: bad"),
    ]
    assert "rank 1 on n1: ValueError: bad" in decide(Evidence(2, outcomes, 1))[1]


def test_a_signal_that_ended_the_step_is_named() -> None:
    assert "SIGSEGV" in decide(Evidence(1, [], 139))[1]


def test_a_cancelled_run_stays_cancelled_whatever_the_ranks_say() -> None:
    evidence = Evidence(2, [said(FAILED, cause="crash")], 143, view("CANCELLED"))
    assert decide(evidence)[0] is Cause.cancelled
    assert decide(replace(evidence, scheduler=view("RUNNING")))[0] is Cause.crash


@pytest.mark.parametrize(
    ("log", "detail"),
    [
        (
            "step 4\ncould not write the outcome of rank 1: [Errno 28] No space left on device: 'x'\n",
            "[Errno 28]",
        ),
        ("error: Disk quota exceeded: /runs/a\n", "Disk quota exceeded: /runs/a"),
        (
            "Traceback (most recent call last):\n  File x\nrun.own.BadError: why\nsrun: bye\n",
            "run.own.BadError: why",
        ),
        ("step 4  loss 3.1\n", None),
    ],
)
def test_a_rank_without_an_outcome_is_explained_by_its_log(
    tmp_path: Path, log: str, detail: str | None
) -> None:
    run = RunDir(tmp_path)
    run.attempt_logs(1).mkdir(parents=True)
    run.rank_log(1, 3).write_text(log)
    found = failures_in_logs(run, 1, 4, ("n1", "n2"), {0, 1, 2})
    assert [(o.rank, o.node, o.kind) for o in found] == ([(3, "n2", FAILED)] if detail else [])
    if detail:
        cause, said = decide(Evidence(4, [], 1, view("REQUEUED"), in_logs=found))
        assert (cause, said.startswith("rank 3 on n2: ")) == (Cause.crash, True)
        assert detail in said


_ROOT = "/scratch/runs"
_FULL = f"CheckpointWriteError: cannot write checkpoint file {_ROOT}/a/x: No space left on device (0 B free)"


@pytest.mark.parametrize(
    ("evidence", "cause"),
    [
        (Evidence(1, [said(FAILED, detail=_FULL)], 1, run_root=_ROOT), Cause.cluster),
        (Evidence(1, [said(FAILED, detail=_FULL)], 1, run_root="/elsewhere"), Cause.crash),
        (
            Evidence(
                1, [said(FAILED, detail="OSError: [Errno 30] Read-only file system")], 1, run_root=_ROOT
            ),
            Cause.crash,  # of whatever disk
        ),
        (
            Evidence(
                1,
                [said(FAILED, detail="OSError: [Errno 5] Input/output error")],
                1,
                run_root=_ROOT,
                refusal="Input/output error",
            ),
            Cause.cluster,
        ),
        # Full to the last byte: neither outcome nor log.
        (Evidence(2, [], 1, run_root=_ROOT, refusal="No space left on device"), Cause.cluster),
        (
            Evidence(2, [], 1, unstarted="Unable to confirm allocation for job 7: Socket timed out"),
            Cause.cluster,
        ),
        (
            Evidence(2, [], 1, view("CANCELLED"), unstarted="Unable to confirm allocation for job 7"),
            Cause.cancelled,
        ),
        (
            Evidence(
                2,
                [],
                1,
                in_logs=[said(FAILED, 1, detail="slurmstepd: error: execve(): /x/python: No such file")],
            ),
            Cause.cluster,
        ),
        (
            Evidence(1, [said(FAILED, detail="RuntimeError: DefaultCPUAllocator: can't allocate memory")], 1),
            Cause.oom,
        ),
        (Evidence(1, [said(FAILED, detail="OSError: [Errno 12] Cannot allocate memory")], 1), Cause.oom),
    ],
)
def test_what_neither_the_run_nor_a_node_did(evidence: Evidence, cause: Cause) -> None:
    assert decide(evidence)[0] is cause


@pytest.mark.parametrize("has_log", [False, True])
def test_a_silent_slurmctld_at_srun_starts_no_rank(tmp_path: Path, has_log: bool) -> None:
    """Recorded with Slurm 24.11."""
    run = RunDir(tmp_path / "demo")
    run.attempt_logs(3).mkdir(parents=True)
    (run.logs / "slurm-7.out").write_text(
        "demo: attempt 3 begins on n1\n"
        "srun: error: Unable to confirm allocation for job 7: Socket timed out on send/recv operation\n"
        "srun: Check SLURM_JOB_ID environment variable. Expired or invalid job 7\n"
    )
    if has_log:
        run.rank_log(3, 0).touch()
    words = unstarted_by_srun(run, 3, "7")
    assert words.startswith("" if has_log else "Unable to confirm allocation for job 7: Socket timed out")
    assert bool(words) is not has_log
    assert same_words("srun: job 7: no") == same_words("srun: job 8: no") != same_words("srun: other")
