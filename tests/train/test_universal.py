"""A conversion that fails, by the checkpoint or by the machine; one that succeeds: test_disturbed."""

import sys
from pathlib import Path

import pytest
import torch

from r1hpc.train.checkpoint.deepspeed_io import convert
from r1hpc.train.parallel.errors import ConversionError, ResumeError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """No checkpoint of DeepSpeed's."""
    made = tmp_path / "step-00000001" / "deepspeed"
    made.mkdir(parents=True)
    torch.save({}, made / "mp_rank_00_model_states.pt")
    return made


def test_what_deepspeed_said_is_told_and_nothing_stays(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    beats: list[str] = []
    with pytest.raises(ResumeError, match=r"(?s)could not convert .*step-00000001 \(status 1\):.*Error"):
        convert(source, tmp_path / "universal-2" / "step-1", 1, beats.append)
    assert beats
    assert "Traceback" in capfd.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001"]


@pytest.mark.parametrize(
    ("end", "how"), [("kill -9 $$", "signal 9"), ("echo MemoryError >&2; exit 1", "status 1")]
)
def test_what_the_machine_lacks_is_not_the_checkpoints_fault(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, how: str
) -> None:
    """A shell in the place of the converter: it dies as one does that finds no memory."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{end}\n")
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ConversionError, match=how):
        convert(source, tmp_path / "universal-2" / "step-1", 1, lambda phase: None)
