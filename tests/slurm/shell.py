"""Run the job script in bash, with stand-ins for srun, scontrol and Python that note how they are called."""

import subprocess
from pathlib import Path

from r1hpc.slurm.script import FUNCTIONS, Script, render
from r1hpc.slurm.shell.contract import CURRENT

SHOWN = "JobId=9 JobName=x UserId=me(1) JobState={} Restarts={} EndTime=9 Deadline=N/A PreemptTime={} End=9"
TRAIN = Path(__file__).parents[2] / "sbatch" / "train.sh"


def place_functions(code: Path, last_line: str = "") -> None:
    path = code / "r1hpc" / "slurm" / "job.bash"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{FUNCTIONS.read_text()}\n{last_line}")
    (code / "r1hpc" / "launch.py").touch(mode=0o600)
    path.chmod(0o600)


def program(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/bash\n{body}")
    path.chmod(0o700)


def start(
    stage: Path, contract: int = CURRENT, *, by_submitit: bool = False, **variables: str
) -> "subprocess.Popen[str]":
    python = (str(stage / "python"),)
    script = Script(stage / "run", python, 4, {"nodes": "2"}, by_submitit=by_submitit, contract=contract)
    (stage / "job.sh").write_text(render(script))
    environ = {
        "PATH": f"{stage}:/usr/bin:/bin",
        "SLURM_JOB_ID": "9",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_ON_NODE": "32",
        "SLURMD_NODENAME": "n1",
        "SLURM_JOB_END_TIME": "99999999999",
        **variables,
    }
    return subprocess.Popen(["bash", str(stage / "job.sh")], env=environ, text=True, stderr=subprocess.PIPE)


def calls_of(stage: Path) -> list[str]:
    return (stage / "calls").read_text().splitlines()


def start_train(stage: Path, *words: str, **variables: str) -> str:
    """Return the output of sbatch/train.sh, submitted in a clone."""
    if not (stage / "r1hpc").exists():
        place_functions(stage)
    (stage / "r1hpc" / "submit.py").touch()
    environ = {
        "PATH": f"{stage}:/usr/bin:/bin",
        "SLURM_JOB_ID": "9",
        "SLURM_JOB_NAME": "train",
        "SLURM_SUBMIT_DIR": str(stage),
        "SLURMD_NODENAME": "n1",
        "SLURM_JOB_END_TIME": "99999999999",
        "R1HPC_PYTHON": str(stage / "python"),
        **variables,
    }
    command = ["bash", str(TRAIN), *words]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1, done.stderr
    return done.stdout
