"""When a run must be left alone: limits per cause, idle attempts, fresh limits per submission."""

from dataclasses import replace
from pathlib import Path

import pytest

from r1hpc.attempt.limits import reason_to_stop
from r1hpc.base.run_dir import RunDir
from r1hpc.config.schema.run import LimitsConfig
from r1hpc.telemetry.records.attempts import Attempt, Cause, read_history, record


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
