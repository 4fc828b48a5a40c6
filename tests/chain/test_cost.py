"""The estimate that a submission leaves in the run folder, and the budget that refuses it."""

import os
from pathlib import Path

from r1hpc.base.files import read_json, read_records
from tests.chain.chains import submit, submitted, write_chain
from tests.chain.fake_slurm import FakeSlurm

_GPUS = ("--gpus-per-node", "8", "--nodes", "2", "--time", "12:00:00")


def environment(slurm: FakeSlurm) -> dict[str, str]:
    return {**os.environ, "PATH": f"{slurm.bin}:{os.environ['PATH']}"}


def test_the_estimate_is_told_and_stored(tmp_path: Path) -> None:
    env = environment(FakeSlurm(tmp_path))
    answer = submitted(tmp_path, "jobs/smoke.yaml", "--run-name", "a", env=env)
    stored = read_json(tmp_path / "runs" / "a" / "estimate.json")
    assert stored == answer["estimate"]
    hours = stored["node_hours"]
    assert 0 < hours["p10"] < hours["p50"] < hours["p90"]


def test_a_run_over_the_budget_is_refused_until_somebody_says_why(tmp_path: Path) -> None:
    env = environment(FakeSlurm(tmp_path))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "budget.yaml").write_text("gpu_hours: 2\nstart: 2026-01-01\n")
    words = ("jobs/train.yaml", "--run-name", "a", *_GPUS)
    refused = submit(tmp_path, *words, env=env)
    assert refused.returncode == 1
    assert "2.00 of 2.00 are left" in refused.stderr
    assert "--over-budget REASON" in refused.stderr
    assert not (tmp_path / "runs" / "a").exists()
    answer = submitted(tmp_path, *words, "--over-budget", "the deadline", env=env)
    assert any(note.startswith("budget: over budget") for note in answer["notes"])
    event = read_records(tmp_path / "runs" / "a" / "attempts.jsonl")[0]
    assert event["over_budget"] == "the deadline"


def test_the_stages_of_a_chain_are_held_against_it_together(tmp_path: Path) -> None:
    """Each fits, and all of them do not."""
    slurm = FakeSlurm(tmp_path)
    size = ("train.num_steps=300", "train.global_batch_size=512", "train.micro_batch_size=8")
    words = [str(write_chain(tmp_path, common=_COMMON)), *_GPUS, *size]
    plan = submitted(tmp_path, *words, "--dry-run", "--executor", "slurm", env=environment(slurm))
    each = [stage["estimate"]["gpu_hours"]["p50"] for stage in plan["stages"]]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "budget.yaml").write_text(f"gpu_hours: {1.5 * max(each)}\nstart: 2026-01-01\n")
    refused = submit(tmp_path, *words, env=environment(slurm))
    assert refused.returncode == 1, refused.stdout
    assert "--over-budget REASON" in refused.stderr
    assert not slurm.jobs()
    assert not (tmp_path / "runs" / "small").exists()


_COMMON = """\
include: [model/qwen2-0.5b, stage/pretrain, deepspeed/zero2]
data: {recipe: stdlib, seq_len: 2048}
model: {config: {vocab_size: 32000}}
stages:
"""
