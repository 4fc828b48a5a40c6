"""What a user can do to a job of their own, as a cluster does it to them.

for disturbance in disturbances(job):
    disturbance.apply(job)            # SlurmError where the site does not let a user do it
"""

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from r1hpc.attempt.state import JobRef
from r1hpc.slurm.client import call
from r1hpc.telemetry.attempts import Cause

_SUSPENDED_S = 5.0


@dataclass(frozen=True)
class Disturbance:
    """One thing that is done to a running job, and what its record must say afterwards."""

    name: str
    apply: Callable[[JobRef], None]
    causes: tuple[Cause, ...] = ()
    """One of these ends the attempt; empty: the attempt goes on."""
    may_lose_steps: bool = False
    """Since the last checkpoint; else none at all."""


def disturbances(job: JobRef) -> tuple[Disturbance, ...]:
    """Those of the executor that the job runs on, in order."""
    preempted = (Cause.preempted, Cause.timeout)  # USR2 is also the warning before a time limit
    if job.pid is not None:
        return (
            Disturbance("preemption (USR2)", preempt, preempted),
            Disturbance("suspension (SIGSTOP)", _stop_and_continue),
            Disturbance("a rank killed (SIGKILL)", _kill_a_rank, (Cause.crash,), True),
        )
    return (
        Disturbance("preemption (USR2)", preempt, preempted),
        Disturbance("suspension (scontrol suspend)", _suspend_and_resume),
        Disturbance("ranks killed (SIGKILL)", _kill_step, (Cause.crash,), True),
        Disturbance("scontrol requeue", _requeue, (Cause.preempted,), True),
    )


def preempt(job: JobRef) -> None:
    """The signal of a preemption: save, end, come back."""
    if job.pid is not None:
        os.kill(job.pid, signal.SIGUSR2)
    else:
        call(["scancel", "--signal=USR2", job.job_id])


def _kill_step(job: JobRef) -> None:
    # The first srun of the job's script is step 0, anew in each attempt.
    call(["scancel", "--signal=KILL", f"{job.job_id}.0"])


def _requeue(job: JobRef) -> None:
    call(["scontrol", "requeue", job.job_id])


def _suspend_and_resume(job: JobRef) -> None:
    call(["scontrol", "suspend", job.job_id])
    try:
        time.sleep(_SUSPENDED_S)
    finally:
        call(["scontrol", "resume", job.job_id])


def _kill_a_rank(job: JobRef) -> None:
    os.kill(_ranks(job)[-1], signal.SIGKILL)


def _stop_and_continue(job: JobRef) -> None:
    pids = _ranks(job)
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(_SUSPENDED_S)
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):  # the others must go on all the same
                os.kill(pid, signal.SIGCONT)


def _ranks(job: JobRef) -> list[int]:
    """The processes that a local supervisor has started as ranks.

    Raises:
        ProcessLookupError: there is none.
    """
    children = _proc(f"{job.pid}/task/{job.pid}/children").split()
    pids = [int(pid) for pid in children if b"\0rank\0" in _proc(f"{int(pid)}/cmdline")]
    if not pids:
        raise ProcessLookupError(f"process {job.pid} has no ranks")
    return pids


def _proc(name: str) -> bytes:
    """What Linux says of a process; nothing of one that is gone."""
    with suppress(OSError):
        return Path("/proc", name).read_bytes()
    return b""
