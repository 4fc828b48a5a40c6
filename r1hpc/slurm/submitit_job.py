"""Submit a run through submitit, with submitit's pickle and task runner but our job script.

submitit's own script has no place for begin and end, and its signal handling saves on rank 0 only; so the
executor below writes the script of `slurm.script` and keeps submitit's payload, naming and task runner.
"""

import os
import pkgutil
import shutil
from collections.abc import Collection
from typing import Any

from submitit.slurm.slurm import SlurmExecutor, SlurmJob

from r1hpc.base.errors import UsageError
from r1hpc.base.failpoints import failpoint
from r1hpc.base.run_dir import RunDir
from r1hpc.slurm import payload
from r1hpc.slurm.sbatch import LostSubmissionError, sbatch


def submit(run: RunDir, num_tasks: int = 1, known: Collection[str] | None = None) -> str:
    """Submit the job.sh of a run and leave the payload for its ranks; return the job id. Raise UsageError if
    there is no Slurm client here; else the errors of `slurm.sbatch`."""
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise UsageError(
            "sbatch is not on PATH: run this on a login node, or take --executor local or --dry-run"
        )
    return _leave_payload(_Executor(run, num_tasks, known=known), run)


def adopt(run: RunDir, job_id: str) -> None:
    """Leave the payload for a job whose submission was cut off after sbatch took it; the job waits for it."""
    if not payload.path_of(run.path, job_id).exists():
        _leave_payload(_Executor(run, 1, job_id=job_id), run)


def _leave_payload(executor: "_Executor", run: RunDir) -> str:
    # submitit creates files with the caller's umask, which may let a group write a pickle. A folder with a
    # default ACL ignores the umask (umask(2)): see payload.make_private.
    before = os.umask(0o077)
    try:
        payload.folder_of(run.path).mkdir(mode=0o700, exist_ok=True)
        try:
            job = executor.submit(pkgutil.resolve_name(".".join(payload.ENTRY_POINT)), str(run.path))
        except OSError as error:
            if executor.job_id is None:
                raise
            raise LostSubmissionError(
                f"job {executor.job_id} was queued, but the file its ranks read could not be written "
                f"({error.strerror}): fix that, then submit again"
            ) from error
    finally:
        os.umask(before)
    return str(job.job_id)


class _Executor(SlurmExecutor):  # type: ignore[misc]  # submitit has no types we follow
    """submitit's Slurm executor with the run's own script."""

    def __init__(
        self, run: RunDir, num_tasks: int, job_id: str | None = None, known: Collection[str] | None = None
    ) -> None:
        super().__init__(folder=payload.folder_of(run.path))
        self._run = run
        self._known = known
        self._tasks = num_tasks
        self.job_id = job_id
        """None until there is a job."""

    def _num_tasks(self) -> int:
        return self._tasks

    def _submit_command(self, command: str) -> Any:
        """Submit; submitit calls this once the payload is in its folder under a temporary name."""
        payload.make_private(self._run.path)
        self.job_id = self.job_id or sbatch(self._run.script, self._run.path, known=self._known)
        failpoint("sbatch.answered")
        return SlurmJob(folder=self.folder, job_id=self.job_id, tasks=list(range(self._tasks)))
