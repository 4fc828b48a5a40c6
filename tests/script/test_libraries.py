"""Unmodified scripts of each library: killed and stopped, they equal themselves run alone, to the bit."""

from pathlib import Path

import pytest

from r1hpc.telemetry.records.attempts import Cause
from tests.script.hits import alone, hit

ALL_HITS = [Cause.crash, Cause.crash, Cause.preempted, Cause.stopped, Cause.finished]


def assert_equal(tmp_path: Path, script: str, *words: str, ranks: int = 1) -> None:
    attempts, lines = hit(tmp_path, script, *words, ranks=ranks)
    assert [attempt.cause for attempt in attempts] == ALL_HITS
    assert lines == alone(script, tmp_path / "alone", ranks)
    assert len(lines) > 8


def test_transformers_trainer_with_two_ranks(tmp_path: Path) -> None:
    assert_equal(tmp_path, "hf_trainer.py", ranks=2)


@pytest.mark.parametrize("script", ["trl_sft.py", "trl_grpo.py"])
def test_trl(tmp_path: Path, script: str) -> None:
    pytest.importorskip("trl")
    assert_equal(tmp_path, script)


def test_lightning(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    assert_equal(tmp_path, "lightning_fit.py", "checkpoint.save_every=5")


def test_a_loop_on_accelerate(tmp_path: Path) -> None:
    assert_equal(tmp_path, "accelerate_loop.py", "script.resume_args=[--resume,'{checkpoint}']")
