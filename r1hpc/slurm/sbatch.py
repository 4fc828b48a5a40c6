"""Submit a job script with sbatch exactly once: if the answer is lost, the job is found, not submitted again.

In squeue only a job's start folder can mark a submission. Every job of a run starts in the run's folder: one
that was not there before sbatch was called is the new one.

If sbatch refuses, the error gets a line with the valid choices, which sbatch does not show. The texts are
those of slurm_errno.c, Slurm 20.11 to 24.11. Slurm gets a few seconds; without an answer its refusal is shown
alone. `try_out` is for a dry run: it shows a script to Slurm and submits nothing.

Only an allow-list of the caller's variables reaches a job, see config/secrets.py.
"""

import os
import pwd
import re
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from r1hpc.base.errors import StateError
from r1hpc.config.secrets import exported
from r1hpc.slurm.client import NO_CONFIGURATION, SlurmError, call, retry, run, without_advice
from r1hpc.slurm.queue import jobs_by_folder

_REFUSAL_TIMEOUT_S = 10.0
_MOST = 12
_OF_THE_MOMENT = (
    "node configuration is not available",
    "partition configuration not available now",
    "requested nodes are busy",
    "required node not available",
)
"""A test's errors while nodes are down, drained or reserved: a submitted job waits for them."""
PATIENCE_S = 600.0
"""Seconds Slurm may be silent before a submission, and after one whose answer was lost."""
_TIMEOUT_S = 120.0
_TRIAL_S = 15.0
_LOOKS, _PAUSE_S = 5, 3.0
"""A request that waited for a frozen controller is served soon after its return."""


def with_choices(error: SlurmError) -> SlurmError:
    """Add a line with the valid choices to sbatch's refusal, if Slurm can list them."""
    for words, ask in _CHOICES.items():
        if words.casefold() in error.stderr.casefold():
            try:
                choices = ask()
            except SlurmError:
                return error
            message = f"{error}\n  {choices}"
            return SlurmError(message, error.exit_code, error.stdout, error.stderr, error.timed_out)
    return error


def _associations(column: str) -> set[str]:
    user = pwd.getpwuid(os.getuid()).pw_name
    question = ["sacctmgr", "-n", "-P", "show", "associations", f"user={user}", f"format={column}"]
    return set(call(question, _REFUSAL_TIMEOUT_S).split())


def _partitions() -> str:
    """Return the partitions with a node's resources; GPUs in Slurm's notation."""
    lines = call(["sinfo", "-h", "-o", "%R|%D|%c|%m|%G|%l"], _REFUSAL_TIMEOUT_S).split()
    shown = [
        f"{name}: {nodes} nodes of {cpus} CPUs, {memory} MB, {gres}, up to {limit}".replace(", (null)", "")
        for name, nodes, cpus, memory, gres, limit in (line.split("|") for line in lines)
    ]
    return "\n  ".join(["partitions here (-p PARTITION):", *shown[:_MOST]])


def _qos() -> str:
    names = {name for line in _associations("qos") for name in line.split(",")}
    return _listed("your QOS", names, "--qos QOS")


def _features() -> str:
    lines = call(["sinfo", "-h", "-o", "%f"], _REFUSAL_TIMEOUT_S).split()
    names = {name for line in lines for name in line.split(",")} - {"(null)"}
    return _listed("features of the nodes here", names, "-C FEATURE")


def _listed(what: str, names: set[str], flag: str) -> str:
    if not names:
        return f"{what}: none that Slurm shows"
    shown = ", ".join(sorted(names)[:_MOST]) + (", ..." if len(names) > _MOST else "")
    return f"{what}: {shown} ({flag})"


_CHOICES: dict[str, Callable[[], str]] = {
    "invalid account": lambda: _listed("your accounts", _associations("account"), "-A ACCOUNT"),
    "invalid qos": _qos,
    "invalid partition": _partitions,
    "node count specification invalid": _partitions,
    "more processors requested than permitted": _partitions,
    "node configuration is not available": _partitions,
    "requested time limit is invalid": _partitions,
    "invalid feature": _features,
}


