"""settings: what a run is given, and the reference of every key."""

import json
from pathlib import Path

import pytest

from r1hpc import settings
from r1hpc.base.errors import UsageError
from r1hpc.config import load
from r1hpc.config.reference import reference
from r1hpc.submission.chain.file import Definition, Stage, save_definition
from r1hpc.submission.chain.folder import ChainDir


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A job file that includes a preset of its own."""
    (tmp_path / "preset.yaml").write_text("train: {lr: 0.1, num_steps: 7}\ndeepspeed: {extra: {a: 1}}\n")
    path = tmp_path / "job.yaml"
    path.write_text("include: [preset]\ntrain: {num_steps: 9}\nresources: {sbatch: {}}\n")
    return path


def test_the_command_prints_what_was_set(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert settings.main([str(job), "--set", "train.seed=3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        "train.num_steps", "train.lr", "train.seed", "deepspeed.extra", "resources.sbatch",
    ]  # fmt: skip
    assert settings.main(["--reference"]) == 0
    assert capsys.readouterr().out == reference()


def test_a_chain_shows_the_settings_of_each_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chain = ChainDir(tmp_path / "r1")
    sft, grpo = load.load(None, ["stage=sft"]), load.load(None, ["stage=rl", "train.lr=1e-3"])
    chain.stage("sft").create()
    save_definition(Definition("r1.yaml", "", (Stage("sft", (), sft), Stage("grpo", ("sft",), grpo))), chain)
    load.save(load.load(None, ["stage=sft", "train.seed=3"]), chain.stage("sft").config)  # given since
    words = ["r1", "--run-root", str(tmp_path), "--set"]
    assert settings.main([*words, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["sft"]["train.seed"] == {"value": 3, "source": "config.yaml"}
    assert shown["grpo"]["train.lr"] == {"value": 0.001, "source": "chain.yaml"}
    assert settings.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines.index("sft") < lines.index("grpo") < len(lines) - 1
    assert settings.main(["r1/sft", *words[1:]]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [
        ["stage", "sft"], ["train.seed", "3"],
    ]  # fmt: skip
    with pytest.raises(UsageError, match=r"r1 has been submitted: leave out train.lr=1"):
        settings.main([*words, "train.lr=1"])


@pytest.mark.parametrize(
    ("before", "after", "wrong"),
    [("stages:", "stages_:", "'stages' is missing"), ("seed: 0", "sead: 0", "unknown key 'data.sead'")],
)
def test_a_damaged_chain_or_run_names_its_file_and_what_is_wrong(
    tmp_path: Path, before: str, after: str, wrong: str
) -> None:
    chain = ChainDir(tmp_path / "r1")
    sft = load.load(None, ["stage=sft"])
    chain.stage("sft").create()
    save_definition(Definition("r1.yaml", "", (Stage("sft", (), sft),)), chain)
    load.save(sft, chain.stage("sft").config)
    for path in (chain.definition, chain.stage("sft").config):
        text = path.read_text()
        if before not in text:
            continue
        path.write_text(text.replace(before, after))
        with pytest.raises(UsageError) as refused:
            settings.main([str(path.parent)])
        assert str(path) in str(refused.value)
        assert wrong in str(refused.value)


def test_two_runs_side_by_side_show_only_what_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, words in (
        ("a", ["train.seed=3"]),
        ("b", ["train.seed=3", "train.lr=0.5"]),
        ("c", ["train.seed=3"]),
    ):
        (tmp_path / name).mkdir()
        load.save(load.load(None, words), tmp_path / name / "config.yaml")
    where = ["--run-root", str(tmp_path)]
    assert settings.main(["a", "b", *where]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [["setting", "a", "b"], ["train.lr", "0.0003", "0.5"]]
    assert settings.main(["a", "b", "--json", *where]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "runs": ["a", "b"],
        "settings": {"train.lr": [0.0003, 0.5]},
    }
    assert settings.main(["a", "c", *where]) == 0
    assert "settings are equal" in capsys.readouterr().out
    with pytest.raises(UsageError, match="leave out KEY=VALUE"):
        settings.main(["a", "b", "train.lr=1", *where])
