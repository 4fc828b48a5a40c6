"""A conversion that fails by the machine, not by the checkpoint; one that succeeds: test_disturbed."""

from pathlib import Path

import pytest
import torch

from r1hpc.train.errors import ConversionError
from r1hpc.train.universal import convert


def test_what_deepspeed_said_is_told_and_nothing_stays(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What it is given is no checkpoint of DeepSpeed's; it is asked all the same, and says so its way."""
    source = tmp_path / "step-00000001" / "deepspeed"
    source.mkdir(parents=True)
    torch.save({}, source / "mp_rank_00_model_states.pt")
    beats: list[str] = []
    with pytest.raises(ConversionError, match=r"(?s)could not convert .*step-00000001 \(status 1\):.*Error"):
        convert(source, tmp_path / "universal-2" / "step-1", 1, beats.append)
    assert beats
    assert "Traceback" in capfd.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001"]
