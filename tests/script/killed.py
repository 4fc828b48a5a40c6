"""Kill a script at random moments, saves included, and check that what it was told is saved is found again.

    python -m tests.script.killed SCRIPT LIBRARY KILLS FOLDER [WORDS]

Each attempt is a fork of this process, which has imported LIBRARY: a start takes no import of torch.
WORDS are the script's; those with {checkpoint} are left out before the first one.
"""

import ctypes
import importlib
import os
import random
import re
import runpy
import shutil
import signal
import sys
import time
from pathlib import Path

from r1hpc.base.run_dir import RunDir
from r1hpc.checkpoint.fence import incarnation_dir
from r1hpc.checkpoint.store import CheckpointStore
from r1hpc.client import hooks
from r1hpc.client.job import Job
from tests.script.hits import SCRIPTS

_PR_SET_PDEATHSIG = 1


def main() -> None:
    script, library, kills, folder = sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
    run, dice = RunDir(folder / "run"), random.Random(script)
    os.environ |= {"OMP_NUM_THREADS": "1", **job_of(run, 0).to_environ()}
    hooks.install()
    importlib.import_module(library)
    if "torch" in sys.modules:
        importlib.import_module("torch._dynamo")  # else the first optimizer of each attempt does
    attempt = acknowledged = killed = inside = resumed = 0
    weights: list[str] = []
    while killed < kills:
        attempt += 1
        status = start_and_kill(run, attempt, script, dice)
        printed = (folder / "out.txt").read_text()
        if found := re.search(r"^(starting|resuming after step (\d+))$", printed, re.MULTILINE):
            assert int(found[2] or 0) >= acknowledged, printed
            resumed += found[2] is not None
        acknowledged = max(
            [acknowledged, *map(int, re.findall(r"^saved step (\d+)$", printed, re.MULTILINE))]
        )
        assert os.WIFSIGNALED(status) or status == 0, printed
        killed += os.WIFSIGNALED(status)
        inside += is_saving(run, attempt)
        if status == 0:  # trained to its end: once more from the beginning
            weights += re.findall("^weights .*", printed, re.MULTILINE)
            shutil.rmtree(run.path)
            attempt = acknowledged = 0
        counts = f"{killed} kills, {inside} inside a save, {resumed} resumes"
        print(f"{script}: {counts}, {len(weights)} times trained to the end", flush=True)
        assert len(set(weights)) <= 1, weights
    assert inside > kills / 20
    assert resumed > kills / 4


def start_and_kill(run: RunDir, attempt: int, script: str, dice: random.Random) -> int:
    """Kill it some time after some saves; return its status as os.wait gives it."""
    CheckpointStore(run.checkpoints).begin(attempt, f"{attempt:016x}")
    run.attempt_dir(attempt).mkdir(parents=True)
    log = run.path.parent / "out.txt"
    log.write_text("")
    pid = os.fork()
    if pid == 0:
        be_the_script(run, attempt, script, log)
    saves, in_a_save = dice.randint(0, 4), dice.random() < 0.5
    while log.read_text().count("saved step") < saves or (in_a_save and not is_saving(run, attempt)):
        if (ended := os.waitpid(pid, os.WNOHANG))[0]:
            return ended[1]
        time.sleep(0.001)
    time.sleep(dice.uniform(0, 0.02 if in_a_save else 0.2))
    os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def is_saving(run: RunDir, attempt: int) -> bool:
    """True if a save is begun and not committed."""
    return any(incarnation_dir(run.checkpoints, attempt, f"{attempt:016x}").glob("step-*"))


def be_the_script(run: RunDir, attempt: int, script: str, log: Path) -> None:
    """Run the script in this fork, as the rank would start it."""
    status = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        file = os.open(log, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        checkpoint = CheckpointStore(run.checkpoints).newest_verified()
        folders = [path for path in checkpoint.path.iterdir() if path.is_dir()] if checkpoint else []
        newest = str(folders[0]) if folders else ""
        words = [word for word in sys.argv[5:] if newest or "{checkpoint}" not in word]
        os.environ |= job_of(run, attempt).to_environ() | {"R1HPC_CLIENT_PID": str(os.getpid())}
        sys.argv = [str(SCRIPTS / script), "--out", str(run.path / "out")]
        sys.argv += [word.replace("{checkpoint}", newest) for word in words]
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    finally:
        if status:
            sys.excepthook(*sys.exc_info())
        sys.stdout.flush()
        os._exit(status)


def job_of(run: RunDir, attempt: int) -> Job:
    return Job(str(run.path), attempt, f"{attempt:016x}", 0, 1, 0, 1, 2, 2, {})


if __name__ == "__main__":
    main()
