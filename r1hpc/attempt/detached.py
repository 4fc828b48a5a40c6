"""Start `r1hpc.launch` with a run's frozen code in a new session, so that it outlives its parent."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from r1hpc.base.run_dir import RunDir
from r1hpc.slurm.sbatch import without_foreign_ranks


def start_detached(
    arguments: Sequence[str], run: RunDir, log: Path, keep: Sequence[int] = ()
) -> "subprocess.Popen[bytes]":
    """Start `python -m r1hpc.launch ARGUMENTS`."""
    environment = {
        **without_foreign_ranks(os.environ),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(run.code), os.environ.get("PYTHONPATH")])),
        "PYTHONSAFEPATH": "1",
    }
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-u", "-m", "r1hpc.launch", *arguments],
            cwd=run.path,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=tuple(keep),
        )
