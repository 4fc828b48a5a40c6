"""The estimate that a submission leaves in the run folder, and the budget that refuses it."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from r1hpc.base.files import read_json, read_records
from r1hpc.config import load
from r1hpc.config.assets import find_job
from r1hpc.plan.run import make_plan
from r1hpc.slurm.script import make_script
from r1hpc.submission.order import Order
from r1hpc.submission.plan_run import OverBudgetError, PlannedRun, check_budget
from tests.recorded import RecordedRun
from tests.submission.chains import submit, submitted, write_chain
from tests.submission.fake_slurm import FakeSlurm

_GPUS = ("--gpus-per-node", "8", "--nodes", "2", "--time", "12:00:00")


def environment(slurm: FakeSlurm) -> dict[str, str]:
    return {**os.environ, "PATH": f"{slurm.bin}:{os.environ['PATH']}"}


def test_the_estimate_is_printed_and_stored(tmp_path: Path) -> None:
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


def test_of_two_submissions_at_once_the_budget_holds_one(tmp_path: Path) -> None:
    """Each would fit alone: the second counts the first, which is on record before it looks."""
    env = environment(FakeSlurm(tmp_path))
    size = ("train.num_steps=300", "jobs/train.yaml", *_GPUS)
    plan = submitted(tmp_path, *size, "--dry-run", "--executor", "slurm", env=env)
    (tmp_path / "runs").mkdir()
    budget = f"gpu_hours: {1.5 * plan['estimate']['gpu_hours']['p50']}\nstart: 2026-01-01\n"
    (tmp_path / "runs" / "budget.yaml").write_text(budget)
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda name: submit(tmp_path, *size, "--run-name", name, env=env), ("a", "b")))
    assert sorted(each.returncode for each in done) == [0, 1]
    assert "--over-budget REASON" in "".join(each.stderr for each in done)


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


def test_a_stage_that_goes_on_alone_is_held_against_the_budget_of_its_chain(tmp_path: Path) -> None:
    slurm = FakeSlurm(tmp_path)
    file = write_chain(tmp_path, common=_COMMON)
    size = ("train.num_steps=300", "train.global_batch_size=512", "train.micro_batch_size=8")
    submitted(tmp_path, str(file), "--run-name", "runs", *_GPUS, *size, env=environment(slurm))
    for job in slurm.jobs():
        slurm.set_state(job.job_id, "CANCELLED")
    (tmp_path / "runs" / "budget.yaml").write_text("gpu_hours: 0.01\nstart: 2026-01-01\n")
    chain_as_root = tmp_path / "runs"  # submit() takes "runs" in it for the run root
    refused = submit(chain_as_root, "--run-name", "one", "--resume", env=environment(slurm))
    assert refused.returncode == 1, refused.stdout
    assert "0.010 of 0.010 are left" in refused.stderr


@pytest.mark.parametrize("is_chain", [True, False])
def test_of_a_chains_stage_the_root_of_the_chain_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_chain: bool
) -> None:
    folder = tmp_path / "runs" / "r1"
    folder.mkdir(parents=True)
    (folder / "chain.yaml").touch()
    if not is_chain:  # a run root with a file of that name, and a budget
        (folder / "budget.yaml").touch()
    monkeypatch.chdir(folder)
    for root in (folder, Path(), Path("..", "r1")):
        assert Order(run_root=root).counted_root == (tmp_path / "runs" if is_chain else root)


def prepared_run(folder: Path, p50: float | None, done: float = 0.0) -> PlannedRun:
    """32 GPUs for an hour; `done` is the share of its steps that it has taken before."""
    config = load.load(find_job("train"), ["resources.gpus_per_node=8"])
    plan = make_plan(config, gpus_per_node=8, time_limit_s=3600, num_nodes=4)
    made = RecordedRun(folder, num_steps=plan.num_steps)
    made.submit("1", "slurm")
    made.attempt(1, 20, "preempted", committed=round(done * plan.num_steps))
    stored = None if p50 is None else {"gpu_hours": {"p10": p50 / 1.5, "p50": p50, "p90": 1.5 * p50}}
    script = make_script(made.run, config)
    return PlannedRun(made.run, "local", config, plan, script, (), not done, stored)


def test_a_stage_that_nobody_can_estimate_counts_by_its_time_limit_beside_the_others(tmp_path: Path) -> None:
    stages = [prepared_run(tmp_path / name, p50) for name, p50 in (("a", None), ("b", 100.0), ("c", None))]
    budget = tmp_path / "budget.yaml"
    budget.write_text("gpu_hours: 180\n")
    said = check_budget(stages, tmp_path)
    assert "budget: after these 3 runs about" in said[0]
    assert any("2 of these 3 runs without an estimate" in note for note in said)
    budget.write_text("gpu_hours: 150\n")
    with pytest.raises(OverBudgetError, match=r"these 3 runs need about 164\.\d GPU-hours together"):
        check_budget(stages, tmp_path)


def test_a_run_that_is_resumed_is_still_as_large_as_it_was(tmp_path: Path) -> None:
    """And what it has done is not asked for again."""
    prepared = prepared_run(tmp_path / "runs" / "a", 600.0, done=0.5)
    budget = tmp_path / "runs" / "budget.yaml"
    budget.write_text("gpu_hours: 1000\nmax_gpu_hours_per_run: 500\n")
    with pytest.raises(OverBudgetError, match=r"about 600\.0 GPU-hours, and max_gpu_hours_per_run is 500"):
        check_budget([prepared], tmp_path / "runs")
    budget.write_text("gpu_hours: 400\nmax_gpu_hours_per_run: 700\n")
    assert "after this run about 100.0 of 400.0" in check_budget([prepared], tmp_path / "runs")[0]


_COMMON = """\
include: [model/qwen2-0.5b, stage/pretrain, deepspeed/zero2]
data: {recipe: stdlib, seq_len: 2048}
model: {config: !merge {vocab_size: 32000}}
stages:
"""
