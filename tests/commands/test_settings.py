"""settings: what a run is given, and the reference of every key."""

from pathlib import Path

import pytest

from r1hpc import settings
from r1hpc.config.reference import reference


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
