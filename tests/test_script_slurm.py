"""Play on a real Slurm: scripts of one's own on two nodes, preempted by a higher queue and killed."""

import os
import random
import signal
from pathlib import Path

import pytest

from r1hpc.base.run_dir import RunDir
from r1hpc.telemetry.records.attempts import Cause, read_history
from r1hpc.telemetry.records.metrics import compare, last_steps
from tests.cluster import Cluster
from tests.runs import read_text, submit, wait_attempt, wait_over, wait_until
from tests.script.test_script import SCRIPTS, script_pids

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]

_WORDS = ("--executor", "slurm", "--nodes", "2", "-t", "30", "resources.gpus_per_node=0")
_SCRIPTS = {
    "own_loop": ("--steps", "{steps}", "--pause", "{pause}"),
    "zero2": ("{steps}", "{pause}"),
    "fsdp2": ("{steps}", "{pause}"),
}


def wait_new_steps(run: RunDir, attempt: int, count: int) -> None:
    """Wait until this attempt, or one after it, has taken some steps."""
    wait_until(
        f"attempt {attempt} takes {count} steps",
        lambda: len([step for step in last_steps(run, count) if step.attempt >= attempt]) >= count,
        300,
        run,
    )


@pytest.mark.parametrize(
    ("name", "times"),
    [("own_loop", 3), *(pytest.param(name, 10, marks=pytest.mark.soak) for name in _SCRIPTS)],
)
def test_a_script_disturbed_again_and_again_equals_the_quiet_run(
    name: str, times: int, idle_cluster: Cluster, tmp_path: Path
) -> None:
    script, dice = str(SCRIPTS / f"{name}.py"), random.Random(name)

    def start(folder: str, pause: str) -> tuple[RunDir, str]:
        arguments = [word.format(pause=pause, steps=40 * times) for word in _SCRIPTS[name]]
        limits = ("limits.max_crashes=9", "--qos", "scavenger")
        done = submit(
            tmp_path, folder, *_WORDS, *limits, "--", *arguments, job=script, env=idle_cluster.env()
        )
        return done.run, done.job_id

    quiet, _ = start("quiet", "0")
    wait_over(quiet)
    run, job = start("disturbed", "0.05")
    causes = []
    for number in range(1, times + 1):
        wait_new_steps(run, number, dice.randint(2, 25))
        if number % 2:
            idle_cluster.preempt(int(job))
            causes.append(Cause.preempted)
        else:
            os.kill(dice.choice(script_pids(run)), signal.SIGKILL)
            causes.append(Cause.crash)
        wait_attempt(run, number + 1)
    ended = [attempt.cause for attempt in wait_over(run)]
    assert ended == [*causes, Cause.finished], "\n".join(a.detail for a in read_history(run).attempts)
    assert compare(quiet, run) == []
    if name == "own_loop":
        logs = "".join(read_text(path) for path in tmp_path.glob("*/logs/*/rank_0.out"))
        assert len({line for line in logs.splitlines() if line.startswith("weights ")}) == 1