class LostSubmissionError(SlurmError):
    """sbatch may have made a job, and Slurm does not say; or it has, and its job ID could not be saved."""


def sbatch(
    script: Path, folder: Path, options: Sequence[str] = (), known: Collection[str] | None = None
) -> str:
    """Submit a script whose job starts in `folder`; return the job's id.

    Raise SlurmError if sbatch refused or was not reached: there is no job. Raise LostSubmissionError if there
    may be a job. Raise StateError if the queue has a job of this folder that is not recorded.

    Args:
        known: the folder's recorded jobs; another one that waits or runs is refused. None: any may.
    """
    # A silent Slurm is asked again: nothing is submitted yet.
    jobs = retry(lambda: jobs_by_folder(all_states=True), lambda error: not error.unreachable, PATIENCE_S)
    before = set(jobs.get(folder, ()))
    if known is not None and before - set(known):
        unknown = [job for job in jobs_by_folder().get(folder, ()) if job not in known]  # not ended
        if unknown:
            raise StateError(
                f"job {unknown[-1]} of {folder.name} is in the queue, and its submission was cut off before "
                f"it was written down: scancel {unknown[-1]}, then submit again"
            )
    try:
        return read_job_id(call(["sbatch", "--parsable", *options, str(script)], _TIMEOUT_S, exported()))
    except SlurmError as error:
        if not error.may_have_arrived:
            raise with_choices(error) from None
        lost: SlurmError | StateError = error
    except StateError as error:
        lost = error
    found = _find_again(folder, before, lost)
    if found is None:
        raise lost
    print(f"the job is there: {found}", file=sys.stderr)
    return found


@dataclass(frozen=True)
class Trial:
    """Slurm's answer about a job that is not submitted."""

    sentence: str
    starts: bool = False
    """True if it gives the time and nodes of the start."""
    was_heard: bool = True


def try_out(text: str) -> Trial:
    """Show a script to Slurm without making a job; raise SlurmError if it would refuse the job."""
    try:
        answer = run(["sbatch", "--test-only"], _TRIAL_S, exported(), text=text).stderr
    except SlurmError as error:
        if error.unreachable or NO_CONFIGURATION in error.stderr:
            why = without_advice(error)
            return Trial(f"Slurm was not asked whether it would take this: {why}", was_heard=False)
        if not any(words in error.stderr.casefold() for words in _OF_THE_MOMENT):
            raise with_choices(error) from None
        said = " ".join(error.stderr.split())
        return Trial(f"Slurm refuses this, unless that is for nodes that are down at the moment: {said}")
    found = re.search(r"to start at (\S+) .*\bon nodes? (\S+)", answer)
    if found:
        return Trial(f"as its queue stands, Slurm would start this at {found[1]} on {found[2]}", starts=True)
    return Trial(" ".join(answer.split()) or "Slurm would take this")


def read_job_id(answer: str) -> str:
    """Return the id in the output of `sbatch --parsable`: ID or ID;CLUSTER, after output of a site's filter.
    Raise StateError if there is none."""
    found = re.fullmatch(r"(\d+)(;\S+)?", (answer.strip().splitlines() or [""])[-1])
    if not found:
        raise StateError(
            f"sbatch answered {answer.strip()!r} instead of a job id; look for the job with squeue"
        )
    return found[1]


def _find_again(folder: Path, before: set[str], lost: SlurmError | StateError) -> str | None:
    """Return the job of an unanswered submission; None if Slurm answers again and there is none."""
    reason = " ".join(str(lost).split())
    print(f"{reason}: checking whether the job exists all the same", file=sys.stderr, flush=True)
    deadline = time.monotonic() + PATIENCE_S
    looks = 0
    while looks < _LOOKS:
        try:
            new = set(jobs_by_folder(all_states=True).get(folder, ())) - before
        except SlurmError as error:
            if time.monotonic() > deadline:
                raise LostSubmissionError(
                    f"{lost}\nSlurm has been silent for {PATIENCE_S:.0f} s since, so there may be a job of it"
                    ": look with squeue"
                ) from error
        else:
            if new:
                return min(new, key=int)  # for an array its own id, not a task's
            looks += 1
        time.sleep(_PAUSE_S)
    return None
