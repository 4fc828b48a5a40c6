"""A script that seeds nothing starts alike in every attempt of its run, and otherwise in another run."""

from pathlib import Path

import pytest

from r1hpc.base.run_dir import RunDir
from r1hpc.client.start import start_seed
from r1hpc.telemetry.records.attempts import record
from tests.client.attempts import as_attempt

DRAWS = """
import random
import numpy as np
print(random.random(), np.random.rand(), np.random.default_rng().random())
"""


def test_attempts_start_alike_and_runs_do_not(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    first, second = (as_attempt(run, number, ["-c", DRAWS], seed=5).stdout for number in (1, 2))
    assert first == second != ""
    other = as_attempt(run, 3, ["-c", DRAWS], seed=6).stdout
    ranked = as_attempt(run, 4, ["-c", DRAWS], seed=5, rank=1, world_size=2).stdout
    assert len({first, other, ranked}) == 3


@pytest.mark.slow  # imports torch twice
def test_torch_follows_once_it_is_imported(tmp_path: Path) -> None:
    code = "import torch; print(torch.rand(1).item(), type(torch.__loader__).__name__)"
    run = RunDir(tmp_path / "run")
    first, second = (as_attempt(run, number, ["-c", code], seed=5).stdout for number in (1, 2))
    assert first == second
    assert first.endswith("SourceFileLoader\n")


def test_the_seed_is_the_submission_s_and_stays(tmp_path: Path) -> None:
    runs = [RunDir(tmp_path / name) for name in ("a", "b")]
    for run in runs:
        run.path.mkdir()
        record(run, "submitted")
    seeds = [start_seed(run) for run in runs]
    assert seeds[0] != seeds[1]
    record(runs[0], "begin")
    runs[0].path.rename(tmp_path / "moved")
    assert start_seed(RunDir(tmp_path / "moved")) == seeds[0]
