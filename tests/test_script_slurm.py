"""Play on a real Slurm: scripts of one's own on two nodes, preempted by a higher queue and killed."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from r1hpc.base.run_dir import RunDir
from r1hpc.telemetry.records.attempts import Cause, read_history
from r1hpc.telemetry.records.metrics import compare, last_steps
from tests.cluster import Cluster
from tests.runs import read_text, submit, wait_attempt, wait_over, wait_until
from tests.script.hits import alone, wait_held, words_of
from tests.script.test_script import SCRIPTS, script_pids

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]

_WORDS = ("--executor", "slurm", "--nodes", "2", "-t", "30", "resources.gpus_per_node=0")
_SCRIPTS = {
    "own_loop": ("--steps", "{steps}", "--pause", "{pause}"),
    "zero2": ("{steps}", "{pause}"),
    "fsdp2": ("{steps}", "{pause}"),
}
_LIBRARIES = {
    "hf_trainer": (),
    "trl_sft": (),
    "trl_grpo": (),
    "accelerate_loop": ("script.resume_args=[--resume,'{checkpoint}']",),
    "lightning_fit": ("checkpoint.save_every=5",),
}
_TIMES = 10
_LIMITS = ("limits.max_crashes=9", "--qos", "scavenger")


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
        done = submit(
            tmp_path, folder, *_WORDS, *_LIMITS, "--", *arguments, job=script, env=idle_cluster.env()
        )
        return done.run, done.job_id

    quiet, _ = start("quiet", "0")
    wait_over(quiet)
    run, job = start("disturbed", "0.05")
    for number in range(1, times + 1):
        wait_new_steps(run, number, dice.randint(2, 25))
        if number % 2:
            idle_cluster.preempt(int(job))
        else:
            os.kill(dice.choice(script_pids(run)), signal.SIGKILL)
        wait_attempt(run, number + 1)
    assert_ended(run, times)
    assert compare(quiet, run) == []
    if name == "own_loop":
        logs = "".join(read_text(path) for path in tmp_path.glob("*/logs/*/rank_0.out"))
        assert len({line for line in logs.splitlines() if line.startswith("weights ")}) == 1


@pytest.mark.soak
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("name", _LIBRARIES)
def test_a_library_script_disturbed_again_and_again_equals_itself_alone(
    name: str, prompt_cluster: Cluster, tmp_path: Path
) -> None:
    dice = random.Random(name)
    held = [dice.randint(1, 3) for _ in range(_TIMES)]
    go = [tmp_path / f"go-{number}" for number in range(_TIMES)]
    faults = ",".join(
        f"step.end:until={file}:0:{step}:{number}"
        for number, (file, step) in enumerate(zip(go, held, strict=True), 1)
    )
    words = [*_WORDS, *_LIMITS, *_LIBRARIES[name], "--", "--out", str(tmp_path / "out")]
    script, environment = str(SCRIPTS / f"{name}.py"), prompt_cluster.env(R1HPC_FAILPOINT=faults)
    done = submit(tmp_path, "disturbed", *words, job=script, env=environment)
    run = done.run
    for number, step in enumerate(held, 1):
        wait_held(run, number, step)
        if number % 2:
            prompt_cluster.preempt(int(done.job_id))
            time.sleep(3)  # until the signal is handed on
            go[number - 1].touch()
        else:
            time.sleep(dice.uniform(0, 0.5))
            os.kill(dice.choice(script_pids(run)), signal.SIGKILL)
        wait_attempt(run, number + 1, 600)
    assert_ended(run, _TIMES)
    logs = "".join(path.read_text() for path in run.logs.glob("attempt_*/rank_0.out"))
    lines = alone(f"{name}.py", tmp_path / "alone", ranks=2)
    assert words_of(logs) == lines
    assert len(lines) > 8


def assert_ended(run: RunDir, times: int) -> None:
    """Every odd attempt was preempted, every even one killed, the last finished."""
    causes = [Cause.preempted if number % 2 else Cause.crash for number in range(1, times + 1)]
    ended = [attempt.cause for attempt in wait_over(run, 600)]
    assert ended == [*causes, Cause.finished], "\n".join(a.detail for a in read_history(run).attempts)
