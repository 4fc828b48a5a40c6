"""On-policy distillation on two real DeepSpeed ranks: disturbed it is the same run to the bit, and it learns
what the teacher knows without any reward."""

import os
from pathlib import Path

import pytest

from r1hpc.telemetry.records.attempts import Cause
from r1hpc.telemetry.records.metrics import read_steps
from tests.runs import submit, wait_over
from tests.teachers import DISTILL, write_teacher
from tests.train.test_rl_disturbed import assert_same_learning

pytestmark = pytest.mark.timeout(600)

SIZE = (*DISTILL, "rl.num_iterations=2", "train.global_batch_size=8", "train.num_steps=8", "rl.jsd_beta=0.5")
"""Two passes over a rollout in halves: four updates, so that a save falls in the middle of them."""
DISTURBANCES = ("update.begin:term:0:3:1", "update.begin:kill9:1:2:2")
"""Phase, what happens, to which rank, at its nth time in that attempt, in which attempt."""


def test_disturbed_it_is_the_same_run(tmp_path: Path) -> None:
    teacher = f"rl.teacher={write_teacher(tmp_path / 'teacher')}"
    words = (*SIZE, teacher, "evaluate.every=0", "limits.max_crashes=9")
    quiet = submit(tmp_path, "quiet", *words, job="jobs/rl_smoke.yaml").run
    assert wait_over(quiet)[-1].cause is Cause.finished
    env = {**os.environ, "R1HPC_FAILPOINT": ",".join(DISTURBANCES)}
    run = submit(tmp_path, "disturbed", *words, job="jobs/rl_smoke.yaml", env=env).run
    causes = [attempt.cause for attempt in wait_over(run, 400)]
    assert causes == [Cause.preempted, Cause.crash, Cause.finished]
    assert_same_learning(run, quiet)
    divergence = [step.value("kl") for step in read_steps(quiet).effective.values()]
    assert divergence[-1] < 0.8 * divergence[0], divergence


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(("deepspeed.zero_stage=3", "train.precision=bf16"), id="ZeRO 3, divided"),
        pytest.param(
            ("deepspeed.zero_stage=2", "model.lora_rank=4", "rl.reference=host"),
            id="LoRA ZeRO 2, host",
            marks=pytest.mark.soak,
        ),
    ],
)
def test_under_other_layouts_it_comes_nearer_to_the_teacher(tmp_path: Path, layout: tuple[str, ...]) -> None:
    words = (*DISTILL, f"rl.teacher={write_teacher(tmp_path / 'teacher')}", "evaluate.every=0")
    run = submit(tmp_path, "run", *words, *layout, "train.num_steps=8", job="jobs/rl_smoke.yaml").run
    assert wait_over(run)[-1].cause is Cause.finished
    divergence = [step.value("kl") for step in read_steps(run).effective.values()]
    assert divergence[-1] < divergence[0], divergence
    assert (run.model / "model.safetensors").exists()
