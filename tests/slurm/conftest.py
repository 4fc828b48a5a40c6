"""A place where the job script runs without Slurm."""

from pathlib import Path

import pytest

from tests.slurm.shell import place_functions, program


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    """A PATH where `srun` takes half a second and ends with 7, and an interpreter that notes its words."""
    (tmp_path / "run" / "logs").mkdir(parents=True)
    place_functions(tmp_path / "run" / "code")
    program(tmp_path / "srun", f'echo "srun $OMP_NUM_THREADS $*" >> {tmp_path}/calls\nsleep 0.5\nexit 7\n')
    program(
        tmp_path / "python",
        f'echo "python $*" >> {tmp_path}/calls\n'
        f'if [ "$3" = begin ]; then exec cat {tmp_path}/attempt; fi\n'
        "exit 3\n",
    )
    return tmp_path
