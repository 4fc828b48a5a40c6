"""What a run asks stays the same over its attempts: answers that are kept are to the same questions."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from r1hpc.base.errors import UsageError
from r1hpc.base.files import read_json
from r1hpc.base.rundir import RunDir
from r1hpc.config import plugins
from r1hpc.telemetry.attempts import Cause
from r1hpc.telemetry.evaluations import read_evaluations
from r1hpc.train.asked import refuse_other_questions
from tests.runs import submit, wait_over
from tests.train.test_generate import _Rank, job_of


def test_the_first_attempt_says_what_is_asked_and_no_other_asks_anything_else(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    job = job_of(_Rank(run, 0), run)
    record = run.parts / "questions.json"
    for _ in range(2):
        refuse_other_questions(job, record, "task 1", since="the first part was made")
    with pytest.raises(UsageError, match="changed since the first part was made, from task 1 to task 2: put"):
        refuse_other_questions(job, record, "task 2", since="the first part was made")


def _write(path: Path, first: int) -> None:
    rows: list[dict[str, Any]] = [
        {"question": f"{n}=", "answer": str(n % 10)} for n in range(first, first + 8)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.timeout(300)
def test_rl_does_not_evaluate_on_another_test_file_after_a_resume(tmp_path: Path) -> None:
    """The submission says so, and for a run whose files were not noted the ranks do."""
    folder = tmp_path / "tests"
    folder.mkdir()
    _write(folder / "test.jsonl", 100)
    sets = (
        f"evaluate.sets={{own: {{path: {folder}, template: '{{question}}', judge: exact, num_items: null}}}}"
    )
    words = ("resources.ranks_per_node=1", "evaluate.num_items=null", "evaluate.every=0", "train.num_steps=2")
    run = submit(tmp_path, "run", sets, *words, "checkpoint.save_every=2", job="jobs/rl_smoke.yaml").run
    assert [attempt.cause for attempt in wait_over(run)] == [Cause.finished]
    assert set(read_evaluations(run)) == {0, 2}
    record = run.metrics / "evaluated.json"
    assert read_json(record)["task"].startswith("benchmarks")
    _write(folder / "test.jsonl", 200)
    with pytest.raises(AssertionError, match=r"tests \(test\.jsonl\) has changed since this run began"):
        submit(tmp_path, "run", "--resume", "train.num_steps=4")
    (run.code / plugins.FOLDER / "files.json").unlink()
    submit(tmp_path, "run", "--resume", "train.num_steps=4")
    last = wait_over(run)[-1]
    assert last.cause is Cause.refused
    assert "the questions have changed since the first evaluation" in last.detail
    record.unlink()  # as a run of before
    submit(tmp_path, "run", "--resume", "train.num_steps=4")
    assert wait_over(run)[-1].cause is Cause.finished
    assert set(read_evaluations(run)) == {0, 2, 4}
    shutil.rmtree(run.path)
