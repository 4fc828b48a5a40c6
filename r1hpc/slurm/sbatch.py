"""Hand a job script to sbatch, once: a submission whose answer was lost is found again, not repeated.

job_id = sbatch(run.script, run.path)

squeue shows nothing by which a client could mark its submission, but the folder that a job starts in. Every
job of a run starts in the run's folder: one that was not there before sbatch was called is the one it made.
"""

import re
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from r1hpc.base.errors import StateError
from r1hpc.slurm.client import SlurmError, call, call_for_stderr, retry, without_advice
from r1hpc.slurm.dependency import jobs_by_folder
from r1hpc.slurm.environment import exported
from r1hpc.slurm.refusals import is_for_good, with_choices

PATIENCE_S = 600.0
"""How long Slurm may be silent ahead of a submission, and after one whose answer was lost."""
_TIMEOUT_S = 120.0
_TRIAL_S = 15.0
_LOOKS, _PAUSE_S = 5, 3.0
"""A request that waited for a controller that was frozen is served within a moment of its return."""


class LostSubmissionError(SlurmError):
    """sbatch may have made a job, and Slurm does not say; or it has, and the disk took no note of it."""


def sbatch(
    script: Path,
    folder: Path,
    options: Sequence[str] = (),
    known: Collection[str] | None = None,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> str:
    """Submit a script whose job starts in `folder`; the job's id.

    Args:
        known: the folder's jobs that are on record; another one that waits or runs is refused. None: any may.

    Raises:
        SlurmError: sbatch refused, or was not heard: no job came of it.
        LostSubmissionError: there may be a job of it.
        StateError: a job of this folder is in the queue that is not on record.
    """
    before = _jobs_in(folder, sleep, clock)
    if known is not None and set(before) - set(known):
        _refuse_unknown(folder, known)  # of those, the ones that have not ended
    try:
        return read_job_id(call(["sbatch", "--parsable", *options, str(script)], _TIMEOUT_S, exported()))
    except SlurmError as error:
        if not error.may_have_arrived:
            raise with_choices(error) from None
        lost: SlurmError | StateError = error
    except StateError as error:
        lost = error
    found = _find_again(folder, set(before), lost, sleep, clock)
    if found is None:
        raise lost
    print(f"the job is there: {found}", file=sys.stderr)
    return found


@dataclass(frozen=True)
class Trial:
    """What Slurm says of a job that is not submitted."""

    sentence: str
    starts: bool = False
    """It says when and where the job would start."""
    was_heard: bool = True


def try_out(text: str) -> Trial:
    """Show a script to Slurm. No job is made.

    Raises:
        SlurmError: it would refuse the job.
    """
    try:
        answer = call_for_stderr(["sbatch", "--test-only"], text, _TRIAL_S, exported())
    except SlurmError as error:
        if is_for_good(error):
            raise with_choices(error) from None
        if error.unreachable:
            return Trial(
                f"Slurm was not asked whether it would take this: {without_advice(error)}", False, False
            )
        said = " ".join(error.stderr.split())
        return Trial(f"Slurm refuses this, unless that is for nodes that are down at the moment: {said}")
    found = re.search(r"to start at (\S+) .*\bon nodes? (\S+)", answer)
    if found:
        return Trial(f"as its queue stands, Slurm would start this at {found[1]} on {found[2]}", starts=True)
    return Trial(" ".join(answer.split()) or "Slurm would take this")


def _jobs_in(folder: Path, sleep: Callable[[float], None], clock: Callable[[], float]) -> list[str]:
    """The folder's jobs, ended ones too. Nothing is submitted yet, so a silent Slurm is asked again."""
    answers: list[dict[Path, list[str]]] = []
    error = retry(
        lambda: answers.append(jobs_by_folder(all_states=True)),
        lambda error: not error.unreachable,
        PATIENCE_S,
        sleep,
        clock,
    )
    if error is not None:
        raise error
    return answers[0].get(folder, [])


def read_job_id(answer: str) -> str:
    """The id in the output of `sbatch --parsable`: ID or ID;CLUSTER, after whatever a site's filter prints.

    Raises:
        StateError: there is none.
    """
    found = re.fullmatch(r"(\d+)(;\S+)?", (answer.strip().splitlines() or [""])[-1])
    if not found:
        raise StateError(
            f"sbatch answered {answer.strip()!r} instead of a job id; look for the job with squeue"
        )
    return found[1]


def _refuse_unknown(folder: Path, known: Collection[str]) -> None:
    unknown = [job for job in jobs_by_folder().get(folder, ()) if job not in known]
    if unknown:
        raise StateError(
            f"job {unknown[-1]} of {folder.name} is in the queue, and its submission was cut off before it "
            f"was written down: scancel {unknown[-1]}, then submit again"
        )


def _find_again(
    folder: Path,
    before: Collection[str],
    lost: SlurmError | StateError,
    sleep: Callable[[float], None],
    clock: Callable[[], float],
) -> str | None:
    """The job of a submission that was not answered; None where Slurm answers again and there is none."""
    reason = " ".join(str(lost).split())
    print(f"{reason}: looking whether the job is there all the same", file=sys.stderr, flush=True)
    deadline = clock() + PATIENCE_S
    looks = 0
    while looks < _LOOKS:
        try:
            new = set(jobs_by_folder(all_states=True).get(folder, ())) - set(before)
        except SlurmError as error:
            if clock() > deadline:
                raise LostSubmissionError(
                    f"{lost}\nSlurm has been silent for {PATIENCE_S:.0f} s since, so there may be a job of it"
                    ": look with squeue"
                ) from error
        else:
            if new:
                return min(new, key=int)  # of an array: its own id, and not that of a task
            looks += 1
        sleep(_PAUSE_S)
    return None
