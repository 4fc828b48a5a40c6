"""Protect the payload that submitit unpickles on each rank: a reference to one function and one path.

submitit's own DelayedSubmission writes the pickle, a few hundred bytes: the function by name (its code is the
run's frozen code/) and the run folder as a string.

srun starts this file on each rank: it checks the payload, then lets submitit load it. `begin` checks it
before. `carry_over` copies it for a job that is submitted again.
"""

import os
import pickle
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from r1hpc.base.cli import run_command
from r1hpc.base.errors import StateError
from r1hpc.base.files import check_owned, is_listed
from r1hpc.slurm import rank_env

FOLDER = "submitit"
_SUFFIX = "_submitted.pkl"
_UNNAMED = "[0-9a-f]" * 32 + ".pkl"
"""submitit's name for it until sbatch returned the job's id."""
ENTRY_POINT = ("r1hpc.launch", "run_rank")
_NAMES = (("submitit.core.utils", "DelayedSubmission"), ENTRY_POINT)


def folder_of(run: Path) -> Path:
    return run / FOLDER


def path_of(run: Path, job_id: str) -> Path:
    """Return the name submitit looks for (submitit.core.utils.JobPaths.submitted_pickle)."""
    return folder_of(run) / f"{job_id}{_SUFFIX}"


def check(run: Path, job_id: str, patience_s: float = 60.0) -> None:
    """Wait for the payload of a job, then refuse it unless nobody else can have written it.

    The job can start before the submitting process, which gets the job id from sbatch, has renamed the
    payload. A job submitted by another job's script has none, nor has one whose submission was interrupted:
    it uses the run's newest. Raise StateError if it is not there in time, a symbolic link, of another user,
    or open to other writers; the same of the folders above it; or if it names code that no submission names.
    """
    path = path_of(run, job_id)
    deadline = time.monotonic() + patience_s
    while not is_listed(path):
        if time.monotonic() > deadline - patience_s / 2:
            carry_over(run, job_id)
        if time.monotonic() > deadline:
            raise StateError(
                f"{path} did not appear within {patience_s:g} s: was the submission interrupted?"
            )
        time.sleep(0.2)
    for part in (run, folder_of(run), path):
        check_owned(part)
    with path.open("rb") as file:
        try:
            _Reader(file).load()
        except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError) as error:
            raise StateError(f"{path} is damaged ({error}): resume the run with submit --resume") from None


class _Stub:
    """A stand-in for every name in a payload, so that reading one runs nothing."""

    def __new__(cls, *_: object) -> "_Stub":
        return super().__new__(cls)


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type[_Stub]:
        if (module, name) not in _NAMES:
            raise StateError(
                f"the payload of this job names {module}.{name}, which no submission writes: it was "
                "changed. Resume the run with submit --resume"
            )
        return _Stub


def make_private(run: Path) -> None:
    """Remove access that a default ACL may give others to the run's folder, before anybody looks."""
    for path in folder_of(run).glob("*.pkl"):
        path.chmod(0o600)


def carry_over(run: Path, new_id: str) -> None:
    """Give a new job of the same run the newest payload; nothing if the run has none."""
    earlier = _newest(run, f"*{_SUFFIX}") or _newest(run, _UNNAMED)
    if earlier is None:
        return
    check_owned(earlier)
    # Renamed into place: submitit loads the file as soon as its name exists.
    temporary = folder_of(run) / f".{new_id}.tmp"
    shutil.copyfile(earlier, temporary)
    temporary.chmod(0o600)
    temporary.rename(path_of(run, new_id))


def _newest(run: Path, pattern: str) -> Path | None:
    found = folder_of(run).glob(pattern)
    return max(found, key=lambda path: path.lstat().st_mtime, default=None)


def main(argv: Sequence[str]) -> int:
    """Check the payload of this job, then let submitit load and run it."""
    from submitit.core.submission import submitit_main

    check(Path(argv[0]).absolute().parent, rank_env.job_id(os.environ) or "")
    submitit_main()
    return 0


if __name__ == "__main__":
    run_command(main)
