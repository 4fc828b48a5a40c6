"""A script that r1hpc submits: what its process finds at its start, and how a second training ends."""

from pathlib import Path

import pytest

from r1hpc.client.start import start_seed
from r1hpc.telemetry.records.attempts import Cause
from r1hpc.telemetry.trackers.writers import wandb_id
from tests.runs import submit, wait_over

SCRIPT = """
import os
from r1hpc import attempt
print("found", *(os.environ[name] for name in ("PYTHONHASHSEED", "WANDB_RUN_ID", "WANDB_RESUME")), flush=True)
run = attempt()
run.lead("a library")
run.lead("a library")
"""


@pytest.mark.slow  # a run of its own
def test_one_wandb_run_one_seed_and_a_second_training_that_is_refused(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    run = submit(tmp_path, "run", "resources.gpus_per_node=0", job=str(script)).run
    attempts = wait_over(run)
    assert [attempt.cause for attempt in attempts] == [Cause.refused]
    assert "this script trains twice" in str(attempts[0].detail)
    expected = f"found {start_seed(run)} {wandb_id(run)} allow"
    assert expected in run.rank_log(1, 0).read_text()
