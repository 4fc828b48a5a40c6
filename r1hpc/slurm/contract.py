"""What a job script and the code that was frozen beside it have agreed on: statuses and options.

A run keeps the code of its first submission, while `submit --resume` writes a newer job script. Of a run's
frozen code `of_frozen` tells which contract it knows; the script holds that number and acts by it:

    1   r1hpc 0.1.0: any failure of `launch begin` and `launch end` is final
    2   only OVER is: after any other one `begin` is tried again, and after an `end` the shell asks for the
        requeue; `end` knows --hurry
    3   `begin` knows --payload; before, `python -m r1hpc.slurm.payload RUN_DIR` had to come first
    4   `python -m r1hpc.slurm.payload RUN_DIR/submitit` checks the payload on each rank, then runs it;
        `begin` leaves with NOT_THE_NODE where the run's disk or records are at fault, the reason on stdout
"""

import re
from pathlib import Path

from r1hpc.base.errors import UsageError

CURRENT = 4
OVER = 3
"""Exit status after which the job must not run again; a Python that cannot start leaves with 1."""
HELD = "r1hpc: "
"""How the job script begins the comment of a job that it holds."""
NOT_THE_NODE = 4
"""Exit status after which no other node can help: the job is tried again for a while, then held."""


def of_frozen(code: Path) -> int:
    """The contract that the frozen code of a run knows; of a run that has none yet, this code's.

    Raises:
        UsageError: it is newer than this code, whose job script would not understand it.
    """
    if not (code / "r1hpc").is_dir():
        return CURRENT
    try:
        text = (code / "r1hpc" / "slurm" / "contract.py").read_text()
    except FileNotFoundError:
        return 1
    found = re.search(r"^CURRENT = (\d+)$", text, re.M)
    number = int(found[1]) if found else 1
    if number > CURRENT:
        raise UsageError(
            f"the code frozen in {code} is newer than this r1hpc: resume the run with the version of then"
        )
    return number
