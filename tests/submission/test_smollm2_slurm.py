"""The R1 chain on SmolLM2-135M-Instruct, cut short, preempted on a real Slurm: the same to the bit.

pytest tests/submission/test_smollm2_slurm.py -m soak     # about a quarter of an hour on two quiet cores

The model is fetched once from the package index; skipped where that is out of reach.
"""

import os
import random
from functools import partial
from pathlib import Path

import pytest

from r1hpc.base.run_dir import RunDir
from r1hpc.submission.chain.folder import ChainDir
from r1hpc.telemetry.records.attempts import Cause, read_history
from r1hpc.telemetry.records.metrics import read_steps
from r1hpc.train.quantize.model_folders import convert_gguf
from tests.cluster import Cluster
from tests.fetched import SMOLLM2, wheel_member
from tests.runs import current_step, wait_until
from tests.submission.chains import submit, submitted
from tests.submission.test_r1 import digests, parts

pytestmark = [pytest.mark.slurm, pytest.mark.soak, pytest.mark.timeout(3600)]

_SEED = int(os.environ.get("R1HPC_SEED", "20261128"))
_SMALL = (
    *("sft:train.num_steps=18", "sft:checkpoint.save_every=7"),  # long enough for the form of an answer
    *("grpo:rollout.num_prompts=8", "grpo:train.global_batch_size=64", "grpo:train.num_steps=8"),
    *("grpo:checkpoint.save_every=3", "reject:generate.num_items=48", "reject:generate.items_per_part=12"),
    *("sft2:train.num_steps=6", "sft2:checkpoint.save_every=4"),
    *("evaluate.num_items=24", "evaluate.num_samples=2"),
)
_FROM_IT = ("traces", "sft", "evaluate_base")
"""The stages that begin with the model as it was fetched."""
_MOMENTS = {"sft": (1, 14), "grpo": (0, 6), "reject": (0, 2), "sft2": (1, 4), "evaluate_base": (0, 0)}
"""Stage, and the steps or parts that may be done when it is preempted, drawn from the seed."""


def test_preempted_in_five_stages_the_chain_ends_as_the_undisturbed_one(
    tmp_path: Path, idle_cluster: Cluster
) -> None:
    model = tmp_path / "SmolLM2-135M-Instruct"
    convert_gguf(wheel_member(*SMOLLM2), model)
    words = ("jobs/smollm2.yaml", *_SMALL, *(f"{stage}:model.path={model}" for stage in _FROM_IT))
    quiet, disturbed = tmp_path / "quiet", tmp_path / "disturbed"
    done = submit(quiet, *words, "--executor", "local", "--follow", timeout_s=1800)
    assert done.returncode == 0, done.stderr

    chance = random.Random(_SEED)
    where = ("--executor", "slurm", "--qos", "scavenger")
    stages = submitted(disturbed, *words, *where, env=idle_cluster.env())["stages"]
    chain = ChainDir(disturbed / "runs" / "smollm2")
    for stage in stages:
        run, job = chain.stage(stage["stage"]), int(stage["job_id"])
        if stage["stage"] in _MOMENTS:
            most = chance.randint(*_MOMENTS[stage["stage"]])
            wait_until(f"{most} of {run.run_id}", partial(_has_done, run, most), 600, run)
            idle_cluster.preempt(job)
        wait_until(f"end of {run.run_id}", partial(_is_over, run), 900, run)

    causes = {name: _causes(chain.stage(name)) for name in _MOMENTS}
    assert causes == {name: [Cause.preempted, Cause.finished] for name in _MOMENTS}
    undisturbed = ChainDir(quiet / "runs" / "smollm2")
    rewards = read_steps(undisturbed.stage("grpo")).column("reward_accuracy")
    assert sum(reward > 0 for reward in rewards) >= 6, "GRPO has something to learn from"
    expected = digests(undisturbed, quiet)
    assert len(expected) >= 9
    assert digests(chain, disturbed) == expected


def _has_done(run: RunDir, steps_or_parts: int) -> bool:
    return bool(read_history(run).attempts) and max(current_step(run), len(parts(run))) >= steps_or_parts


def _is_over(run: RunDir) -> bool:
    """FINISHED is there a moment before the end of the attempt is on record."""
    return run.finished.exists() and _causes(run)[-1] is not None


def _causes(run: RunDir) -> list[Cause | None]:
    return [attempt.cause for attempt in read_history(run).attempts]
