"""The share of training's completions that is kept: bounded, and the same after a kill."""

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from r1hpc.base.run_dir import RunDir
from r1hpc.config import load
from r1hpc.config.schema.run import RunConfig
from r1hpc.tasks.text.format import encode
from r1hpc.telemetry.records.samples import read_samples, sampled_steps, samples_path
from r1hpc.train.rl.samples import _MOST_BYTES, _MOST_STEPS, keep_samples
from r1hpc.train.rollout.groups import Groups
from r1hpc.train.rollout.judge import Judge, judge_with
from tests.runs import submit, wait_over

GROUPS, MEMBERS = 6, 4


@pytest.fixture
def config() -> RunConfig:
    return load.load("jobs/rl_smoke.yaml")


def job_of(run: RunDir, config: RunConfig, attempt: int = 1) -> Any:
    return SimpleNamespace(run=run, config=config, attempt=attempt)


def groups_of(judge: Judge, texts: list[str], right: list[bool]) -> Groups:
    rows = [encode(judge.tokenizer, text) for text in texts]
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = ids
    return Groups(
        items=np.arange(len(rows) // MEMBERS),
        tokens=tokens,
        logprobs=np.zeros(tokens.shape, np.float32),
        versions=np.zeros(tokens.shape, np.int32),
        lengths=np.array([len(ids) for ids in rows], np.int32),
        ended=np.ones(len(rows), np.bool_),
        rewards=np.array(right, np.float64),
        correct=np.array(right),
        failed=np.zeros(len(rows), np.bool_),
        terms={"accuracy": np.array(right, np.float64)},
    )


def run_dir(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.create()
    return run


def lines_of(run: RunDir, step: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in samples_path(run, step).read_text().splitlines()]


def test_correct_and_wrong_ones_of_different_groups(tmp_path: Path, config: RunConfig) -> None:
    run = run_dir(tmp_path)
    with judge_with(config, lambda *_: None) as (judge, _):  # type: ignore[arg-type]
        right = [True] + [False] * (GROUPS * MEMBERS - 1)
        groups = groups_of(judge, [str(number) for number in range(GROUPS * MEMBERS)], right)
        keep_samples(job_of(run, config), judge, 1, groups)
        lines = lines_of(run, 1)
        item = judge.task.item(1)
    assert [line["correct"] for line in lines] == [True] + [False] * 7
    assert lines[1] == {
        "attempt": 1,
        "is_lasting": True,
        "item": 1,
        "prompt": item.prompt,
        "expected": item.answer,
        "completion": str(MEMBERS),
        "correct": False,
        "reward": 0.0,
        "terms": {"accuracy": 0.0},
        "tokens": 1,
        "is_cut": False,
    }
    assert len({line["item"] for line in lines}) == GROUPS
    assert samples_path(run, 1).stat().st_mode & 0o077 == 0


def test_a_step_and_a_run_are_bounded(tmp_path: Path, config: RunConfig) -> None:
    run = run_dir(tmp_path)
    config = replace(config, train=replace(config.train, num_steps=20_000))
    with judge_with(config, lambda *_: None) as (judge, _):  # type: ignore[arg-type]
        groups = groups_of(judge, ["1" * 90_000] * MEMBERS, [False] * MEMBERS)
        keep_samples(job_of(run, config), judge, 1, groups)
        (line,) = {line["completion"] for line in lines_of(run, 1)}
        assert "[... 86,000 characters left out ...]" in line
        assert samples_path(run, 1).stat().st_size <= _MOST_BYTES
        small = groups_of(judge, ["1"] * MEMBERS, [False] * MEMBERS)
        for step in range(3, 1001, 2):
            keep_samples(job_of(run, config), judge, step, small)
    steps = sampled_steps(run)
    assert steps[-1] == 999, "the newest is always there"
    assert len(steps) <= _MOST_STEPS * 1000 // 20_000 + 2
    assert next(line["is_lasting"] for line in lines_of(run, 999)) is False


def test_a_step_taken_again_replaces_it_and_those_after_it(tmp_path: Path, config: RunConfig) -> None:
    run = run_dir(tmp_path)
    with judge_with(config, lambda *_: None) as (judge, _):  # type: ignore[arg-type]
        for attempt, step, text in ((1, 1, "1"), (1, 3, "2"), (1, 5, "3"), (2, 3, "4")):
            groups = groups_of(judge, [text] * MEMBERS, [False] * MEMBERS)
            keep_samples(job_of(run, config, attempt), judge, step, groups)
    assert sampled_steps(run) == [1, 3]
    assert {(line["attempt"], line["completion"]) for line in lines_of(run, 3)} == {(2, "4")}


def test_a_full_disk_costs_the_samples_and_not_the_run(
    tmp_path: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(tmp_path / "nowhere")  # no folder: a write fails as on a full disk
    with judge_with(config, lambda *_: None) as (judge, _):  # type: ignore[arg-type]
        keep_samples(job_of(run, config), judge, 1, groups_of(judge, ["1"] * MEMBERS, [False] * MEMBERS))
    assert "the completions of step 1 are not kept" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_killed_run_keeps_the_same_completions(tmp_path: Path) -> None:
    """Killed in the update of its third rollout: two steps are sampled and taken again."""
    kill = {**os.environ, "R1HPC_FAILPOINT": "update.begin:kill9:0:6:1"}
    found = []
    for name, env in (("quiet", None), ("killed", kill)):
        run = submit(tmp_path, name, "limits.max_crashes=3", job="jobs/rl_smoke.yaml", env=env).run
        wait_over(run, 120)
        assert sampled_steps(run) == [1, 3, 5, 7, 9, 11]
        found.append([read_samples(run, step) for step in sampled_steps(run)])
    assert found[0] == found[1]
    assert len((tmp_path / "killed" / "attempts.jsonl").read_text().splitlines()) > 3, "it was killed"
