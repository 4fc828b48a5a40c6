"""The stages that are made in parts: the last work is rank 0's, and nobody is finished before it is done."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from r1hpc.base.rundir import RunDir
from r1hpc.config.reasoning import GenerateConfig
from r1hpc.config.schema import RunConfig
from r1hpc.train.generate import traces
from r1hpc.train.session import Job
from r1hpc.train.stop import StopRequests


class _Rank:
    """The group of a rank that is alone, and its watchdog; notes at each meeting whether traces are there."""

    rank, world_size = 0, 1

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self.met_with_traces: list[bool] = []

    def broadcast(self, value: Any) -> Any:
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def barrier(self) -> None:
        self.met_with_traces.append(self._run.traces.exists())

    def beat(self, doing: str) -> None:
        pass


def test_the_ranks_meet_once_rank_0_has_written_what_the_stage_leaves(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.create()
    config = replace(RunConfig(), stage="traces", generate=GenerateConfig(num_items=3))
    rank = _Rank(run)
    group, watchdog = cast("Any", rank), cast("Any", rank)
    job = Job(config, run, group, 1, "token", "n0", None, StopRequests(run, 0), watchdog)
    assert traces(job).finished
    assert rank.met_with_traces == [True]
