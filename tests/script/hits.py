"""Run a script alone and under r1hpc with kills and stops, and return its lines of losses and weights."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from r1hpc.base.run_dir import RunDir
from r1hpc.slurm.rank_env import choose_port
from r1hpc.telemetry.records.attempts import Attempt
from tests.runs import CHECKOUT, at, kill_rank, run_environment, submit, wait_attempt, wait_over, wait_until

SCRIPTS = Path(__file__).parent / "scripts"


def alone(script: str, folder: Path, ranks: int = 1) -> list[str]:
    """Run `python script.py --out FOLDER`, as many processes as there are ranks."""
    with choose_port() as listener:
        port = str(listener.getsockname()[1])
    processes = []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        variables = {name: str(value) for name, value in place.items()} if ranks > 1 else {}
        environment = run_environment() | variables | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, str(SCRIPTS / script), "--out", str(folder)]
        processes.append(
            subprocess.Popen(command, env=environment, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True)
        )
    said = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * ranks
    return words_of(said[0])


def hit(
    root: Path, script: str, *words: str, ranks: int = 1, steps: tuple[int, int, int, int] = (11, 1, 4, 7)
) -> tuple[list[Attempt], list[str]]:
    """Run it with a SIGKILL, a SIGKILL during a save, a SIGTERM to the rank, and a STOP before a resume.

    Args:
        steps: counted in each attempt: the step of the SIGKILL, the save that is killed, the step of the
            SIGTERM, the step of the STOP.
    """
    run = RunDir(root / "hit")
    term, stop = root / "term", run.stop
    faults = at(
        f"step.end:kill9:{ranks - 1}:{steps[0]}:1",
        f"commit.rename.before:kill9:0:{steps[1]}:2",
        f"step.end:until={term}:0:{steps[2]}:3",
        f"step.end:until={stop}:0:{steps[3]}:4",
        f"step.end:sleep=1.1:0:{steps[3] + 1}:4",  # it looks for the file once a second
    )
    given = [
        "--nodes",
        str(ranks),
        "resources.gpus_per_node=0",
        "limits.max_crashes=3",
        *words,
        "--",
        "--out",
        str(root / "out"),
    ]
    submit(root, "hit", *given, job=str(SCRIPTS / script), env=faults)
    wait_attempt(run, 3, 600)
    wait_held(run, 3, steps[2])
    kill_rank(run, 0, signal.SIGTERM)
    time.sleep(2)  # until it is handed on
    term.touch()
    wait_attempt(run, 4, 600)
    wait_held(run, 4, steps[3])
    stop.touch()
    wait_over(run, 600)
    submit(root, "hit", "--resume")
    attempts = wait_over(run, 600)
    logs = [log.read_text() for log in run.logs.glob("attempt_*/rank_0.out")]
    return attempts, words_of("".join(logs))


def recorded(run: RunDir, attempt: int) -> int:
    """Steps that this attempt has recorded; the record of the last may wait for the step after it."""
    return run.train_metrics.read_text().count(f'"attempt": {attempt},') if run.train_metrics.exists() else 0


def wait_held(run: RunDir, attempt: int, step: int) -> None:
    """Wait until rank 0 is held at the end of this attempt's `step`th step."""
    wait_until(f"step of attempt {attempt}", lambda: recorded(run, attempt) >= max(1, step - 1), 600, run)


def words_of(text: str) -> list[str]:
    """Return its lines of losses and weights, each once: a step that is repeated logs the same line."""
    return sorted(set(re.findall("^(?:logged|weights) .*", text, re.MULTILINE)))
