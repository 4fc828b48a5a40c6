"""The submit command in a process of its own, and an sbatch at the edge of the world. No Slurm."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def submit(place: Path, *words: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run the command with a PATH that holds only what the test put there (and git)."""
    environ = {"PATH": f"{place}/bin", "HOME": str(place), "PYTHONPATH": str(ROOT), **variables}
    argv = [sys.executable, "-m", "r1hpc.submit", *words, "--run-root", str(place / "runs")]
    return subprocess.run(argv, env=environ, cwd=place, capture_output=True, text=True)


def fake_sbatch(place: Path, body: str = "echo 41") -> None:
    """sbatch at the edge of the world: notes its environment, answers as it was set up."""
    for name in ("sbatch", "srun"):
        path = place / "bin" / name
        path.write_text(f'#!/bin/bash\n[ "$1" != --version ] || exit 0\nexport -p > {place}/env\n{body}\n')
        path.chmod(0o700)
    (place / "bin" / "squeue").write_text("#!/bin/bash\n")
    (place / "bin" / "squeue").chmod(0o700)


def answer(done: "subprocess.CompletedProcess[str]") -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result
