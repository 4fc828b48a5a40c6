"""Scripts of TRL, as they are installed: two preemptions and two SIGKILLs change no weight after any step."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import CHECKOUT, run_environment
from tests.script.real.disturb import ROWS, run_row


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    command = [sys.executable, "-m", "tests.script.real.inputs", str(folder)]
    subprocess.run(command, cwd=CHECKOUT, env=run_environment(), check=True)
    return folder


@pytest.mark.slow  # seven starts of transformers each
@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.get("installed")])
def test_weights_are_equal_after_every_step(name: str, inputs: Path, tmp_path: Path) -> None:
    result = run_row(ROWS[name], tmp_path, inputs, tmp_path)
    assert result.causes == ["preempted", "crash", "preempted", "crash", "finished"], result
    assert result.is_equal, result
    assert result.is_as_plain, result
