"""Decide why an attempt ended, from the ranks' outcomes and logs, srun's status and Slurm's view of the job.

Each rank leaves its outcome in attempts/<k>/rank_<n>.json. `decide` is a pure function, because this decision
costs or saves GPU-hours: every row of its table is a test.
"""

import os
import re
import signal
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import dropwhile, takewhile
from pathlib import Path

from r1hpc.attempt.control.stop import OUT_OF_HOURS
from r1hpc.base.errors import StateError
from r1hpc.base.files import open_plain, read_object, write_json
from r1hpc.base.names import printable
from r1hpc.base.run_dir import RunDir
from r1hpc.checkpoint import disk
from r1hpc.plan.save_time import EARLY_S
from r1hpc.slurm.shell import endings
from r1hpc.telemetry.records.attempts import Cause

FINISHED = "finished"
STOPPED = "stopped"
FAILED = "failed"
HANG = "hang"
LEFT_ALONE = "left alone"
"""Left because another rank failed."""
_DISK = re.compile("|".join(os.strerror(number) for number in disk.REFUSALS))
_ERROR = re.compile(
    rf"{_DISK.pattern}|^error: |^(\w+\.)*\w*(Error|Exception)(:|$)|^slurmstepd\S* error: execve\(\)"
)
_NO_MEMORY = re.compile(r"(can't|[Cc]annot) allocate memory")
_BY_TORCH = re.compile(r"^\[rank\d+\]: ")
"""torch.distributed's prefix of a traceback."""
_MOST_LOGS, _LOG_BYTES, _LOG_LINES = 64, 8192, 20
_BATCH_LOG_BYTES = 1 << 20
_TASK_ENDED = re.compile(r"srun: error: (\S+): tasks? (\d+)\S*: (.+)")
_SRUN = ("srun: ", "slurmstepd")
_ASKED = ("Terminated", "User defined signal 2")
_STEP_CANCELLED = "its step was cancelled, as `scancel JOB.0` does"
_OOM_STATUS = 128 + 125
"""Exit status of srun if the kernel killed a task for its cgroup's memory. Slurm reports it for the task, as
0:125, not for a job that still runs (slurm.h, SIG_OOM; srun's status is inferred from it)."""
_WARNED = (128 + signal.SIGTERM, 128 + signal.SIGUSR2)


@dataclass(frozen=True)
class RankOutcome:
    """How one rank ended. `cause` is set where the rank itself knows it (oom, crash, refused)."""

    rank: int
    kind: str
    node: str
    global_step: int | None = None
    reason: str = ""
    cause: str | None = None
    detail: str = ""
    kept: int = 0
    """Finished pieces beyond the last committed step that the next attempt will find."""


def write_outcome(run: RunDir, attempt: int, outcome: RankOutcome) -> None:
    """Write the outcome durably before the rank exits."""
    write_json(run.rank_outcome(attempt, outcome.rank), asdict(outcome))


def read_outcomes(run: RunDir, attempt: int) -> list[RankOutcome]:
    """Return the outcomes that were written, in rank order; a damaged file counts as missing."""
    found = []
    for path in run.attempt_dir(attempt).glob("rank_*.json"):
        value = read_object(path, RankOutcome)
        if value:
            known = {each.name for each in fields(RankOutcome)} & value.keys()
            found.append(RankOutcome(**{name: value[name] for name in known}))
    return sorted(found, key=lambda outcome: outcome.rank)


