"""Start `r1hpc.launch` with a run's frozen code in a new session, so that it outlives its parent.

The local supervisors of runs and chains, and the trackers, are started this way.
"""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from r1hpc.base.run_dir import RunDir

_FOREIGN = ("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SUBMITIT_", "R1HPC_LOCAL_", "OMPI_", "PMI_", "PMIX_")
_FOREIGN_NAMES = frozenset(
    ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "R1HPC_ATTEMPT")
)


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


def without_foreign_ranks(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without a rank's or job's variables: for a local run started inside one."""
    return {
        name: value
        for name, value in environ.items()
        if name not in _FOREIGN_NAMES and not (name.startswith(_FOREIGN) and name != "SLURM_CONF")
    }
