"""`r1hpc samples`: what a run wrote, and only what counts."""

import json
from pathlib import Path
from typing import Any

import pytest

from r1hpc import samples as command
from r1hpc.base.errors import UsageError
from r1hpc.base.files import append_record
from r1hpc.telemetry.records.evaluations import answers_path
from r1hpc.telemetry.records.samples import samples_path, some_wrong_first
from tests.recorded import RecordedRun


def add_sample(run: Any, step: int, attempt: int, completion: str, **others: Any) -> None:
    line = {"attempt": attempt, "is_lasting": True, "item": 7, "prompt": "2+2=", "expected": "4"}
    line |= {"completion": completion, "correct": "4" in completion, "reward": 0.25, "tokens": 3}
    append_record(samples_path(run, step), {**line, "terms": {"accuracy": 0.0}, "is_cut": False, **others})


def add_answer(path: Path, greedy: str, index: int = 0) -> None:
    line = {
        "index": index,
        "prompt": "3+3=",
        "expected": "6",
        "greedy": greedy,
        "greedy_correct": greedy == "6",
    }
    append_record(path, {**line, "greedy_length": 1, "num_samples": 4, "num_correct": 3, "mean_length": 1.0})


@pytest.fixture
def made(tmp_path: Path) -> RecordedRun:
    """Steps 1 to 25, of which the last ten are lost, then 16 to 40."""
    made = RecordedRun(tmp_path / "runs" / "demo", stage="rl")
    made.submit("local-1")
    made.attempt(1, 25, "node_fail", committed=15)
    made.attempt(16, 40, "finished", committed=40)
    add_sample(made.run, 10, 1, "5")
    add_sample(made.run, 10, 1, "4")
    add_sample(made.run, 20, 1, "of a step that was lost")
    add_sample(made.run, 40, 2, "44", terms={"accuracy": 1.0, "mine.py:taste": 0.5})
    add_answer(answers_path(made.run, 40), "7")
    summary = {"greedy": {"value": 0.0, "low": 0.0, "high": 1.0}, "num_items": 1}
    append_record(made.run.rl_evaluations, {"global_step": 40, "policy": "p", **summary})
    return made


def shown(capsys: pytest.CaptureFixture[str], *argv: str) -> list[dict[str, Any]]:
    assert command.main([*argv, "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["samples"]
    return found


def test_the_newest_completions_and_answers(made: RecordedRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([str(made.run.path)]) == 0
    text = capsys.readouterr().out
    for words in ("step 40, sampled for training", "mine.py:taste 0.5", "reward 0.250", "44"):
        assert words in text
    for words in ("step 40, evaluation", "WRONG, expected 6", "3 of 4 sampled answers correct"):
        assert words in text


def test_a_step_and_only_wrong_ones(made: RecordedRun, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(made.run.path)
    assert [each["completion"] for each in shown(capsys, run, "--step", "10")] == ["5", "4"]
    assert [each["completion"] for each in shown(capsys, run, "--step", "10", "--wrong")] == ["5"]
    assert command.main([run, "--step", "10", "--wrong"]) == 0
    assert "1 of 2" in capsys.readouterr().out


def test_completions_of_a_lost_attempt_are_not_shown(made: RecordedRun) -> None:
    with pytest.raises(UsageError, match=r"nothing of step 20; it has completions of steps 10, 40"):
        command.main([str(made.run.path), "--step", "20"])


def test_a_run_without_completions_is_told_which_stages_keep_some(tmp_path: Path) -> None:
    made = RecordedRun(tmp_path / "runs" / "plain")
    made.submit("local-1")
    made.attempt(1, 5, "finished", committed=5)
    with pytest.raises(UsageError, match="Stages rl, generate, traces and evaluate"):
        command.main([str(made.run.path)])


def test_stages_in_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = RecordedRun(tmp_path / "runs" / "parts", stage="generate")
    made.run.parts.mkdir()
    line = {"prompt": "1+1=", "completion": "2", "item": 3, "correct": True, "reward": 1.1, "tokens": 2}
    append_record(made.run.parts / "part-000000.jsonl", line)
    add_answer(made.run.parts / "part-000001.jsonl", "6")  # of stage evaluate, before its end
    kinds = [(each["kind"], each["completion"]) for each in shown(capsys, str(made.run.path))]
    assert kinds == [("generated", "2"), ("evaluation", "6")]


def test_no_escape_sequence_reaches_the_terminal(
    made: RecordedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    add_sample(made.run, 30, 2, "\x1b[2Jgone\nsecond line")
    assert command.main([str(made.run.path), "--step", "30"]) == 0
    text = capsys.readouterr().out
    assert "\x1b[2J" not in text
    assert "\n      second line" in text


def test_some_are_wrong(made: RecordedRun, capsys: pytest.CaptureFixture[str]) -> None:
    from r1hpc.telemetry.records.samples import Sample

    def sample(right: bool) -> Sample:
        return Sample("training", 1, 0, "", "", correct=right)

    many = [sample(True)] * 9 + [sample(False)] * 9
    assert [each.correct for each in some_wrong_first(many, 4)] == [False, False, True, True]
    assert [each.correct for each in some_wrong_first(many[8:], 4)] == [False, False, False, True]
    assert len(some_wrong_first(many[9:], 4)) == 4
