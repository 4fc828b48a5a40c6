"""Ranks that wait for each other: a slow one is waited for, a hung one is found by all of them in time."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from r1hpc.attempt.control.heartbeats import Peers, Sign, prepare
from r1hpc.attempt.state.cause import HANG, LEFT_ALONE, read_outcomes
from r1hpc.base.run_dir import RunDir
from r1hpc.slurm.rank_env import choose_port
from r1hpc.telemetry.records.attempts import Cause
from r1hpc.train.parallel.distributed import connected_again, make_store
from tests.runs import kill_rank, submit, wait_over, wait_until

pytestmark = pytest.mark.timeout(300)

_TIMEOUT_S = 1.0


class Rank:
    """A rank's part in the exchange over a real store, with what it tells in the test's hand."""

    def __init__(self, rank: int, connect: Callable[[], object]) -> None:
        self.alive = self.beats = 0
        self.is_waiting = False
        self.peers = Peers(connect(), rank, 3, _TIMEOUT_S)  # type: ignore[arg-type]
        self.peers.start(self.sign)

    def sign(self) -> Sign:
        self.alive += self.is_waiting
        return Sign(self.alive + self.beats, self.beats, "waiting" if self.is_waiting else "sampling")


@contextmanager
def three_ranks() -> Iterator[list[Rank]]:
    listener = choose_port()
    port = listener.getsockname()[1]
    server = make_store("localhost", port, 3, listener=listener)
    prepare(server, 3)
    ranks = [Rank(n, lambda: connected_again(server)) for n in range(3)]
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.peers.leave()


def problems_found(ranks: list[Rank], working: list[Rank]) -> list[str]:
    """What each rank knows as soon as all of them know of a problem, while `working` make progress."""

    def all_know() -> bool:
        for rank in working:
            rank.beats += 1
        return all(rank.peers.problem() for rank in ranks)

    wait_until("a problem", all_know, 60)
    return [rank.peers.problem() or "" for rank in ranks]


def problems_after(seconds: float, ranks: list[Rank], working: list[Rank]) -> list[str | None]:
    """What each rank knows after some seconds in which `working` made progress."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for rank in working:
            rank.beats += 1
        time.sleep(0.05)
    return [rank.peers.problem() for rank in ranks]


def test_those_that_wait_are_left_alone_as_long_as_one_works() -> None:
    with three_ranks() as ranks:
        ranks[0].is_waiting = ranks[2].is_waiting = True
        assert problems_after(3 * _TIMEOUT_S, ranks, [ranks[1]]) == [None] * 3


def test_a_silent_rank_is_named_to_all_while_others_work() -> None:
    with three_ranks() as ranks:
        ranks[0].is_waiting = True
        for problem in problems_found(ranks, [ranks[2]]):
            assert problem.startswith("no sign of life from rank 1 for")
            assert problem.endswith("last in sampling")


def test_all_waiting_for_each_other_is_a_hang() -> None:
    with three_ranks() as ranks:
        for rank in ranks:
            rank.is_waiting = True
        for problem in problems_found(ranks, []):
            assert problem.startswith("no rank makes progress for")


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_is_told_to_all(failing: int) -> None:
    with three_ranks() as ranks:
        others = [rank.peers for rank in ranks if rank is not ranks[failing]]
        ranks[failing].peers.tell("no memory")
        wait_until("the others", lambda: all(each.failure for each in others), 60)
        assert {each.failure for each in others} == {"no memory"}


@pytest.mark.parametrize("failing", [0, 1])
def test_when_one_rank_fails_the_other_leaves_at_once(tmp_path: Path, failing: int) -> None:
    """It is where nothing tells it, as in a collective of NCCL."""
    other = 1 - failing
    faults = f"step.begin:raise:{failing}:3,step.begin:sleep=300:{other}:3"
    words = ("--nodes", "2", "train.num_steps=8", "limits.max_crashes=0")
    run = submit(tmp_path, "alone", *words, env={**os.environ, "R1HPC_FAILPOINT": faults}).run
    (attempt,) = wait_over(run)
    assert attempt.cause is Cause.crash
    assert attempt.detail.startswith(f"rank {failing} on ")
    outcomes = {outcome.rank: outcome for outcome in read_outcomes(run, 1)}
    assert outcomes[other].kind == LEFT_ALONE
    assert "failed: RuntimeError: failpoint step.begin" in outcomes[other].detail


def test_a_rank_that_has_left_is_not_missed() -> None:
    with three_ranks() as ranks:
        ranks[1].peers.leave()
        ranks[2].is_waiting = True
        assert problems_after(2 * _TIMEOUT_S, [ranks[0], ranks[2]], [ranks[0]]) == [None] * 2


_RL = (
    *("rollout.num_prompts=24", "rollout.num_generations=2", "rollout.prompts_per_batch=1"),
    *("train.global_batch_size=48", "train.num_steps=1", "evaluate.num_items=2", "limits.max_hangs=0"),
)
_HANG_TIMEOUT_S = 20


def sampling(root: Path, failpoints: str, *words: str) -> RunDir:
    """A run of rl_smoke whose ranks have many small batches to sample before they meet again."""
    env = {**os.environ, "R1HPC_FAILPOINT": failpoints}
    patience = f"train.hang_timeout_s={_HANG_TIMEOUT_S}"
    return submit(root, "run", *_RL, patience, *words, job="jobs/rl_smoke.yaml", env=env).run


def test_a_slow_rank_is_waited_for_longer_than_the_patience(tmp_path: Path) -> None:
    run = sampling(tmp_path, "rollout.batch:sleep=2.5:1:*")  # 12 batches on rank 1, none slow on rank 0
    [attempt] = wait_over(run)
    assert (attempt.cause, attempt.detail) == (Cause.finished, "")
    times = [path.stat().st_mtime for path in run.rollouts.rglob("batch-*.npz")]
    assert max(times) - min(times) > _HANG_TIMEOUT_S


@pytest.mark.parametrize("stopped", [1, 0], ids=["rank 1", "the rank that serves the store"])
def test_a_stopped_rank_is_found_while_another_works(tmp_path: Path, stopped: int) -> None:
    run = sampling(tmp_path, "rollout.batch:sleep=5:*:*", "resources.ranks_per_node=3")
    wait_until("batches of all ranks", lambda: len(list(run.rollouts.rglob("batch-*.npz"))) >= 3, 120, run)
    kill_rank(run, stopped, signal.SIGSTOP)
    [attempt] = wait_over(run)
    assert attempt.cause is Cause.hang
    assert f"no sign of life from rank {stopped} for" in attempt.detail
    assert f"nothing at all from rank {stopped}:" in attempt.detail
    outcomes = read_outcomes(run, 1)
    assert {o.rank for o in outcomes if o.kind == HANG} == {0, 1, 2} - {stopped}


class _Stopped:
    """The store of a rank that sends nothing more, not even that it left."""

    def __getattr__(self, name: str) -> None:
        raise RuntimeError(name)


@pytest.mark.parametrize("stopped", [0, 1])
def test_the_rank_that_stopped_is_named_and_not_the_one_that_waits_for_it(stopped: int) -> None:
    """All are silent, as in a collective; one process does not even send its signs."""
    with three_ranks() as ranks:
        ranks[stopped].peers._store = _Stopped()  # type: ignore[assignment]
        others = [rank for rank in ranks if rank is not ranks[stopped]]
        for problem in problems_found(others, []):
            assert problem.startswith(f"no sign of life from rank {stopped} for"), problem