def failures_in_logs(
    run: RunDir, attempt: int, ranks: int, nodes: Sequence[str], known: Collection[int]
) -> list[RankOutcome]:
    """Return a failure for each rank without an outcome (`known` have one) whose log ends with an error.

    A full disk may prevent an outcome file, but the log may still show the error.
    """
    found = []
    for rank in [rank for rank in range(ranks) if rank not in known][:_MOST_LOGS]:
        last_lines = _last_lines(run.rank_log(attempt, rank), _LOG_BYTES)[-_LOG_LINES:]
        lines = [_BY_TORCH.sub("", line) for line in reversed(last_lines)]
        error = next((line for line in lines if _ERROR.search(line)), None)
        if error is not None:
            node = nodes[rank * len(nodes) // ranks] if nodes else "?"
            cause = "oom" if re.match(r"[\w.]*(OutOfMemory|Memory)Error", error) else None
            detail = printable(error.removeprefix("error: "))[:500]
            found.append(RankOutcome(rank, FAILED, node, cause=cause, detail=detail))
    return found


def judge_by_srun(
    run: RunDir, attempt: int, job_id: str | None, known: Collection[int]
) -> tuple[RankOutcome | None, bool]:
    """Return two answers of srun's last lines.

    First the failure of the rank that it saw end by itself before any other; None if that is one of `known`.
    srun then sends SIGTERM to the others, which looks like a preemption to them. Second whether somebody had
    Slurm kill a rank, but not the job. Ranks on other nodes live a moment longer and get SIGTERM too.
    """
    said = _said_by_srun(run, attempt, job_id)
    is_aborted = any("Job step aborted" in line for line in said)
    before = takewhile(lambda line: not line.startswith("srun: Terminating"), said)
    killed = next(filter(None, map(_TASK_ENDED.match, before)), None)
    step_cancelled = is_aborted and killed is not None and killed[3] == "Killed"
    first = next(filter(None, map(_TASK_ENDED.match, said)), None)
    if first is None or is_aborted or int(first[2]) in known or first[3] in _ASKED:
        return None, step_cancelled
    detail = f"{printable(first[3])}, says srun"
    return RankOutcome(int(first[2]), FAILED, first[1], detail=detail), step_cancelled


def unstarted_by_srun(run: RunDir, attempt: int, job_id: str | None) -> str:
    """Return srun's error if it started no rank: none has a log, and srun saw no task; else empty."""
    if any(run.attempt_logs(attempt).glob("rank_*.out")):
        return ""
    said = _said_by_srun(run, attempt, job_id)
    if any(map(_TASK_ENDED.match, said)):
        return ""
    errors = [line.removeprefix("srun: error: ") for line in said if line.startswith("srun: error: ")]
    return printable(errors[0])[:300] if errors else ""


def _said_by_srun(run: RunDir, attempt: int, job_id: str | None) -> list[str]:
    """Return the lines of srun during the attempt, from the batch log that all attempts of the job share."""
    own = f"{run.run_id}: attempt "
    lines = _last_lines(run.logs / f"slurm-{job_id}.out", _BATCH_LOG_BYTES)
    from_begin = dropwhile(lambda line: not line.startswith(f"{own}{attempt} begins on "), lines)
    next(from_begin, None)
    of_attempt = takewhile(lambda line: not line.startswith(own), from_begin)
    return [line for line in of_attempt if line.startswith(_SRUN)]


def _last_lines(path: Path, num_bytes: int) -> list[str]:
    try:
        with open_plain(path) as file:
            file.seek(max(0, file.seek(0, 2) - num_bytes))
            return file.read().decode(errors="replace").splitlines()
    except (OSError, StateError):
        return []


@dataclass(frozen=True)
class SchedulerView:
    """Slurm's view of the job after the ranks left. All unknown without Slurm."""

    states: frozenset[str] = frozenset()
    """As in JobState, e.g. {RUNNING}, {CANCELLED, COMPLETING}, {PENDING, COMPLETING}."""
    preempted: bool = False
    """Slurm has set PreemptTime."""
    seconds_left: float | None = None
    """Until the time limit."""
    restarted: bool = False
    """Slurm restarted the job without our request."""


@dataclass(frozen=True)
class Evidence:
    ranks: int
    outcomes: Sequence[RankOutcome]
    status: int | None
    """Exit status of srun, or of the worst local rank; None: it was not recorded."""
    scheduler: SchedulerView = SchedulerView()
    cancel_requested: bool = False
    signal_lead_s: float = 0.0
    is_finished: bool = False
    """Rank 0 has left FINISHED in the run folder."""
    in_logs: Sequence[RankOutcome] = ()
    """Failures found only in the logs of ranks without an outcome."""
    by_srun: RankOutcome | None = None
    """The failure that srun saw first, of a rank without an outcome."""
    step_cancelled: bool = False
    """Somebody had Slurm kill a rank, but not the job."""
    requeued_by_us: bool = False
    """Our job script requested the requeue, because the attempt could not be judged."""
    unstarted: str = ""
    """srun's error, if it started no rank."""
    run_root: str = ""
    refusal: str = ""
    """The run's disk refuses a write, with this error."""


def decide(evidence: Evidence) -> tuple[Cause, str]:
    """Return (cause, detail for a person)."""
    outcomes = evidence.outcomes
    kinds = {outcome.kind for outcome in outcomes}
    # Rank 0 writes the run's result: without it nothing is finished, whatever the others report.
    if evidence.is_finished or any(o.kind == FINISHED and o.rank == 0 for o in outcomes):
        return Cause.finished, next((o.reason for o in outcomes if o.kind == FINISHED), "")
    failed = [outcome for outcome in outcomes if outcome.kind == FAILED]
    from_slurm = _by_scheduler(evidence)
    if STOPPED in kinds and not failed:
        return _why_stopped(evidence, next(o for o in outcomes if o.kind == STOPPED), from_slurm)
    if from_slurm is not None and from_slurm[0] in (Cause.node_fail, Cause.cancelled, Cause.oom):
        return from_slurm  # ranks that lose a peer fail too; the scheduler knows the first cause
    for outcome in (*failed, *evidence.in_logs):
        cause = Cause.oom.value if _NO_MEMORY.search(outcome.detail) else outcome.cause
        cause = cause if cause in (Cause.oom.value, Cause.refused.value) else _blameless(outcome, evidence)
        if cause:
            return Cause(cause), f"rank {outcome.rank} on {outcome.node}: {outcome.detail}"
    if HANG in kinds and evidence.by_srun is None:
        return Cause.hang, _describe_hang(evidence)
    # A rank whose peer died reports a broken connection: an echo, not the cause.
    culprits = [o for o in (*failed, *evidence.in_logs) if "onnection" not in o.detail]
    culprits += [evidence.by_srun] if evidence.by_srun else []
    # Our job script requests the requeue if the attempt cannot be judged: that explains no exception.
    asked_by_us = "REQUEUED" in evidence.scheduler.states and culprits
    if from_slurm is not None and not asked_by_us:
        return from_slurm
    if evidence.refusal and not (failed or evidence.in_logs):
        return Cause.cluster, f"the run's disk refuses a write: {evidence.refusal}"
    if evidence.unstarted:
        return Cause.cluster, f"srun started no rank: {evidence.unstarted}"
    if culprits:
        return Cause.crash, f"rank {culprits[0].rank} on {culprits[0].node}: {culprits[0].detail}"
    echoes = [o for o in outcomes if o.kind == LEFT_ALONE]
    if echoes:  # of a rank that could not write its own
        return Cause.crash, echoes[0].detail
    if evidence.scheduler.restarted:  # Slurm restarts no job that failed by itself
        return Cause.node_fail, "Slurm started the job again: a node failed, or it was preempted unwarned"
    if evidence.status is not None and evidence.status in _WARNED and not outcomes:
        name = signal.Signals(evidence.status - 128).name
        return _why_warned(evidence, name, f"stopped by {name} before the ranks could listen")
    return Cause.crash, _STEP_CANCELLED if evidence.step_cancelled else _describe_status(evidence)


def _blameless(outcome: RankOutcome, evidence: Evidence) -> str:
    """Return `cluster` if the run's own disk refused the rank, or its node has no interpreter; else empty."""
    refusal = _DISK.search(outcome.detail)
    is_own = evidence.run_root and evidence.run_root in outcome.detail
    is_refused = refusal is not None and (is_own or refusal[0] == evidence.refusal)
    return Cause.cluster.value if is_refused or "execve()" in outcome.detail else ""


def same_words(detail: str) -> str:
    """Return the part of a `cluster` detail that is the same on every node and in every job."""
    refusal = _DISK.search(detail)
    return refusal[0] if refusal else re.sub(r"^rank \d+ on \S+: |\d+", "", detail)


def _by_scheduler(evidence: Evidence) -> tuple[Cause, str] | None:
    view = evidence.scheduler
    if evidence.cancel_requested:
        return Cause.cancelled, "cancelled by a user"
    row = endings.of_states(view.states - ({"REQUEUED"} if evidence.requeued_by_us else set()))
    if row is None and evidence.status == _OOM_STATUS:
        row = endings.BY_SACCT["OUT_OF_MEMORY"]
    if row is None and view.preempted:
        row = endings.BY_SACCT["PREEMPTED"]
    if row is None:
        return None
    if row.cause == Cause.timeout and view.seconds_left is not None:
        if view.seconds_left <= 0:
            return Cause.timeout, "the time limit was reached"
        early = f"{round(view.seconds_left)} s before its time limit"
        return (
            Cause.timeout,
            f"Slurm ended it {early}: its reservation, or the hours of its account or QOS, ended",
        )
    return Cause(row.cause), row.detail


def _why_stopped(
    evidence: Evidence, outcome: RankOutcome, from_slurm: tuple[Cause, str] | None
) -> tuple[Cause, str]:
    if outcome.reason == "STOP file":
        return Cause.stopped, "STOP was touched"
    if outcome.reason == OUT_OF_HOURS:
        return Cause.stopped, f"its GPU-hours are used up ({OUT_OF_HOURS})"
    if from_slurm is not None:
        return from_slurm
    first = evidence.by_srun
    if first is not None and outcome.reason != "SIGUSR2":
        return Cause.crash, f"rank {first.rank} on {first.node}: {first.detail}"
    return _why_warned(evidence, outcome.reason, f"stopped by {outcome.reason or 'a signal'}")


def _why_warned(evidence: Evidence, name: str, detail: str) -> tuple[Cause, str]:
    left = evidence.scheduler.seconds_left
    # Before a time limit Slurm sends the signal of --signal, which is SIGUSR2; SIGTERM comes with the limit
    # itself, or from a preemption.
    if left is not None and left <= (evidence.signal_lead_s + EARLY_S if name == "SIGUSR2" else 0):
        return Cause.timeout, f"{name} with {max(0, round(left))} s left of the time limit"
    if evidence.step_cancelled and name != "SIGUSR2":
        return Cause.crash, _STEP_CANCELLED
    return Cause.preempted, detail


def _describe_hang(evidence: Evidence) -> str:
    hung = [o for o in evidence.outcomes if o.kind == HANG]
    silent = sorted(set(range(evidence.ranks)) - {o.rank for o in evidence.outcomes})
    text = "; ".join(f"rank {o.rank} on {o.node}: {o.detail}" for o in hung[:4])
    if silent and len(silent) <= 8:
        text += f"; nothing at all from rank {', '.join(map(str, silent))}: look there first"
    return text


def _describe_status(evidence: Evidence) -> str:
    silent = sorted(set(range(evidence.ranks)) - {o.rank for o in evidence.outcomes})
    who = f"rank {', '.join(map(str, silent[:8]))} left no outcome" if silent else "every rank left"
    if evidence.status is None:
        return who
    if evidence.status > 128:
        try:
            name = signal.Signals(evidence.status - 128).name
        except ValueError:
            name = f"signal {evidence.status - 128}"
        return f"{who}, ended by {name}"
    return f"{who}, exit status {evidence.status}"
