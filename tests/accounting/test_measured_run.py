"""`--method measured` on recorded runs: the number it gives, in steps, and by the account the report uses."""

import time
from pathlib import Path

import pytest

from r1hpc.accounting.open_ledger import measured_run, open_ledger
from r1hpc.base.errors import UsageError
from r1hpc.base.files import write_json
from r1hpc.config import load
from r1hpc.plan.run import make_plan
from r1hpc.telemetry.records.metrics import MetricWriter
from tests.recorded import TOKENS_PER_STEP, RecordedRun

_NUM_STEPS = 400
_RL = ("stage=rl", "rollout.num_prompts=64", "train.global_batch_size=128", "data.seq_len=512")
"""512 completions: four updates a rollout."""


def _recorded(path: Path, *overrides: str, gpus: int = 8) -> RecordedRun:
    """400 steps; the plan has far more tokens for each than the records say were trained on."""
    made = RecordedRun(path, gpus=gpus)
    config = load.load("train", (f"train.num_steps={_NUM_STEPS}", "cluster.gpu_type=a100", *overrides))
    load.save(config, made.run.config)
    plan = make_plan(config, gpus_per_node=8, vocab_size=50_304, num_nodes=1)
    assert plan.tokens_per_step > 100 * TOKENS_PER_STEP
    write_json(made.run.plan, plan.to_json())
    made.submit("local-1")
    return made


def test_steps_are_counted_and_not_the_tokens_of_either_account(tmp_path: Path) -> None:
    """As in SFT, where a step's rate counts loss tokens only: it would say hundreds of times too much."""
    made = _recorded(tmp_path / "sft")
    made.attempt(1, 40, "preempted", committed=40, step_s=10)
    spent_s, useful_s = 10 + 400 + 2, 400
    found = measured_run(made.run, made.clock)
    assert found.gpu_hours is not None
    assert found.ideal_gpu_hours is not None
    spent = 8 * spent_s / 3600
    assert found.gpu_hours.p50 == pytest.approx(spent + 360 * 10 * 8 / 3600 * spent_s / useful_s)
    assert found.ideal_gpu_hours.p50 == pytest.approx(_NUM_STEPS * 10 * 8 / 3600)
    assert found.assumptions["step_time_s"] == pytest.approx(10)
    assert "10% of the steps are done; the rest at the median step" in found.notes


def test_a_rollout_is_shared_by_its_updates(tmp_path: Path) -> None:
    """The median step would be an update without its rollout: 2 s where 7.5 s is what a step costs."""
    made = _recorded(tmp_path / "rl", *_RL)
    made.begin()
    for first in range(1, 41, 4):
        made.steps(first, first, step_s=24, startup_s=0)
        made.steps(first + 1, first + 3, step_s=2, startup_s=0)
    made.end("preempted", committed=40)
    found = measured_run(made.run, made.clock)
    assert found.gpu_hours is not None
    assert found.gpu_hours.p50 == pytest.approx(_NUM_STEPS * 7.5 * 8 / 3600)
    assert "the rest at the median rollout" in found.notes[0]


def test_a_run_that_died_counts_until_its_last_word(tmp_path: Path) -> None:
    """An hour on 8 GPUs, killed thirty days ago: 8 GPU-hours, as the report says, and not 5,920."""
    made = _recorded(tmp_path / "dead")
    made.begin()
    made.steps(1, 40, step_s=90, startup_s=0)
    MetricWriter(made.run, 1).event("save", time=made.clock, global_step=40, seconds=0.0, bytes=1024)
    month = made.clock + 30 * 86400
    found = measured_run(made.run, month)
    assert found.assumptions["gpu_hours_spent"] == pytest.approx(8.0)
    assert found.assumptions["gpu_hours_spent"] == pytest.approx(open_ledger(made.run, month).used)
    assert found.gpu_hours is not None
    assert found.gpu_hours.p50 == pytest.approx(80.0)


def test_steps_that_will_be_taken_again_are_not_done(tmp_path: Path) -> None:
    made = _recorded(tmp_path / "lost")
    made.attempt(1, 40, "node_fail", committed=20, step_s=10)
    found = measured_run(made.run, time.time())
    assert found.assumptions["steps_measured"] == 20
    assert found.assumptions["useful_part"] == pytest.approx(200 / 412)


def test_attempts_of_another_width_count_by_what_a_step_cost(tmp_path: Path) -> None:
    made = _recorded(tmp_path / "wider")
    made.attempt(1, 20, "preempted", committed=20, step_s=20, startup_s=0)
    made.gpus = 16
    made.attempt(21, 40, "preempted", committed=40, step_s=10, startup_s=0)
    found = measured_run(made.run, made.clock)
    assert found.ideal_gpu_hours is not None
    assert found.ideal_gpu_hours.p50 == pytest.approx(_NUM_STEPS * 160 / 3600)


def test_it_has_what_scripts_read(tmp_path: Path) -> None:
    made = _recorded(tmp_path / "run")
    made.attempt(1, 40, "preempted", committed=40)
    value = measured_run(made.run, made.clock).to_json()
    assert set(value["gpu_hours"]) == {"p10", "p50", "p90"}
    assert value["baselines"].keys() >= {"seed_formula", "6nd_at_40"}
    assert value["memory"]["best"] is not None
    assert value["assumptions"]["gpu"] == "A100-SXM4-80GB"


def test_a_run_that_has_not_begun(tmp_path: Path) -> None:
    made = _recorded(tmp_path / "queued")
    with pytest.raises(UsageError, match="begun no attempt"):
        measured_run(made.run, made.clock)
