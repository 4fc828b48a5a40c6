"""A real evaluation asks no more held-out questions than there are, whatever was submitted."""

from pathlib import Path

import pytest

from r1hpc.base.files import read_json
from r1hpc.telemetry.attempts import Cause
from tests.runs import submit, wait_over

pytestmark = pytest.mark.timeout(300)


def test_a_stage_refuses_more_questions_than_there_are_before_it_asks(tmp_path: Path) -> None:
    words = ("stage=evaluate", "evaluate.num_items=8", "resources.ranks_per_node=1", "task.seed=1")
    run = submit(tmp_path, "run", *words, job="jobs/rl_smoke.yaml").run
    assert [attempt.cause for attempt in wait_over(run)] == [Cause.finished]
    assert read_json(run.evaluation)["num_items"] == 8
    # As a run of before would be that is submitted again.
    run.config.write_text(run.config.read_text().replace("num_items: 8", "num_items: 2000"))
    run.finished.unlink()
    submit(tmp_path, "run", "--resume")
    last = wait_over(run)[-1]
    assert last.cause is Cause.refused
    assert "evaluate.num_items is 2000, but task chain_sum has no more than" in last.detail
