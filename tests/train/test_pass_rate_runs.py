"""RL whose questions are asked by pass rate: disturbed in every phase it is the same run."""

import json
import os
from pathlib import Path

import pytest

from r1hpc.base.run_dir import RunDir
from r1hpc.checkpoint.store import CheckpointStore
from r1hpc.telemetry.records.attempts import Cause
from r1hpc.telemetry.records.metrics import audit_ledger, read_steps
from tests.runs import submit, wait_over
from tests.train.test_rl_disturbed import assert_same_learning, weights_of

pytestmark = pytest.mark.timeout(600)

WORDS: tuple[str, ...] = (
    "rl.by_pass_rate=true",
    "task.options={num_terms: 2}",
    "train.num_steps=16",
    "limits.max_crashes=3",
)
WORDS += ("train.global_batch_size=32", "evaluate.every=0", "evaluate.num_items=1")
DISTURBANCES = "reward.begin:kill9:1:3:1,update.begin:term:0:3:2"


def follow_through(root: Path, name: str, disturbances: str = "") -> RunDir:
    env = {**os.environ, **({"R1HPC_FAILPOINT": disturbances} if disturbances else {})}
    job = submit(root, name, *WORDS, job="jobs/rl_smoke.yaml", env=env)
    assert wait_over(job.run, 300)[-1].cause is Cause.finished
    return job.run


def test_disturbed_it_asks_the_same_questions(tmp_path: Path) -> None:
    undisturbed, disturbed = follow_through(tmp_path, "a"), follow_through(tmp_path, "b", DISTURBANCES)
    assert len(wait_over(disturbed)) > 2
    assert_same_learning(disturbed, undisturbed)
    assert weights_of(disturbed) == weights_of(undisturbed)
    steps = read_steps(undisturbed).effective
    assert steps[1].value("known_questions") == 0
    assert steps[1].value("num_items") == 8
    assert 8 < steps[16].value("known_questions") <= 90
    passed_over = sum(step.value("num_items") - 8 for step in steps.values())
    assert passed_over > 0, "of those that came again: this model hardly solves any"
    assert audit_ledger(undisturbed).exactly_once
    newest = CheckpointStore(disturbed.checkpoints).list()[0]
    rates = json.loads((newest.path / "stage_rank_0_pass_rates.json").read_text())
    assert len(rates) >= steps[16].value("known_questions")
