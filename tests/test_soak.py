"""300 kills of whole runs, pretraining and RL: each ends as the run that nobody touched. `make soak`.

R1HPC_SEED repeats the choices of a printed seed (the moments are as exact as the machine's clock),
R1HPC_KILLS sets how many, R1HPC_SOAK_OVERRIDES adds settings to every run, separated by spaces.
"""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from r1hpc.attempt.state.state import State, read_situation
from r1hpc.base.run_dir import RunDir
from r1hpc.telemetry.records.attempts import Attempt, Cause, read_history
from r1hpc.telemetry.records.metrics import last_steps, read_steps
from tests.runs import Submitted, assert_same_run, rank_pids, submit, wait_over, wait_until
from tests.train.test_rl_disturbed import assert_same_learning

pytestmark = [pytest.mark.soak, pytest.mark.timeout(4 * 3600)]

_SEED = int(os.environ.get("R1HPC_SEED", time.time_ns() % 10**6))
_KILLS = int(os.environ.get("R1HPC_KILLS", "150"))
_OVERRIDES = os.environ.get("R1HPC_SOAK_OVERRIDES", "").split()
_PATIENT = ("limits.max_crashes=-1", "limits.max_attempts_without_checkpoint=1000")
_START_UP_S = 6.0
"""Of an attempt until its first step, on two quiet cores."""


@dataclass(frozen=True)
class Kind:
    """A run to be killed, and what has to be the same at its end."""

    job: str
    words: tuple[str, ...]
    save_every: int
    slow_s: float
    assert_same: Callable[[RunDir, RunDir], None]


PRETRAINING = Kind(
    "jobs/smoke.yaml",
    ("--nodes", "2", "train.num_steps=40", "checkpoint.save_every=5", "train.global_batch_size=8"),
    5,
    0.15,
    assert_same_run,
)
RL = Kind(
    "jobs/rl_smoke.yaml",
    ("rl.num_iterations=2", "train.num_steps=24", "checkpoint.save_every=2", "evaluate.every=8"),
    2,
    0.3,
    assert_same_learning,
)


@pytest.mark.parametrize("kind", [pytest.param(PRETRAINING, id="pretraining"), pytest.param(RL, id="rl")])
def test_kills_of_whole_runs_change_nothing(tmp_path: Path, kind: Kind) -> None:
    print(f"R1HPC_SEED={_SEED}")
    chance = random.Random(_SEED)
    quiet = submit(tmp_path, "quiet", *kind.words, *_OVERRIDES, job=kind.job).run
    wait_over(quiet)
    seen: Counter[str] = Counter()
    while seen["kills"] < _KILLS:
        name = f"killed-{seen['runs']}"
        slow = {**os.environ, "R1HPC_FAILPOINT": f"step.begin:sleep={kind.slow_s}::*"}
        job = submit(tmp_path, name, *kind.words, *_PATIENT, *_OVERRIDES, job=kind.job, env=slow)
        run = job.run
        seen += kill_until_over(job, chance, slow)
        check_attempts(list(read_history(run).attempts), kind.save_every)
        kind.assert_same(run, quiet)
        seen += Counter(runs=1, lost_steps=len(read_steps(run).lost))
        print(dict(seen), flush=True)


def kill_until_over(job: Submitted, chance: random.Random, env: dict[str, str]) -> Counter[str]:
    """Kill one attempt after another until one gets through; what was killed, and when."""
    run, supervisor = job.run, pid_of(job)
    seen: Counter[str] = Counter()
    attempt = 0
    while not run.finished.exists():
        attempt += 1
        wait_or_finished(run, "two ranks", lambda: len(rank_pids(run, attempt)) == 2)  # noqa: B023
        moment = "in_start_up" if chance.random() < 0.5 else "in_training"
        if moment == "in_start_up":
            time.sleep(chance.uniform(0, _START_UP_S))
        else:
            wait_or_finished(run, "first step", lambda: has_stepped(run, attempt))  # noqa: B023
            time.sleep(chance.uniform(0, 3))
        if not run.finished.exists():
            victims = chance.choice(["rank 0", "rank 1", "ranks", "all", "supervisor"])
            kill(rank_pids(run, attempt), supervisor, victims)
            seen += Counter({"kills": 1, moment: 1, victims: 1})
            if victims == "supervisor":
                end_orphans(run, attempt, chance)
            if victims in ("all", "supervisor") and not run.finished.exists():
                supervisor = pid_of(submit(run.path.parent, run.run_id, "--resume", env=env))
    wait_until("the supervisor's end", lambda: not Path(f"/proc/{supervisor}").exists(), 120, run)
    return seen


def pid_of(job: Submitted) -> int:
    return int(job.job_id.removeprefix("local-"))


def wait_or_finished(run: RunDir, what: str, reached: Callable[[], bool]) -> None:
    wait_until(what, lambda: run.finished.exists() or reached(), 300, run)


def has_stepped(run: RunDir, attempt: int) -> bool:
    return any(step.attempt >= attempt for step in last_steps(run, 1))


def end_orphans(run: RunDir, attempt: int, chance: random.Random) -> None:
    """Ranks that outlive their supervisor train on and are the run still: no second attempt begins."""
    time.sleep(chance.uniform(0, 2))
    ranks = rank_pids(run, attempt)
    situation = read_situation(run)
    if len(ranks) == 2 and all(map(is_alive, ranks.values())) and not run.finished.exists():
        assert situation.state is State.running, situation
    kill(ranks, None, "ranks")
    wait_until("the orphans' end", lambda: not any(map(is_alive, ranks.values())), 30, run)


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def kill(ranks: dict[int, int], supervisor: int | None, victims: str) -> None:
    """SIGKILL. With the supervisor alone its ranks live on."""
    chosen: dict[str, list[int | None]] = {
        "rank 0": [ranks.get(0)],
        "rank 1": [ranks.get(1)],
        "ranks": list(ranks.values()),
        "all": [supervisor, *ranks.values()],
        "supervisor": [supervisor],
    }
    for pid in chosen[victims]:
        try:
            if pid is not None:
                os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def check_attempts(attempts: list[Attempt], save_every: int) -> None:
    """No attempt but the last one is judged to have finished, and none loses more than it may.

    That is an interval, and another one where a checkpoint was still being written.
    """
    # None: its supervisor was killed, and the ranks went on to the last step.
    assert attempts[-1].cause in (Cause.finished, None)
    assert not {Cause.finished, Cause.refused, Cause.hang} & {a.cause for a in attempts[:-1]}
    for before, after in pairwise(attempts):
        if before.last_step is not None:
            assert before.last_step - (after.resumed_from or 0) <= 2 * save_every, (before, after)
