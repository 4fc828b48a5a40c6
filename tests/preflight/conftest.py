"""What the doctor's tests plant: faults of system calls, and an allocation of one node."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def faults(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The library to preload."""
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    source = Path(__file__).with_name("faults.c")
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return str(library)


@pytest.fixture
def one_node(tmp_path: Path) -> dict[str, Any]:
    """The environment of an allocation of this machine alone: srun drops its own options, starts the rest."""
    folder = tmp_path / "srun"
    folder.mkdir()
    lines = ("while [[ $1 == --* ]]; do shift; done", 'SLURM_NODEID=0 SLURMD_NODENAME=n1 exec "$@"')
    (folder / "srun").write_text("\n".join(("#!/bin/bash", *lines)))
    (folder / "srun").chmod(0o700)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n1"}
    return {"PATH": f"{folder}:{os.environ['PATH']}", **job}
