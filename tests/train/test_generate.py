"""The stages that are made in parts: the last work is rank 0's, and nobody is finished before it is done."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest

from r1hpc.base.rundir import RunDir
from r1hpc.config.reasoning import GenerateConfig, RewardConfig, RolloutConfig
from r1hpc.config.schema import RunConfig
from r1hpc.tasks.chain_sum import ChainSum
from r1hpc.tasks.chat import PromptForm
from r1hpc.tasks.rewards import Scorer
from r1hpc.train.generate import (
    _completions,
    _last_by_rank_0,
    _read_parts,
    _run_parts,
    sentence_on_kept,
    traces,
)
from r1hpc.train.judge import Judge
from r1hpc.train.session import Job, Outcome
from r1hpc.train.stop import StopRequests
from tests.train.test_evaluate import TOKENIZER, Parrot


class _Rank:
    """The group of a rank as if alone, and its watchdog; notes at each meeting whether traces are there."""

    world_size = 1

    def __init__(self, run: RunDir, rank: int) -> None:
        self._run, self.rank = run, rank
        self.met_with_traces: list[bool] = []

    def broadcast(self, value: Any) -> Any:
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def barrier(self) -> None:
        self.met_with_traces.append(self._run.traces.exists())

    def beat(self, doing: str) -> None:
        pass


def job_of(rank: _Rank, run: RunDir) -> Job:
    run.create()
    config = replace(RunConfig(), stage="traces", generate=GenerateConfig(num_items=3, items_per_part=2))
    group, watchdog = cast("Any", rank), cast("Any", rank)
    return Job(config, run, group, 1, "token", "n0", None, StopRequests(run, 0), watchdog)


def test_rank_0_meets_the_others_once_it_has_written_what_the_stage_leaves(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    rank = _Rank(run, 0)
    assert traces(job_of(rank, run)).finished
    assert rank.met_with_traces == [True]


@pytest.mark.parametrize("finished", [True, False])
def test_the_others_wait_for_it_and_write_nothing(tmp_path: Path, finished: bool) -> None:
    run = RunDir(tmp_path / "run")
    rank = _Rank(run, 1)
    with _last_by_rank_0(job_of(rank, run), Outcome(finished, 0, None)) as is_mine:
        assert not is_mine
        assert not rank.met_with_traces
    assert rank.met_with_traces == [False] * finished


def _kept(folder: Path, **generate: Any) -> tuple[list[dict[str, Any]], str]:
    """What is kept of 40 items that are answered 0 or 1, and what is said of it."""
    run = RunDir(folder)
    job = job_of(_Rank(run, 0), run)
    settings = GenerateConfig(**{"num_items": 40, "num_samples": 4, "items_per_part": 16, **generate})
    rollout = RolloutConfig(max_prompt_length=16, max_completion_length=8)
    job = replace(job, config=RunConfig(stage="generate", generate=settings, rollout=rollout))
    with Scorer(RewardConfig(), task := ChainSum(0, {}), max_completion_length=8) as scorer:
        judge = Judge(job.config, task, TOKENIZER, PromptForm(), Parrot(), scorer)
        assert _run_parts(job, partial(_completions, job, judge)).finished
    lines = list(_read_parts(job))
    return lines, sentence_on_kept(job.config, lines)


def test_where_parts_are_cut_changes_nothing(tmp_path: Path) -> None:
    whole, _ = _kept(tmp_path / "40", items_per_part=40, keep="all")
    assert len(whole) > 40
    for size in (1, 7, 16):
        assert _kept(tmp_path / str(size), items_per_part=size, keep="all")[0] == whole


def test_what_is_right_is_kept_where_nothing_else_is_said(tmp_path: Path) -> None:
    everything, said_of_all = _kept(tmp_path / "all", keep="all")
    right = [line for line in everything if line["correct"]]
    assert 0 < len(right) < len(everything)
    found, said = _kept(tmp_path / "default")
    assert found == right
    counts = f"of 40 items x 4 samples, {len(right)} of them right"
    assert said == f"{len(right)} completions kept {counts} (generate.keep=correct)"
    assert said_of_all == f"{len(everything)} completions kept {counts} (generate.keep=all)"
