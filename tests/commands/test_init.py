"""init: from a model, a file of questions and a reward to a job that can be planned."""

import json
import shutil
from pathlib import Path

import pytest

from r1hpc import init
from r1hpc.base.errors import UsageError
from r1hpc.config import load

_MODEL = Path(__file__).parents[1] / "old_runs" / "edc0a14" / "model"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with questions and a reward, and a home."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    lines = [json.dumps({"problem": f"{n}+1=", "solution": str(n + 1)}) for n in range(50)]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    (tmp_path / "rewards.py").write_text(
        "def brevity(prompt, completion, answer, metadata):\n    return 0.0\n"
    )
    return tmp_path


def test_a_job_and_a_profile_are_written_and_found(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", str(_MODEL), "--data", "questions.jsonl", "--reward", "rewards.py:brevity"]
    assert init.main([*words, "--cluster", "mine", "--partition", "gpu", "--out", "own.yaml"]) == 0
    assert "r1hpc submit own.yaml --cluster mine --dry-run" in capsys.readouterr().out
    config = load.load("own.yaml", [], "mine")
    assert (config.stage, config.model.path) == ("rl", str(_MODEL))
    assert (config.task.question, config.task.answer) == ("problem", "solution")
    assert config.evaluate.num_items == 2, "as many as are held out of the 50"
    assert config.reward.terms == {"accuracy": 1.0, "format": 0.1, f"{place}/rewards.py:brevity": 0.1}
    assert (config.cluster.name, config.cluster.partition, config.cluster.gpus_per_node) == ("mine", "gpu", 4)
    with pytest.raises(UsageError, match=r"own.yaml exists: name another file with --out"):
        init.main(["--out", "own.yaml"])


def test_it_asks_a_person_until_the_answer_will_do(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(["nowhere", str(_MODEL), "questions.jsonl", "", "", "many", "0"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: next(answers))
    assert init.main([]) == 0
    config = load.load("job.yaml")
    assert config.reward.terms["accuracy"] == 1.0
    assert (config.resources.gpus_per_node, config.train.precision.value) == (0, "fp32")
    assert not (place / "home").exists()


def test_the_job_fits_the_model(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """GPT-2 folders have dropout and learned positions; RL would refuse the first and not fit the second."""
    shutil.copytree(_MODEL, place / "model")
    stated = json.loads((place / "model/config.json").read_text()) | {"n_positions": 100, "resid_pdrop": 0.1}
    (place / "blob").write_text(json.dumps(stated))
    (place / "model/config.json").unlink()
    (place / "model/config.json").symlink_to(place / "blob")
    words = ["--model", "model", "--data", "questions.jsonl"]
    assert init.main(words) == 0
    config = load.load("job.yaml")
    assert config.model.config["resid_pdrop"] == 0
    assert config.model.path == str(place / "model"), (
        "not where a cache keeps the file that config.json links to"
    )
    assert (config.rollout.max_prompt_length, config.rollout.max_completion_length) == (33, 67)


def test_a_profile_that_is_there_is_not_written_again(place: Path) -> None:
    words = ["--model", str(_MODEL), "--data", "questions.jsonl"]
    assert init.main([*words, "--cluster", "example_a100"]) == 0
    with pytest.raises(UsageError, match="there is no folder nodir"):
        init.main([*words, "--cluster", "mine", "--out", "nodir/job.yaml"])
    assert not (place / "home").exists()


@pytest.mark.parametrize("line", ["[1,2]", '"abc"'])
def test_a_first_line_that_is_no_object_is_refused(line: str, place: Path) -> None:
    (place / "questions.jsonl").write_text(line)
    with pytest.raises(UsageError, match="its first line is no JSON object"):
        init.main(["--model", str(_MODEL), "--data", "questions.jsonl"])


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        ([], "--model is missing: model, a Hugging Face folder"),
        (["--model", "nowhere"], "there is no .*nowhere/config.json"),
        (
            ["--model", str(_MODEL), "--data", "questions.jsonl", "--question", "q"],
            "has no column q, but problem",
        ),
        (["--model", str(_MODEL), "--data", "questions.jsonl", "--reward", "no.py:f"], "there is no .*no.py"),
        (
            ["--model", str(_MODEL), "--data", "questions.jsonl", "--reward", "rewards.py"],
            "with one of brevity",
        ),
        (
            ["--model", str(_MODEL), "--data", "questions.jsonl", "--reward", "rewards.py:b"],
            "with one of brevity",
        ),
        (["--model", str(_MODEL), "--data", "rewards.py", "--cluster", "a/b"], "--cluster"),
    ],
)
def test_what_is_missing_is_refused(words: list[str], refused: str, place: Path) -> None:
    with pytest.raises(UsageError, match=refused):
        init.main(words)
    assert not (place / "job.yaml").exists()
