"""The stages that are made in parts: the last work is rank 0's, and nobody is finished before it is done."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest

from r1hpc.attempt.control.stop import StopRequests
from r1hpc.attempt.workload import Outcome
from r1hpc.base.errors import ConfigError, StateError
from r1hpc.base.run_dir import RunDir
from r1hpc.config.schema.rl import GenerateConfig, RewardConfig, RolloutConfig
from r1hpc.config.schema.run import RunConfig
from r1hpc.tasks.problems.task import ChainSum
from r1hpc.tasks.rewards import Completion, Score, Scorer
from r1hpc.tasks.text.format import PromptForm
from r1hpc.train.generate.generate import (
    _completions,
    _last_by_rank_0,
    _missing,
    _read_parts,
    _run_parts,
    kept,
    sentence_on_kept,
    traces,
)
from r1hpc.train.loop.session import Job
from r1hpc.train.rollout.judge import Judge
from tests.train.test_evaluate import IDS, TOKENIZER, Parrot


class _Rank:
    """The group of a rank as if alone, and its watchdog; notes at each meeting whether traces are there."""

    world_size = 1

    def __init__(self, run: RunDir, rank: int) -> None:
        self._run, self.rank = run, rank
        self.met_with_traces: list[bool] = []

    def broadcast(self, value: Any) -> Any:
        self.met_with_traces.append(self._run.traces.exists())
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value]

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
    assert rank.met_with_traces[-1]


@pytest.mark.parametrize("finished", [True, False])
def test_the_others_wait_for_it_and_write_nothing(tmp_path: Path, finished: bool) -> None:
    run = RunDir(tmp_path / "run")
    rank = _Rank(run, 1)
    outcome = Outcome(finished, 0, None)
    assert _last_by_rank_0(job_of(rank, run), outcome, lambda: pytest.fail("rank 0's work")) == outcome
    assert rank.met_with_traces == [False] * finished


def test_a_stop_in_the_last_work_leaves_it_to_the_next_attempt(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    outcome = _last_by_rank_0(job_of(_Rank(run, 0), run), Outcome(True, 2, 2), lambda: False)
    assert outcome == Outcome(False, 2, 2)


def test_before_the_first_part_all_are_missing(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    assert _missing(job_of(_Rank(run, 0), run)) == [0, 1]


def test_a_part_that_is_not_there_or_damaged_is_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the stage leaves would be short, and the next stage train on that."""
    run = RunDir(tmp_path / "run")
    job = job_of(_Rank(run, 0), run)
    assert traces(job).finished
    _, second = sorted(run.parts.glob("part-*.jsonl"))
    whole = second.read_text()
    second.write_text(whole[:-10])
    with pytest.raises(StateError, match=rf"{second}:1 is damaged: remove part-000001.jsonl"):
        list(_read_parts(job))
    second.unlink()
    monkeypatch.setattr("r1hpc.train.generate.generate._VISIBLE_S", -1.0)
    with pytest.raises(StateError, match="1 parts of other nodes are not seen here"):
        list(_read_parts(job))
    monkeypatch.setattr("r1hpc.train.generate.generate._VISIBLE_S", 60.0)
    monkeypatch.setattr("time.sleep", lambda seconds: second.write_text(whole))  # now it is
    assert len(list(_read_parts(job))) == 3


def _kept(folder: Path, **generate: Any) -> tuple[list[dict[str, Any]], str]:
    """What is kept of 40 items that are answered 0 or 1, and what is said of it."""
    run = RunDir(folder)
    job = job_of(_Rank(run, 0), run)
    settings = GenerateConfig(**{"num_items": 40, "num_samples": 4, "items_per_part": 16, **generate})
    rollout = RolloutConfig(max_prompt_length=16, max_completion_length=8)
    job = replace(job, config=RunConfig(stage="generate", generate=settings, rollout=rollout))
    with Scorer(RewardConfig(), task := ChainSum(0, {}), max_completion_length=8) as scorer:
        judge = Judge(job.config, task, TOKENIZER, PromptForm(), Parrot(), scorer, IDS)
        assert _run_parts(job, partial(_completions, job, judge)).finished
    lines = list(_read_parts(job))
    return lines, sentence_on_kept(job.config, lines)


def test_where_parts_are_cut_changes_nothing(tmp_path: Path) -> None:
    whole, _ = _kept(tmp_path / "40", items_per_part=40, keep="all")
    assert len(whole) > 40
    for size in (1, 7, 16):
        assert _kept(tmp_path / str(size), items_per_part=size, keep="all")[0] == whole


def test_of_equally_good_answers_the_first_is_the_best_not_the_shortest() -> None:
    """Shortest first would keep those that thought least."""
    answers = [
        (Completion(text, tokens, truncated), Score(1.0 * right, {}, right, True))
        for text, tokens, truncated, right in (
            ("cut off", 1, True, True),
            ("wrong", 2, False, False),
            ("thought about", 9, False, True),
            ("guessed", 3, False, True),
        )
    ]
    assert [completion.text for completion, _ in kept(answers, "best")] == ["thought about"]
    assert [completion.text for completion, _ in kept(answers, "correct")] == ["thought about", "guessed"]


def test_of_an_item_at_most_so_many_are_kept_and_none_that_is_hardly_solved(tmp_path: Path) -> None:
    everything, _ = _kept(tmp_path / "all", keep="all")
    one, _ = _kept(tmp_path / "one", keep="all", most_per_item=1)
    first_of_each = list({line["item"]: line for line in reversed(everything)}.values())[::-1]
    assert len(everything) > len(one)
    assert one == first_of_each
    often, _ = _kept(tmp_path / "often", keep="all", min_pass_rate=0.25)
    assert 0 < len(often) < len(everything)
    assert often == [line for line in everything if line["pass_rate"] >= 0.25]
    with pytest.raises(ConfigError, match=r"min_pass_rate=0.9 is above generate.max_pass_rate=0.5"):
        RunConfig(stage="generate", generate=GenerateConfig(min_pass_rate=0.9, max_pass_rate=0.5))


def test_what_is_right_is_kept_where_nothing_else_is_said(tmp_path: Path) -> None:
    everything, said_of_all = _kept(tmp_path / "all", keep="all")
    right = [line for line in everything if line["correct"]]
    assert 0 < len(right) < len(everything)
    found, said = _kept(tmp_path / "default")
    assert found == right
    counts = f"of 40 items x 4 samples, {len(right)} of them right"
    assert said == f"{len(right)} completions kept {counts} (generate.keep=correct)"
    assert said_of_all == f"{len(everything)} completions kept {counts} (generate.keep=all)"
