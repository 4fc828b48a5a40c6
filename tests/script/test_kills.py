"""Scripts killed by SIGKILL at random moments, saves included: no saved step is lost."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import CHECKOUT

LONG = [pytest.mark.soak, pytest.mark.timeout(3600)]


@pytest.mark.parametrize(
    ("script", "library", "kills", "words"),
    [
        ("saves_often.py", "r1hpc.client.run", 12, []),
        pytest.param("saves_often.py", "r1hpc.client.run", 200, [], marks=LONG),
        pytest.param("own_loop.py", "torch", 200, [], marks=LONG),
        pytest.param("hf_trainer.py", "transformers.trainer", 200, ["--every", "2"], marks=LONG),
        pytest.param("lightning_fit.py", "lightning.pytorch", 200, [], marks=LONG),
        pytest.param("accelerate_loop.py", "accelerate", 200, ["--resume={checkpoint}"], marks=LONG),
    ],
)
def test_no_half_checkpoint_is_resumed_and_no_whole_one_lost(
    script: str, library: str, kills: int, words: list[str], tmp_path: Path
) -> None:
    command = [
        sys.executable,
        "-m",
        "tests.script.killed",
        script,
        library,
        str(kills),
        str(tmp_path),
        *words,
    ]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout.splitlines()[-1])
