"""The six ways of going on: how each is submitted, and what it says about the end of an attempt."""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1hpc.attempt.state.unended import corrected_history
from r1hpc.base.run_dir import RunDir
from tests.cluster import Cluster

CHECKOUT = Path(__file__).resolve().parents[2]
LEGEND = {
    "plain": "plain `--requeue`",
    "wrapper": "the same, requeued after any failure",
    "r1hpc": "r1hpc",
    "submitit": "submitit Checkpointable",
    "lightning": "Lightning SLURM requeue",
    "trainer": "Trainer just-in-time checkpoint",
}
_MINUTES = "40"
_SCRIPTS = {
    "plain": "exec srun {python} -m benchmarks.faults.jobs.by_plain {out}",
    "wrapper": 'srun {python} -m benchmarks.faults.jobs.by_plain {out} || scontrol requeue "$SLURM_JOB_ID"',
    "lightning": "#SBATCH --signal=USR1@30\nexec srun {python} -m benchmarks.faults.jobs.by_lightning {out}",
    # After a just-in-time checkpoint the script exits with 0: it must ask for its requeue by itself.
    "trainer": "#SBATCH --signal=TERM@30\ntrap : TERM\n"
    "srun {python} -m benchmarks.faults.jobs.by_trainer {out} || exit\n"
    '[ -e {out}/finished ] || scontrol requeue "$SLURM_JOB_ID"',
}


@dataclass
class Job:
    """One arm's job in a cell of the table."""

    arm: str
    folder: Path  # what the arm writes
    log: Path  # what the bench reads of it
    moment: int  # the step of the fault
    number: int = 0
    struck_at: int | None = None  # the last step in its record when it was struck
    over: bool = False

    def steps(self) -> list[int]:
        """Return the steps that were taken, in order."""
        log = self.log / "steps"
        return [*map(int, log.read_text().split())] if log.exists() else []


def submit(cluster: Cluster, job: Job, variables: Mapping[str, str]) -> None:
    """Submit the job as a user of this arm does. 40 GB give each a node of its own."""
    out = job.folder / "out"
    out.mkdir()
    path = f"{Path(sys.executable).parent}:{cluster.env()['PATH']}"
    own = {"PATH": path, "TMPDIR": str(job.folder), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    env: Any = {**own, **variables}
    if job.arm in _SCRIPTS:
        script = _SCRIPTS[job.arm].format(python=sys.executable, out=out)
        options = ("--requeue", "--qos=scavenger", "--nodes=1", f"--time={_MINUTES}", "--mem=40G")
        output = ("--open-mode=append", f"--output={job.folder}/slurm-%j.out")
        job.number = cluster.submit(script, *options, *output, cwd=CHECKOUT, **env)
        return
    python = [sys.executable, "-m"]
    if job.arm == "submitit":
        argv = [*python, "benchmarks.faults.jobs.by_submitit", str(out), _MINUTES]
    else:
        argv = [*python, "r1hpc", "submit", "-N", "1", "-t", _MINUTES, "--mem=40G", "--qos", "scavenger"]
        argv += ["--run-root", str(out), "--run-name", "run", "--executor", "slurm"]
        argv += [
            "resources.gpus_per_node=0",
            *(f"script.env.{name}={value}" for name, value in variables.items()),
        ]
        argv += ["-m", "benchmarks.faults.jobs.by_r1hpc"]
    cluster.run(argv, cwd=CHECKOUT, timeout=180, **env)
    job.number = max(map(int, cluster.run(["squeue", "--noheader", "--format=%A"]).stdout.split()))


def causes(job: Job) -> list[str]:
    """Return why each attempt ended by the arm's own record; only r1hpc and submitit state causes."""
    if job.arm == "submitit":
        logs = sorted((job.folder / "out" / "submitit").glob("*.err"))
        return re.findall(r"this job is ([\w-]+)", "".join(path.read_text() for path in logs))
    if job.arm == "r1hpc":
        attempts = corrected_history(RunDir(job.folder / "out" / "run")).attempts
        ends = [f"{attempt.cause} {attempt.detail}".strip() for attempt in attempts if attempt.cause]
        return [end for end in ends if not end.startswith("finished")]
    return []
