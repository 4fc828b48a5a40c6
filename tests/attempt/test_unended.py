"""What the end of an attempt says of its progress."""

from dataclasses import replace
from pathlib import Path

import pytest

from r1hpc.attempt.limits import reason_to_stop
from r1hpc.attempt.state.unended import steps_for_the_end
from r1hpc.config import load
from r1hpc.config.schema.run import LimitsConfig
from r1hpc.telemetry.records.attempts import Attempt, Cause
from tests.recorded import RecordedRun


@pytest.mark.parametrize("cause", [Cause.crash, Cause.hang, Cause.unknown, Cause.preempted])
def test_a_server_that_fails_has_made_no_progress_however_often_it_answered(
    tmp_path: Path, cause: Cause
) -> None:
    """One that dies of a request is asked again by its client, each time after it was ready."""
    made = RecordedRun(tmp_path / "server")
    config = load.load(None, ["stage=serve", "model.path=/m", "resources.gpus_per_node=0"])
    made.submit("7", "slurm")
    attempts: list[Attempt] = []
    for number in range(1, 6):
        made.begin(resumed_from=number - 1)
        made.steps(number, number)
        steps = steps_for_the_end(made.run, config, number, cause)
        attempt = Attempt(number, cause, 0.0, 10.0, 1, 0, 1, number, None, resumed_from=number - 1)
        attempts.append(replace(attempt, **steps))  # type: ignore[arg-type]
    stopped = reason_to_stop(attempts, LimitsConfig(max_hangs=1)) is not None
    assert stopped is (cause is not Cause.preempted)
