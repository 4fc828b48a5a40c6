"""A real evaluation asks a test file whole, and no more held-out questions than there are, whatever was
submitted."""

import json
from pathlib import Path

import pytest

from r1hpc.base.files import read_json
from r1hpc.config.load import read
from r1hpc.telemetry.records.attempts import Cause
from r1hpc.telemetry.records.evaluations import read_answers
from tests.runs import submit, wait_over

pytestmark = pytest.mark.timeout(300)


def test_a_test_file_is_asked_whole_and_in_order_by_two_ranks(tmp_path: Path) -> None:
    questions = [f"{n // 10}+{n % 10}=" for n in range(30)]
    file = tmp_path / "test.jsonl"
    rows = [{"question": questions[n], "answer": str(n // 10 + n % 10)} for n in range(30)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = (
        *("stage=evaluate", f"evaluate.path={file}", "evaluate.num_items=30"),
        *("task.name=file", f"task.options={{path: {file}, template: '{{question}}'}}"),
    )
    run = submit(tmp_path, "run", *words, job="jobs/rl_smoke.yaml").run
    assert [attempt.cause for attempt in wait_over(run)] == [Cause.finished]
    _, answers = read_answers(run)
    assert [(a["index"], a["prompt"]) for a in answers] == list(enumerate(questions))
    summary = read_json(run.evaluation)
    assert (summary["num_items"], summary["num_questions"]) == (30, 30)
    shown = [line for line in run.transcripts.read_text().splitlines() if line.startswith("prompt  ")]
    assert [line.removeprefix("prompt  ") for line in shown] == questions[: len(shown)]  # none is right
    assert shown
    assert read(run.config).generate.items_per_part == 4  # of 30, by two ranks


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
