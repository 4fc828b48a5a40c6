"""The state of a script's own objects survives graceful stops: equal to plain Python, to the bit."""

from pathlib import Path

import pytest

from r1hpc.base.run_dir import RunDir
from r1hpc.client.run import AGAIN
from r1hpc.telemetry.records.metrics import read_logged
from tests.client.attempts import SCRIPTS, alone, as_attempt, lines_of, resumed


@pytest.mark.slow  # four starts of transformers
@pytest.mark.parametrize(
    "words",
    [["--seed", "42"], [], ["--seed", "1", "--stream"], ["--workers", "2"]],
    ids=["seeded collator", "collator on torch's stream", "second pass of a stream", "persistent workers"],
)
def test_a_trainer(tmp_path: Path, words: list[str]) -> None:
    run = RunDir(tmp_path / "run")
    attempts, lines = resumed(run, "trainer_holds.py", *words)
    assert attempts == 4
    assert lines == alone("trainer_holds.py", tmp_path / "alone", *words)
    logged = read_logged(run)
    assert list(logged["loss"]) == list(range(1, 25))
    assert list(logged["eval_loss"]) == list(range(3, 25, 3))


@pytest.mark.slow  # six starts of transformers
def test_a_trainer_that_dies_after_it_did_the_evaluation_a_stop_left(tmp_path: Path) -> None:
    """That evaluation saves again, before the pass that goes on has begun."""
    run, words = RunDir(tmp_path / "run"), ["--seed", "42", "--dies", str(AGAIN)]
    attempts, lines = resumed(run, "trainer_holds.py", *words)
    assert attempts == 5
    assert lines == alone("trainer_holds.py", tmp_path / "alone", *words)


@pytest.mark.slow  # four starts of lightning
@pytest.mark.parametrize("words", [[], ["--tune"]])
def test_lightning(tmp_path: Path, words: list[str]) -> None:
    run = RunDir(tmp_path / "run")
    attempts, lines = resumed(run, "lightning_holds.py", *words)
    assert attempts == 4
    assert lines == alone("lightning_holds.py", tmp_path / "alone", *words)
    assert list(read_logged(run)["val_loss"]) == [10, 20, 30]


@pytest.mark.slow  # three starts of accelerate
def test_accelerate_stopped_at_the_last_batch_of_a_pass(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    command = [str(SCRIPTS / "accelerate_passes.py"), "--out", str(tmp_path / "out")]
    first = as_attempt(run, 1, command, library="accelerate")
    assert first.returncode == AGAIN, first.stderr
    second = as_attempt(run, 2, command, library="accelerate")
    assert second.returncode == 0, second.stderr
    assert "not kept" not in second.stderr
    assert lines_of(second.stdout.splitlines()) == alone("accelerate_passes.py", tmp_path / "alone")


@pytest.mark.slow  # a start of accelerate
def test_a_folder_whose_number_goes_back_is_kept_under_the_step(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    command = [str(SCRIPTS / "accelerate_passes.py"), "--out", str(tmp_path / "out"), "--restarts-its-count"]
    ended = as_attempt(run, 1, command, library="accelerate")
    assert ended.returncode == 0, ended.stderr
    assert "step_2 is saved at step 8: kept as step_8" in ended.stderr
    assert (run.checkpoints / "step-00000008/step_8").is_dir()
