"""Slurm at the edge of the world: jobs are files in a folder, and run only in the test's imagination.

    slurm = FakeSlurm(tmp_path); environment["PATH"] = slurm.path
    slurm.jobs()                       # [Job(job_id="1", folder=..., dependency="", state="PENDING"), ...]
    slurm.set_state("1", "COMPLETED")

For what happens before a job runs; what Slurm does with dependencies is tested on the real one.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

_COMMANDS = ("sbatch", "squeue", "scontrol", "scancel", "srun", "sinfo", "sacctmgr")


@dataclass(frozen=True)
class Job:
    """One job that sbatch was given."""

    job_id: str
    folder: str
    name: str
    dependency: str
    kill_on_invalid: str
    state: str


class FakeSlurm:
    """The commands, and the jobs they know."""

    def __init__(self, root: Path) -> None:
        self._jobs = root / "slurm-jobs"
        self._jobs.mkdir()
        self.bin = root / "slurm-bin"
        self.bin.mkdir()
        for name in _COMMANDS:
            script = self.bin / name
            script.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E {__file__} {self._jobs} {name} "$@"\n')
            script.chmod(0o700)

    def jobs(self) -> list[Job]:
        """All jobs, oldest first."""
        paths = sorted(self._jobs.glob("*.json"), key=lambda path: int(path.stem))
        return [Job(**json.loads(path.read_text())) for path in paths]

    def set_state(self, job_id: str, state: str) -> None:
        _change(self._jobs / f"{job_id}.json", state=state)


def _change(path: Path, **fields: str) -> None:
    _write(path, {**json.loads(path.read_text()), **fields})


def _write(path: Path, job: dict[str, str]) -> None:
    """Whole at once: a test may read it at any moment."""
    staged = path.with_suffix(".staged")
    staged.write_text(json.dumps(job))
    staged.rename(path)


def _sbatch(jobs: Path, words: list[str]) -> int:
    if "--version" in words:
        return 0
    if "--test-only" in words:
        sys.stdin.read()
        print("sbatch: Job 1 to start at 2026-01-01T00:00:00 using 8 processors on nodes n1", file=sys.stderr)
        return 0
    options = {}
    for line in Path(words[-1]).read_text().splitlines():
        if line.startswith("#SBATCH --"):
            key, _, value = line.removeprefix("#SBATCH --").partition("=")
            options[key] = value.strip("'")
    job_id = str(len(list(jobs.glob("*.json"))) + 1)
    job = Job(
        job_id,
        options["chdir"],
        options["job-name"],
        options.get("dependency", ""),
        options.get("kill-on-invalid-dep", ""),
        "PENDING",
    )
    _write(jobs / f"{job_id}.json", vars(job))
    print(job_id)
    return 0


def _squeue(jobs: Path, words: list[str]) -> int:
    assert words[:4] == ["--me", "-h", "-o", "%A %Z"], words
    shown = None if "all" in words else ("PENDING", "RUNNING")
    for path in jobs.glob("*.json"):
        job = json.loads(path.read_text())
        if shown is None or job["state"] in shown:
            print(job["job_id"], job["folder"])
    return 0


def _scontrol(jobs: Path, words: list[str]) -> int:
    if words[0] == "update":
        asked = dict(word.split("=", 1) for word in words[1:])
        _change(jobs / f"{asked['JobId']}.json", dependency=asked["Dependency"])
        return 0
    if words[:3] != ["show", "job", "-o"]:
        return 1
    path = jobs / f"{words[3]}.json"
    if not path.is_file():
        print("slurm_load_jobs error: Invalid job id specified", file=sys.stderr)
        return 1
    job = json.loads(path.read_text())
    about = f"JobId={job['job_id']} JobName={job['name']} UserId=u({os.getuid()}) JobState={job['state']}"
    print(f"{about} Restarts=0 WorkDir={job['folder']}")
    return 0


def _scancel(jobs: Path, words: list[str]) -> int:
    _change(jobs / f"{words[-1]}.json", state="CANCELLED")
    return 0


if __name__ == "__main__":
    _commands = {"sbatch": _sbatch, "squeue": _squeue, "scontrol": _scontrol, "scancel": _scancel}
    _command = _commands.get(sys.argv[2])
    sys.exit(_command(Path(sys.argv[1]), sys.argv[3:]) if _command else 1)
