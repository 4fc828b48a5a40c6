"""Disturb a job for `drill` as a cluster would, with a user's rights; judge from its records what it lost."""

import math
import os
import re
import signal
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from r1hpc.attempt.state.state import JobRef
from r1hpc.base.run_dir import RunDir
from r1hpc.plan.save_time import ends_jobs, signal_lead_s
from r1hpc.slurm.client import SlurmError, call
from r1hpc.slurm.probe import ClusterFacts, hides_jobs
from r1hpc.slurm.requeue import job_state
from r1hpc.telemetry.records.attempts import Attempt, Cause, History
from r1hpc.telemetry.records.metrics import audit_ledger, compare, format_ranges, read_ledger, read_steps

_PREEMPTED_WITHIN_S = 300.0
_EARLY_S = 30.0
"""slurmctld checks time limits twice a minute, and sends the warning at the check before it is due."""


@dataclass(frozen=True)
class Disturbance:
    """One disturbance of a running job, and what its records must show afterwards."""

    name: str
    apply: Callable[[JobRef], None]
    causes: tuple[Cause, ...]
    """One of these ends the attempt."""
    may_lose_steps: bool = False
    """May lose those since the last checkpoint; else none at all."""
    way: str | None = None
    """The value of --way that selects it."""


def disturbances(
    job: JobRef, ways: Collection[str], preemptor: tuple[str, ...] = (), *, only_ways: bool = False
) -> tuple[Disturbance, ...]:
    """Return the disturbances for the job's executor, in order.

    Args:
        ways: those of usr2, term and preempt to exercise.
        preemptor: sbatch's options for the job that preempts this one.
        only_ways: leave out those without a warning: killed ranks, a requeue.
    """
    preempted = (Cause.preempted, Cause.timeout)  # USR2 is also the warning before a time limit
    by_qos = partial(preempt_by_qos, options=preemptor)
    warned = [
        Disturbance("preemption (USR2)", preempt, preempted, way="usr2"),
        Disturbance("preemption (SIGTERM)", _terminate_ranks, preempted, way="term"),
        Disturbance("preemption (another QOS)", by_qos, preempted, way="preempt"),
    ]
    others = [
        Disturbance("ranks killed (SIGKILL)", _kill_step, (Cause.crash,), True),
        Disturbance("scontrol requeue", _requeue, (Cause.preempted,), True),
    ]
    if job.pid is not None:
        others = [Disturbance("a rank killed (SIGKILL)", _kill_a_rank, (Cause.crash,), True)]
    return (*(each for each in warned if each.way in ways), *([] if only_ways else others))


def why_not_preempted(facts: ClusterFacts) -> str | None:
    """Return why none of the user's jobs can preempt another here; None if one can."""
    if facts.preempt_type is None:
        return "Slurm does not say how it preempts"
    if facts.preempt_type != "preempt/qos":
        return f"no QOS preempts another here (PreemptType={facts.preempt_type})"
    if facts.preempt_mode and not facts.preempt_mode.startswith("OFF") and not ends_jobs(facts.preempt_mode):
        return f"a preemption pauses the job in place here ({facts.preempt_mode})"
    if any(victim == facts.qos for _, victim in facts.preemptors):
        return None
    why = f"your account has no QOS that preempts QOS {facts.qos or 'default'}"
    if facts.preemptors:
        name, victim = facts.preemptors[0]
        why += f"; {name} preempts {victim}: give resources.qos={victim}"
    return why


def short_limit_min(total_s: float, startup_s: float, step_s: float) -> int | None:
    """Return the minutes of a time limit that strikes a run of `total_s` and lets each attempt progress.

    None: there is none, since Slurm's limits are whole minutes.

    >>> short_limit_min(total_s=180, startup_s=10, step_s=1), short_limit_min(40, 10, 1)
    (2, None)
    """
    for minutes in range(1, math.ceil(total_s / 60) + 1):
        warned_s = 60 * minutes - signal_lead_s(None, None, 60 * minutes)
        if warned_s >= total_s:
            return None
        if warned_s - _EARLY_S - startup_s >= max(3 * step_s, (total_s - startup_s) / 10):
            return minutes
    return None


def preempt(job: JobRef) -> None:
    """Send the signal of a preemption: save, end, come back."""
    if job.pid is not None:
        os.kill(job.pid, signal.SIGUSR2)
    else:
        call(["scancel", "--signal=USR2", job.job_id])


def _terminate_ranks(job: JobRef) -> None:
    """Send what Slurm sends at the start of the grace time: SIGTERM to the ranks, not to the batch script."""
    if job.pid is None:
        call(["scancel", "--signal=TERM", job.job_id])
    else:
        for pid in _ranks(job):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)


def preempt_by_qos(job: JobRef, options: tuple[str, ...]) -> None:
    """Make Slurm preempt the job: submit a one-second job in a higher QOS that wants all of its nodes.

    Raise ProcessLookupError if the job is not running; SlurmError if Slurm refuses, it might end other jobs
    too, or nothing happens for five minutes.
    """
    before = job_state(job.job_id)
    if "RUNNING" not in before.states:
        raise ProcessLookupError(f"job {job.job_id} does not run")
    shown = call(["scontrol", "show", "job", "-o", job.job_id])
    nodes = re.search(r" NodeList=(\S+).* NumNodes=(\d+)", shown.partition(" UserId=")[2])
    if nodes is None:
        raise ProcessLookupError(f"job {job.job_id} holds no nodes")
    beside = set(call(["squeue", "--noheader", "--format=%i", f"--nodelist={nodes[1]}"]).split())
    if beside - {job.job_id}:
        raise SlurmError(f"other jobs run on {nodes[1]}, which the preemption would end too")
    if "OverSubscribe=NO" not in shown and hides_jobs():
        raise SlurmError(f"jobs of others, hidden here, may run on {nodes[1]}: give resources.exclusive=true")
    size = ("--time=1", "--exclusive", f"--nodelist={nodes[1]}", f"--nodes={nodes[2]}")
    where = ("--job-name=r1hpc-drill", "--output=/dev/null", "--export=NONE", "--wrap=sleep 1")
    deadline = time.monotonic() + _PREEMPTED_WITHIN_S
    other = call(["sbatch", "--parsable", *options, *size, *where]).strip().partition(";")[0]
    try:
        while True:
            now = job_state(job.job_id)
            if now.preempt_time is not None or now.restarts > before.restarts or "RUNNING" not in now.states:
                return
            if time.monotonic() > deadline:
                raise SlurmError(f"job {other} did not preempt it within {_PREEMPTED_WITHIN_S:.0f} s")
            time.sleep(1.0)
    except BaseException:
        call(["scancel", other])
        raise


