"""A run on another number of ranks, under other ZeRO stages, with adapters: what must stay the same."""

from pathlib import Path

import pytest

from r1hpc.base.run_dir import RunDir
from r1hpc.telemetry.records.attempts import Cause
from r1hpc.telemetry.records.metrics import read_ledger, read_steps
from tests.runs import submit, until_stopped, wait_over, wait_step

pytestmark = pytest.mark.timeout(600)
SIZE = ("rl.kl_coef=0", "train.num_steps=8", "evaluate.every=0", "deepspeed.zero_stage=0")


def run(root: Path, name: str, *words: str) -> RunDir:
    job = submit(root, name, *words, job="jobs/rl_smoke.yaml")
    attempts = wait_over(job.run)
    assert attempts[-1].cause is Cause.finished
    return job.run


def test_on_another_number_of_ranks_the_prompts_and_groups_are_the_same(tmp_path: Path) -> None:
    two = run(tmp_path, "two", *SIZE)
    held = until_stopped(tmp_path / "moved", 4)
    moved = submit(tmp_path, "moved", *SIZE, job="jobs/rl_smoke.yaml", env=held).run
    wait_step(moved, 3)
    moved.stop.touch()
    assert [a.cause for a in wait_over(moved)] == [Cause.stopped]
    submit(tmp_path, "moved", "--resume", "resources.ranks_per_node=1")
    assert wait_over(moved)[-1].cause is Cause.finished
    ours, theirs = read_ledger(moved), read_ledger(two)
    assert [r[2:4] for r in ours.values()] == [r[2:4] for r in theirs.values()]  # items in order
    assert {r.attempt for r in ours.values()} == {1, 2}
    # The same completions too, until a sum over another number of ranks has rounded a weight differently.
    first = [step for step, record in ours.items() if record.num_samples][:2]
    assert [ours[step].checksum for step in first] == [theirs[step].checksum for step in first]
    losses = zip(read_steps(moved).column("loss"), read_steps(two).column("loss"), strict=True)
    assert all(abs(a - b) < 1e-4 for a, b in list(losses)[:4])


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(
            ("deepspeed.zero_stage=3", "train.precision=bf16", "rl.max_resamples=2"), id="ZeRO 3 bf16"
        ),
        pytest.param(
            ("deepspeed.zero_stage=3", "rl.kl_coef=0.05", "train.logits_chunk_tokens=64"),
            id="ZeRO 3, reference divided, logits in chunks",
        ),
        pytest.param(("deepspeed.zero_stage=2", "model.lora_rank=4", "rl.kl_coef=0.05"), id="LoRA ZeRO 2"),
        # An odd number of rows over two ranks, one at a time: at last one rank has none, and the other still
        # needs it to gather the reference's parameters.
        pytest.param(
            (
                *("deepspeed.zero_stage=3", "model.lora_rank=4", "rl.kl_coef=0.05", "rl.mask_truncated=true"),
                *("train.micro_batch_size=1", "rollout.num_prompts=5", "rollout.num_generations=3"),
                "train.global_batch_size=15",
            ),
            id="LoRA ZeRO 3, odd",
        ),
        pytest.param(("deepspeed.zero_stage=3", "rl.algorithm=ppo"), id="PPO ZeRO 3", marks=pytest.mark.soak),
    ],
)
def test_the_sampler_runs_the_trainers_policy(tmp_path: Path, words: tuple[str, ...]) -> None:
    done = run(tmp_path, "run", *SIZE, *words, "train.num_steps=4")
    steps = read_steps(done).effective.values()
    said = [step.value("logprob_difference") for step in steps if step.value("update") == 0]
    differences = [difference for difference in said if difference is not None]  # None: no group taught
    most = 0.05 if "train.precision=bf16" in words else 1e-5
    assert differences
    assert all(0 <= difference < most for difference in differences)
    assert (done.model / "model.safetensors").exists()
