"""The attempt ledger: events are folded in the order in which they were written."""

from pathlib import Path
from typing import Any

import pytest

from r1hpc.base.files import append_record
from r1hpc.base.run_dir import RunDir
from r1hpc.telemetry.records.attempts import (
    Cause,
    gpu_hours_used,
    read_history,
    record,
)


def test_history_is_folded_from_events(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.create()
    record(run, "submitted", executor="slurm", job_id="7")
    record(run, "begin", attempt=1, job_id="7", node_names=["a", "b"], gpus=8, ranks=8, resumed_from=None)
    append_record(run.train_metrics, {"global_step": 1, "attempt": 1})
    append_record(run.train_metrics, {"global_step": 5, "attempt": 1})
    record(run, "end", attempt=1, cause="preempted", detail="", last_committed_step=5, requeued=True)
    record(run, "begin", attempt=2, job_id="7", node_names=["a"], gpus=4, ranks=4, resumed_from=5)
    history = read_history(run)
    first, second = history.attempts
    assert (first.cause, first.nodes, first.gpus, first.first_step, first.last_step) == (
        Cause.preempted,
        2,
        8,
        1,
        5,
    )
    assert second.cause is None
    assert second.last_committed_step == 5
    assert second.job_id == "7"


def test_a_torn_last_line_does_not_hide_the_rest(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.create()
    record(run, "submitted", job_id="1")
    with run.attempts.open("a") as file:
        file.write('{"event": "begin", "att')
    record(run, "submitted", job_id="2")
    assert [s["job_id"] for s in read_history(run).submissions] == ["1", "2"]


def events(run: RunDir, skew: float, *named: dict[str, Any]) -> RunDir:
    """A run with these events, ten seconds apart; the batch host's clock differs by `skew`."""
    run.create()
    for number, event in enumerate(named):
        is_login = event["event"] in ("submitted", "cancel_requested")
        record(run, **{"time": 1_790_000_000.0 + 10 * number + (0 if is_login else skew), **event})
    return run


def submitted(job_id: str) -> dict[str, Any]:
    return {"event": "submitted", "executor": "slurm", "job_id": job_id}


def began(attempt: int, job_id: str) -> dict[str, Any]:
    return {"event": "begin", "attempt": attempt, "executor": "slurm", "job_id": job_id, "gpus": 4}


CANCEL = {"event": "cancel_requested"}


@pytest.mark.parametrize("skew", [-300.0, -40.0, 0.0, 40.0, 300.0])
def test_a_clock_that_differs_does_not_change_what_came_first(tmp_path: Path, skew: float) -> None:
    stopped = {"event": "end", "attempt": 1, "cause": "stopped"}
    resumed = [submitted("7"), began(1, "7"), stopped, submitted("8")]
    history = read_history(events(RunDir(tmp_path / "resumed"), skew, *resumed))
    assert history.since_submission == ()
    assert not history.is_cancelled
    asked = [submitted("7"), began(1, "7"), CANCEL]
    history = read_history(events(RunDir(tmp_path / "cancelled"), skew, *asked))
    assert history.is_cancelled
    assert history.is_newer("cancel_requested", "begin")
    anew = [*asked, submitted("8"), began(2, "8")]
    history = read_history(events(RunDir(tmp_path / "anew"), skew, *anew))
    assert not history.is_cancelled
    assert not history.is_newer("cancel_requested", "begin")
    assert [a.attempt for a in history.since_submission] == [2]


@pytest.mark.parametrize("skew", [-300.0, 0.0, 300.0])
@pytest.mark.parametrize("first", [began(2, "8"), {"event": "not_begun", "job_id": "8", "cause": "refused"}])
def test_a_submission_that_is_written_late_comes_before_what_its_job_wrote(
    tmp_path: Path, first: dict[str, Any], skew: float
) -> None:
    late = [submitted("7"), began(1, "7"), CANCEL, first, submitted("8")]
    history = read_history(events(RunDir(tmp_path / "run"), skew, *late))
    assert not history.is_cancelled
    assert history.is_newer(first["event"], "submitted")
    assert [a.attempt for a in history.since_submission] == ([2] if first["event"] == "begin" else [])


def test_a_process_id_that_comes_again_is_another_submission(tmp_path: Path) -> None:
    again = [submitted("local-7"), began(1, "local-7"), CANCEL, submitted("local-7")]
    history = read_history(events(RunDir(tmp_path / "run"), 0.0, *again))
    assert not history.is_cancelled
    assert history.since_submission == ()


def test_no_attempt_is_shorter_than_nothing(tmp_path: Path) -> None:
    """It ended in the second of its begin, of which accounting knows the whole seconds."""
    end = {"event": "end", "attempt": 1, "cause": "preempted", "ended": 1_790_000_009.0, "inferred": True}
    history = read_history(events(RunDir(tmp_path / "run"), 0.5, submitted("7"), began(1, "7"), end))
    (attempt,) = history.attempts
    assert attempt.end == attempt.start
    assert gpu_hours_used(history, attempt.start - 300) == 0
