"""Define the contract between a job script and the code frozen beside it: exit statuses and options.

A run keeps the code of its first submission, while `submit --resume` writes a newer job script. `of_frozen`
returns the contract that a run's frozen code knows; the script stores that number and follows it:

    1   r1hpc 0.1.0: any failure of `launch begin` and `launch end` is final
    2   only OVER is final: after other failures `begin` is retried, and after an `end` the shell asks for the
        requeue; `end` knows --hurry
    3   `begin` knows --payload; before, `python -m r1hpc.slurm.payload RUN_DIR` had to come first
    4   `python -m r1hpc.slurm.payload RUN_DIR/submitit` checks the payload on each rank, then runs it;
        `begin` exits with NOT_THE_NODE if the run's disk or records are at fault, the reason on stdout
    5   the job script sources `slurm/job.bash` of the frozen code; a resume writes this version's into older
        code, and it follows the number too
"""

import re
from pathlib import Path

from r1hpc.base.errors import UsageError

CURRENT = 5
OVER = 3
"""Exit status after which the job must not run again; a Python that cannot start exits with 1."""
HELD = "r1hpc: "
"""Start of the comment that the script gives a held job."""
NOT_THE_NODE = 4
"""Exit status if no other node can help: the job is retried for a while, then held."""
MAYBE_THE_NODE = 5
"""Exit status if another node tells whether this one is at fault: the same words there hold the job."""
REASON_FD = "R1HPC_REASON_FD"
"""Names the open file in which `end` leaves the job script the reason of NOT_THE_NODE."""


def of_frozen(code: Path) -> int:
    """Return the contract of a run's frozen code; of a run that has none yet, this code's. Raise UsageError
    if it is newer than this code, and so would not understand this code's script."""
    if not (code / "r1hpc").is_dir():
        return CURRENT
    slurm = code / "r1hpc" / "slurm"
    # Earlier code has the file one folder higher.
    files = [file for file in (slurm / "shell" / "contract.py", slurm / "contract.py") if file.is_file()]
    if not files:
        return 1
    line = re.search(r"^CURRENT = (\d+)$", files[0].read_text(), re.M)
    number = int(line[1]) if line else 1
    if number > CURRENT:
        raise UsageError(
            f"the code frozen in {code} is newer than this r1hpc: resume the run with the version of then"
        )
    return number
