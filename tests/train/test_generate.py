"""The stages that are made in parts: the last work is rank 0's, and nobody is finished before it is done."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from r1hpc.base.rundir import RunDir
from r1hpc.config.reasoning import GenerateConfig
from r1hpc.config.schema import RunConfig
from r1hpc.train.generate import _last_by_rank_0, traces
from r1hpc.train.session import Job, Outcome
from r1hpc.train.stop import StopRequests


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
    config = replace(RunConfig(), stage="traces", generate=GenerateConfig(num_items=3))
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