def _kill_step(job: JobRef) -> None:
    # The first srun of the job's script is step 0, anew in each attempt.
    call(["scancel", "--signal=KILL", f"{job.job_id}.0"])


def _requeue(job: JobRef) -> None:
    call(["scontrol", "requeue", job.job_id])


def _kill_a_rank(job: JobRef) -> None:
    os.kill(_ranks(job)[-1], signal.SIGKILL)


def _ranks(job: JobRef) -> list[int]:
    """Return a local supervisor's rank processes; raise ProcessLookupError if there is none."""
    children = _proc(f"{job.pid}/task/{job.pid}/children").split()
    pids = [int(pid) for pid in children if b"\0rank\0" in _proc(f"{int(pid)}/cmdline")]
    if not pids:
        raise ProcessLookupError(f"process {job.pid} has no ranks")
    return pids


def _proc(name: str) -> bytes:
    """Return a file of a process in /proc; empty if the process is gone."""
    with suppress(OSError):
        return Path("/proc", name).read_bytes()
    return b""


@dataclass(frozen=True)
class Done:
    name: str
    attempt: int
    causes: tuple[Cause, ...] = ()
    may_lose_steps: bool = False
    refused: str | None = None
    """Why the site did not allow it; then it proves nothing."""
    way: str | None = None
    """The value of --way that it exercised."""


@dataclass(frozen=True)
class Check:
    """One promise, and whether the records show that it was kept."""

    check: str
    passed: bool
    detail: str


def judge_attempts(attempts: Sequence[Attempt], done: Sequence[Done], save_every: int) -> list[Check]:
    """Check that each disturbance ended its attempt with its own cause, and how many steps it cost."""
    by_number = {attempt.attempt: attempt for attempt in attempts}
    checks = []
    for each in (each for each in done if each.refused is None):
        ended, following = by_number[each.attempt], by_number.get(each.attempt + 1)
        lost = (ended.last_step or 0) - ((following.resumed_from or 0) if following else 0)
        allowed = save_every if each.may_lose_steps else 0
        passed = ended.cause in each.causes and following is not None and lost <= allowed
        words = f"attempt {each.attempt} ended by {ended.cause} at step {ended.last_step}"
        checks.append(Check(each.name, passed, f"{words}; {lost} steps taken again, {allowed} allowed"))
    expected = len(checks) + 1
    detail = ", ".join(attempt.cause.value if attempt.cause else "no end" for attempt in attempts)
    finished = bool(attempts) and attempts[-1].cause is Cause.finished and len(attempts) == expected
    if not checks:
        checks.append(Check("disturbed at all", False, "nothing could be done to the job: nothing is proved"))
    return [*checks, Check(f"{expected} attempts, the last one finished", finished, detail)]


def judge_records(quiet: RunDir, disturbed: RunDir) -> list[Check]:
    """Check for the same numbers to the last bit, the same data, and every sample once."""
    differences = compare(quiet, disturbed, ("loss", "grad_norm"))
    steps = len(read_steps(quiet).effective)
    seen = f"{steps} steps"
    if differences:
        first = differences[0]
        values = f"{first.a} and {first.b}"
        seen = f"{len(differences)} differ, first step {first.global_step} {first.key}: {values}"
    ours, theirs = ({n: r.data for n, r in read_ledger(run).items()} for run in (disturbed, quiet))
    audit = audit_ledger(disturbed)
    odd = [*audit.missing_steps, *audit.repeated_samples, *audit.skipped_samples]
    once = f"{audit.num_samples} samples" if audit.exactly_once else f"not once: {format_ranges(odd)}"
    same = Check("loss and gradient norm equal to the bit", bool(steps) and not differences, seen)
    if not theirs:  # a script that records no samples
        return [same]
    return [
        same,
        Check("the same data in every step", ours == theirs, f"{len(ours)} and {len(theirs)} recorded steps"),
        Check("every sample exactly once", audit.exactly_once, once),
    ]


def judge_limited(quiet: RunDir, limited: RunDir, attempts: Sequence[Attempt], limit: str) -> list[Check]:
    """Check that each attempt but the last ended at its time limit without lost steps; same numbers."""
    warned = (Cause.timeout, Cause.preempted)  # USR2 well before the limit looks like a preemption
    done = [Done(limit, each.attempt, warned) for each in attempts[:-1]]
    *ends, last = judge_attempts(attempts, done, save_every=0)
    same = [last, *judge_records(quiet, limited)]
    return [*ends, *(replace(each, check=f"{each.check} ({limit})") for each in same)]


def judge_cancel(history: History, state: str) -> Check:
    """Check that a run that was preempted and cancelled at once stays cancelled."""
    passed = history.is_newer("cancel_requested", "begin") and state == "cancelled"
    return Check("no attempt after a cancel", passed, f"{state}, {len(history.attempts)} attempts")
