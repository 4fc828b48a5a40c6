"""compare: the same questions are paired, and the verdict is that of one test."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from r1hpc.base.errors import UsageError
from r1hpc.base.run_dir import RunDir
from r1hpc.compare import main
from r1hpc.config import load
from r1hpc.telemetry.records.evaluations import answers_path
from tests.recorded import RecordedRun


def line(index: int, num_correct: int, greedy: bool, **other: Any) -> dict[str, Any]:
    return {
        "index": index,
        "prompt": f"question <{index}>",
        "expected": "7",
        "greedy": f"answer <b>{greedy}</b>",
        "greedy_correct": greedy,
        "greedy_length": 10,
        "num_samples": 4,
        "num_correct": num_correct,
        "mean_length": 20.0,
    } | other


@pytest.fixture
def rl(tmp_path: Path) -> RunDir:
    """An RL run that was evaluated on 200 questions after steps 0 and 60, with ten points of gain."""
    run = RunDir(tmp_path / "grpo")
    run.create()
    load.save(load.load("rl_smoke"), run.config)
    rng = random.Random(3)
    ease = [rng.random() * 0.9 for _ in range(200)]
    for step, gain in ((0, 0.0), (60, 0.1)):
        answers = [
            line(n, sum(rng.random() < p + gain for _ in range(4)), rng.random() < p + gain)
            for n, p in enumerate(ease)
        ]
        answers_path(run, step).write_text("".join(json.dumps(each) + "\n" for each in answers))
        with run.rl_evaluations.open("a") as file:
            file.write(json.dumps({"global_step": step}) + "\n")
    return run


def test_the_run_of_a_script_is_compared_by_report(tmp_path: Path) -> None:
    made = RecordedRun(tmp_path / "own", stage="script")
    with pytest.raises(UsageError, match=r"r1hpc.report --compare"):
        main([str(made.run.path), str(made.run.path)])


def test_a_better_step_is_told_and_shown(rl: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"{rl.path}@0", f"{rl.path}@60"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "200 questions in both" in said
    assert "B is better, by" in said
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["verdict"], found["is_sampled"], found["num_questions"]) == ("b", True, 200)
    accuracy = found["accuracy"]
    assert 0 < accuracy["low"] < accuracy["b"] - accuracy["a"] < accuracy["high"]
    assert found["b"] == "grpo@60"


def test_a_run_and_itself_are_not_told_apart(rl: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(rl.path), f"{rl.path}@60", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["verdict"], found["p_value"], found["disagreements"]) == (None, 1.0, 0)
    assert main([str(rl.path), str(rl.path)]) == 0
    assert "no difference" in capsys.readouterr().out


def test_what_cannot_be_compared_is_refused(rl: RunDir, capsys: pytest.CaptureFixture[str]) -> None:

    for words, what in (
        (f"{rl.path}@7", "grpo has no evaluation after step 7; it was evaluated after steps 0, 60"),
        (f"{rl.path}@x", "a step is a number"),
    ):
        with pytest.raises(UsageError, match=what):
            main([words, str(rl.path)])
    answers_path(rl, 0).write_text(json.dumps(line(0, 1, True, prompt="another question")) + "\n")
    with pytest.raises(UsageError, match="no question was asked of both"):
        main([f"{rl.path}@0", str(rl.path)])


def test_a_number_that_disagrees_with_the_verdict_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The samples decide and are alike; greedy answers fall from 24 % to 7 %."""
    run = RunDir(tmp_path / "grpo")
    run.create()
    load.save(load.load("rl_smoke"), run.config)
    for step, right in ((0, 24), (60, 7)):
        lines = [line(n, 1, n < right, task="gsm" if n % 2 else "math") for n in range(100)]
        answers_path(run, step).write_text("".join(json.dumps(each) + "\n" for each in lines))
        with run.rl_evaluations.open("a") as file:
            file.write(json.dumps({"global_step": step}) + "\n")
    assert main([f"{run.path}@0", f"{run.path}@60"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "These differ too: greedy accuracy 0.240 to 0.070" in said
    assert "gsm" in said
    assert "math" in said
    assert main([f"{run.path}@0", f"{run.path}@60", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["tasks"]) == {"gsm", "math"}
