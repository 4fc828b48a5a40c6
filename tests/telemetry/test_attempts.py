"""The attempt ledger: folding, fresh limits per submission, and when a run must be left alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from r1hpc.base.files import append_record
from r1hpc.base.run_dir import RunDir
from r1hpc.config.schema.run import LimitsConfig
from r1hpc.telemetry.records.attempts import (
    Attempt,
    Cause,
    gpu_hours_used,
    read_history,
    reason_to_stop,
    record,
)


def ended(*causes: Cause, progress: bool = True) -> list[Attempt]:
    """Attempts that ended so, each with a new checkpoint when `progress`."""
    return [
        Attempt(
            attempt=k,
            cause=cause,
            start=k,
            end=k + 1,
            nodes=1,
            gpus=0,
            first_step=1,
            last_step=2,
            last_committed_step=k * 10 if progress else None,
            resumed_from=(k - 1) * 10 or None if progress else None,
        )
        for k, cause in enumerate(causes, 1)
    ]


def stuck(*causes: Cause, at: int) -> list[Attempt]:
    """Attempts that resumed from step `at` and committed nothing."""
    return [replace(a, resumed_from=at, last_committed_step=at) for a in ended(*causes)]


def kept(attempts: list[Attempt], *numbers: int) -> list[Attempt]:
    """The attempts with so many finished pieces beyond their checkpoint."""
    return [replace(attempt, kept=number) for attempt, number in zip(attempts, numbers, strict=True)]


@pytest.mark.parametrize(
    ("attempts", "limits", "word"),
    [
        pytest.param([], LimitsConfig(), None, id="nothing yet"),
        pytest.param(ended(*[Cause.preempted] * 50), LimitsConfig(), None, id="preemptions have no limit"),
        pytest.param(ended(Cause.crash), LimitsConfig(), None, id="one crash is forgiven"),
        pytest.param(
            ended(Cause.crash, Cause.crash, progress=False), LimitsConfig(), "max_crashes", id="two are not"
        ),
        pytest.param(
            ended(*[Cause.crash] * 9), LimitsConfig(), None, id="with progress between them they are"
        ),
        pytest.param(
            [*ended(Cause.crash), *stuck(Cause.crash, at=10)],
            LimitsConfig(),
            "max_crashes",
            id="twice at the same place",
        ),
        pytest.param(
            [*stuck(Cause.crash, at=0), *ended(Cause.preempted), *stuck(Cause.crash, at=10)],
            LimitsConfig(),
            None,
            id="a crash before the last progress is forgotten",
        ),
        pytest.param(
            ended(Cause.crash, Cause.preempted, Cause.preempted),
            LimitsConfig(),
            None,
            id="each cause by itself",
        ),
        pytest.param(ended(Cause.oom), LimitsConfig(), "max_ooms", id="memory does not grow by itself"),
        pytest.param(ended(Cause.oom), LimitsConfig(max_ooms=-1), None, id="unlimited"),
        pytest.param(ended(*[Cause.node_fail] * 50), LimitsConfig(), None, id="node failures with progress"),
        pytest.param(
            ended(*[Cause.node_fail] * 6, progress=False),
            LimitsConfig(),
            "max_node_failures",
            id="node failures",
        ),
        pytest.param(
            [replace(a, first_step=None) for a in ended(*[Cause.preempted] * 50, progress=False)],
            LimitsConfig(),
            None,
            id="preempted in start-up",
        ),
        pytest.param(
            [replace(a, first_step=None) for a in ended(*[Cause.hang] * 3, progress=False)],
            LimitsConfig(),
            "no new checkpoint",
            id="not started, and not the cluster's fault",
        ),
        pytest.param(
            [
                *ended(*[Cause.preempted] * 2, progress=False),
                *[replace(a, first_step=None) for a in ended(*[Cause.preempted] * 3, progress=False)],
                *ended(Cause.preempted, progress=False),
            ],
            LimitsConfig(),
            "in the last 3 attempts",
            id="start-up between attempts without progress is passed over",
        ),
        pytest.param(ended(Cause.cancelled), LimitsConfig(), "over", id="cancelled"),
        pytest.param(ended(Cause.stopped), LimitsConfig(), "over", id="stopped"),
        pytest.param(ended(Cause.refused), LimitsConfig(), "over", id="refused"),
        pytest.param(
            ended(*[Cause.preempted] * 3, progress=False),
            LimitsConfig(),
            "no new checkpoint",
            id="no progress",
        ),
        pytest.param(ended(*[Cause.preempted] * 2, progress=False), LimitsConfig(), None, id="not yet"),
        pytest.param(
            kept(ended(*[Cause.preempted] * 5, progress=False), 4, 8, 12, 16, 20),
            LimitsConfig(),
            None,
            id="a rollout that grows",
        ),
        pytest.param(
            kept(ended(*[Cause.preempted] * 5, progress=False), 4, 8, 8, 8, 8),
            LimitsConfig(),
            "no new checkpoint",
            id="a rollout that does not grow",
        ),
    ],
)
def test_when_a_run_is_left_alone(attempts: list[Attempt], limits: LimitsConfig, word: str | None) -> None:
    reason = reason_to_stop(attempts, limits)
    assert reason is None if word is None else word in (reason or "")


def test_a_stage_in_parts_is_told_of_its_parts() -> None:
    reason = reason_to_stop(ended(*[Cause.timeout] * 3, progress=False), LimitsConfig(), in_parts=True) or ""
    assert reason.startswith(
        "no finished part in the last 3 attempts (limits.max_attempts_without_checkpoint=3)"
    )
    assert "begin a run with smaller parts (generate.items_per_part)" in reason
    assert "checkpoint.save_every" not in reason


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


def test_asking_again_gives_fresh_limits(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.create()
    record(run, "submitted", job_id="1")
    for attempt in (1, 2):
        record(run, "begin", attempt=attempt, job_id="1", node_names=["a"])
        record(run, "end", attempt=attempt, cause="crash", last_committed_step=None)
    assert reason_to_stop(read_history(run).since_submission, LimitsConfig()) is not None
    record(run, "submitted", job_id="2")
    assert reason_to_stop(read_history(run).since_submission, LimitsConfig()) is None


def test_an_attempt_that_lasted_longer_than_any_start_up_counts_without_a_step() -> None:
    """A first rollout that is preempted for ever, before one of its groups is finished."""
    early = [replace(a, first_step=None) for a in stuck(*[Cause.preempted] * 5, at=0)]
    assert reason_to_stop(early, LimitsConfig()) is None
    late = [replace(a, end=a.start + 7200) for a in early]
    assert "no new checkpoint in the last 5 attempts" in (reason_to_stop(late, LimitsConfig()) or "")
    assert reason_to_stop(kept(late, 1, 2, 3, 4, 5), LimitsConfig()) is None


def test_what_was_loaded_counts_and_not_the_newest_folder(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.create()
    record(run, "begin", attempt=1, resumed_from=100)
    record(run, "end", attempt=1, cause="crash", resumed_from=80, last_committed_step=90)
    (attempt,) = read_history(run).attempts
    assert (attempt.resumed_from, attempt.last_committed_step) == (80, 90)
    assert reason_to_stop([attempt], LimitsConfig(max_attempts_without_checkpoint=1)) is None


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
