"""Run a script as the attempts of one run would, without a scheduler, and alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

from r1hpc.base.run_dir import RunDir
from r1hpc.checkpoint.store import CheckpointStore
from r1hpc.client.run import AGAIN
from tests.runs import CHECKOUT, run_environment

SCRIPTS = Path(__file__).parent / "scripts"
HOOK = CHECKOUT / "r1hpc/client/hook"


def as_attempt(
    run: RunDir, number: int, command: list[str], **more: object
) -> subprocess.CompletedProcess[str]:
    """Run a command of Python as the only rank of an attempt; `more` are fields of Job."""
    token = f"{number:016x}"
    CheckpointStore(run.checkpoints).begin(number, token)
    for folder in (run.attempt_dir(number), run.ledger):
        folder.mkdir(parents=True, exist_ok=True)
    job = {
        "run": str(run.path),
        "attempt": number,
        "token": token,
        "rank": 0,
        "world_size": 1,
        "local_rank": 0,
    }
    job |= {"num_nodes": 1, "keep": 2, "save_every": 0, "deadlines": {}, **more}
    environment = run_environment() | {"R1HPC_RUN_DIR": str(run.path), "R1HPC_CLIENT": json.dumps(job)}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (HOOK, CHECKOUT)))
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=600
    )


def resumed(run: RunDir, script: str, *words: str) -> tuple[int, list[str]]:
    """Run a script that stops itself, until it is finished; return the attempts and its lines."""
    command, lines = [str(SCRIPTS / script), "--out", str(run.path.parent / "out"), *words], []
    for number in range(1, 9):
        done = as_attempt(run, number, command)
        lines += done.stdout.splitlines()
        assert done.returncode in (0, AGAIN), done.stderr
        if done.returncode == 0:
            break
    return number, lines_of(lines)


def alone(script: str, folder: Path, *words: str) -> list[str]:
    """Run the script by plain Python."""
    command = [sys.executable, str(SCRIPTS / script), "--out", str(folder), *words]
    done = subprocess.run(command, env=run_environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return lines_of(done.stdout.splitlines())


def lines_of(lines: list[str]) -> list[str]:
    return sorted({line for line in lines if line.startswith(("logged", "weights"))})
