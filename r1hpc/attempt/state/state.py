"""Tell what a run is doing now, from its folder, and from Slurm or the local supervisor if they can be asked.

Loads no torch. Without an answer from Slurm the run folder decides, and `detail` says so.
"""

import os
import re
import socket
import time
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from r1hpc.attempt.state.cause import SchedulerView
from r1hpc.attempt.state.slurm_records import kept_records, learn, own_records, submitted_at
from r1hpc.attempt.state.unended import (
    WITHOUT_SUPERVISOR,
    corrected_history,
    judge_unended,
    record_of_attempt,
)
from r1hpc.base.errors import R1hpcError, StateError
from r1hpc.base.files import read_object
from r1hpc.base.run_dir import RunDir, is_chain_or_sweep
from r1hpc.checkpoint.finished import why_old
from r1hpc.slurm.client import SlurmError
from r1hpc.slurm.rank_env import expand_nodelist
from r1hpc.slurm.requeue import JobState, job_state
from r1hpc.slurm.sacct import sacct_records
from r1hpc.slurm.shell.contract import HELD
from r1hpc.telemetry.records.attempts import NAMING, Attempt, Cause, History, read_run_events

POLL_S = 0.5
_ASK_SLURM_EVERY_S = 10.0
"""slurmctld serves everybody: ask it seldom, and only if the run folder has nothing new."""
_PATIENCE_S = 15.0
"""How long after the run is over the record of an attempt's end may arrive."""
_LOOKS, _PAUSE_S = 100, 0.02
_END_PATIENCE_S = 600.0
"""An end follows FINISHED within seconds. Wait this long if nobody can be asked whether it still may."""


def is_of_run(pid: int, run_dir: Path) -> bool:
    """True if `pid` is a process of this user that was started with this run folder as an argument."""
    process = Path(f"/proc/{pid}")
    try:
        if process.stat().st_uid != os.getuid():
            return False
        folder = (process / "cwd").readlink()
        arguments = _arguments(process)
    except OSError:
        return False
    paths = (Path(os.fsdecode(argument)) for argument in arguments)
    return any((folder / p).resolve() == run_dir.resolve() for p in paths if p.name == run_dir.name)


def ranks_of(run_dir: Path, job_id: str) -> list[int]:
    """Return the live ranks that the local supervisor of this job ID has started."""
    mark = f"R1HPC_LOCAL_JOB_ID={job_id}".encode()
    pids = [int(process.name) for process in Path("/proc").iterdir() if process.name.isdigit()]
    # is_of_run first: it waits until a process has been started, and only then is there an environment.
    return [pid for pid in pids if is_of_run(pid, run_dir) and mark in _environment(pid)]


def _arguments(process: Path) -> list[bytes]:
    """Return a process's arguments. While it is being started Linux shows none, longer if no core is free.

    Raise OSError if it has none: a zombie, or a kernel thread.
    """
    for _ in range(_LOOKS):
        found = (process / "cmdline").read_bytes()
        if found:
            return found.split(b"\0")
        (process / "exe").readlink()
        time.sleep(_PAUSE_S)
    return []


def _environment(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


class State(StrEnum):
    queued = "queued"
    running = "running"
    requeued = "requeued"
    """Between two attempts."""
    finished = "finished"
    stopped = "stopped"
    cancelled = "cancelled"
    failed = "failed"
    unknown = "unknown"

    @property
    def is_over(self) -> bool:
        return self in (State.finished, State.stopped, State.cancelled, State.failed)

    @property
    def is_at_work(self) -> bool:
        """True if a job of it waits or runs."""
        return self in (State.queued, State.running, State.requeued)


@dataclass(frozen=True)
class JobRef:
    """The newest job of a run."""

    job_id: str
    executor: str
    event: str
    """The event in attempts.jsonl that named it: submitted, resubmitted or begin."""
    host: str | None = None
    time: float = 0.0
    cluster: str | None = None
    """Slurm's cluster, if known: another cluster that sees this folder does not know the job."""

    @property
    def pid(self) -> int | None:
        """Process ID of the local supervisor; None for a Slurm job."""
        found = re.fullmatch(r"local-(\d+)", self.job_id)
        return int(found[1]) if found else None

    @property
    def is_slurm(self) -> bool:
        return re.fullmatch(r"\d+(_\d+)?", self.job_id) is not None


@dataclass(frozen=True)
class Situation:
    """State of a run, and the evidence for it."""

    state: State
    detail: str
    history: History
    job: JobRef | None

    @property
    def never_began(self) -> bool:
        """True if the newest job ended, its attempt did not begin, and no record says why."""
        if self.state is not State.failed or self.job is None or self.job.event == "begin":
            return False
        return not self.history.is_newer("not_begun", *NAMING)


@dataclass(frozen=True)
class JobReport:
    """The newest job as Slurm or a look at the process reports it. `alive` None: nobody could be asked."""

    alive: bool | None = None
    pending: bool = False
    cancelled: bool = False
    detail: str = ""
    leaving: bool = False
    """The job is ending."""
    states: frozenset[str] = frozenset()
    """Slurm's states of the job, or of its part in which the newest attempt began. Empty: Slurm forgot it."""


def read_situation(run: RunDir, timeout_s: float = 5.0) -> Situation:
    """Return the situation of a run. Ask Slurm, for at most `timeout_s`, only if the folder is unclear."""
    # In this order: an attempt that begins in between is in the history, not the job of an earlier attempt.
    job = newest_job(run)
    history = corrected_history(run)
    if run.finished.exists():
        return Situation(State.finished, why_old(run), _with_its_end(run, job, history, timeout_s), job)
    state, detail = judge(run, history, job, JobReport())
    if state in (State.queued, State.running, State.requeued):
        report = ask(run, job, timeout_s)
        if report.alive is False:
            history = corrected_history(run)  # what it recorded just before it exited
            if job is not None and job.is_slurm and not report.states:
                report = _ask_sacct(run, job, history, timeout_s) or report
        state, detail = judge(run, history, job, report)
    return Situation(state, detail, history, job)


def _with_its_end(run: RunDir, job: JobRef | None, history: History, timeout_s: float) -> History:
    """Return the history of a finished run, with an end also for an attempt whose supervisor was killed."""
    if history.last is None or history.last.cause is not None:
        return history
    said = read_object(run.finished)
    at = said.get("time")
    ended = float(at) if isinstance(at, int | float) else run.finished.stat().st_mtime
    alive = ask(run, job, timeout_s).alive
    history = corrected_history(run)  # what it recorded just before it exited
    last = history.last
    if last is None or last.cause is not None:
        return history
    if alive or (alive is None and time.time() - ended < _END_PATIENCE_S):
        return history
    last = replace(
        last,
        cause=Cause.finished,
        end=max(ended, last.start),
        last_committed_step=said.get("global_step", last.last_committed_step),
        detail=WITHOUT_SUPERVISOR,
        inferred=True,
    )
    return replace(history, attempts=(*history.attempts[:-1], last))


def judge(run: RunDir, history: History, job: JobRef | None, report: JobReport) -> tuple[State, str]:
    """Return state and detail of a run that has no FINISHED file."""
    last = history.last
    if history.is_newer("cancel_requested", *NAMING):
        report = replace(report, cancelled=True)
    refusal = history.not_begun
    if refusal is not None and history.is_newer("not_begun", *NAMING):
        if refusal.cause in (Cause.stopped, Cause.cancelled):
            return State(refusal.cause.value), refusal.detail
        return State.failed, f"{refusal.cause.value}: {refusal.detail}"
    if job is None and last is None:
        lost = last_attempt_with_logs(run)
        why = f"{run.attempts.name} is empty or gone: restore it, or go on by submit --resume"
        return State.unknown, f"{why} (attempt {lost} is on disk)" if lost else "never submitted"
    between = State.requeued if last else State.queued
    if job is not None and job.event != "begin":
        return _of_job(run, report, State.queued if job.event == "submitted" else between, last is None)
    assert last is not None, "a begin made the job reference"
    if last.cause is None:
        return _of_attempt(run, last, report)
    if last.cause in (Cause.finished, Cause.stopped, Cause.cancelled):
        return State(last.cause.value), last.detail
    if last.requeued:
        return _of_job(run, report, between, False)
    why = ": ".join(filter(None, (last.cause.value, last.detail)))
    stays = last.not_continued
    if last.detail:
        stays = stays.removeprefix(f"{last.detail}; ")  # a job that is held has the reason whole
    return State.failed, "; not continued: ".join(filter(None, (why, stays)))


def newest_job(run: RunDir) -> JobRef | None:
    """Return the job that attempts.jsonl named last."""
    named = _naming_events(run)
    return _job_ref(named[-1]) if named else None


def job_named(run: RunDir, job_id: str | None) -> JobRef | None:
    """Return the job of this ID, as attempts.jsonl named it last; None if it does not name it."""
    named = [event for event in _naming_events(run) if str(event["job_id"]) == job_id]
    return _job_ref(named[-1]) if named else None


def slurm_jobs(run: RunDir) -> dict[str, str | None]:
    """Return every Slurm job ID the run has had, oldest first, with its cluster; None: not recorded."""
    jobs = [job for job in map(_job_ref, _naming_events(run)) if job.is_slurm]
    return {job.job_id: None for job in jobs} | {job.job_id: job.cluster for job in jobs if job.cluster}


def last_attempt_with_logs(run: RunDir) -> int:
    """Return the highest number of an attempt whose ranks were started; 0 if none was."""
    return next((k for k in reversed(attempts_with_logs(run)) if any(run.attempt_logs(k).glob("*"))), 0)


def attempts_with_logs(run: RunDir) -> list[int]:
    """Return the numbers of the attempts that have a folder of logs, also an empty one."""
    found = (re.fullmatch(r"attempt_(\d+)", path.name) for path in run.logs.glob("attempt_*"))
    return sorted(int(match[1]) for match in found if match)


def ask(run: RunDir, job: JobRef | None, timeout_s: float) -> JobReport:
    """Return what Slurm says about the job, or whether the local supervisor lives."""
    if job is None:
        return JobReport()
    if job.pid is not None:
        if job.host not in (None, socket.gethostname()):
            return JobReport(detail=f"it runs on {job.host}: ask there")
        if is_of_run(job.pid, run.path):
            return JobReport(True)
        gone = f"its process {job.pid} is gone"
        if ranks_of(run.path, job.job_id):
            return JobReport(True, detail=f"{gone}, its ranks go on")
        return JobReport(False, detail=gone)
    if not job.is_slurm:
        return JobReport()
    try:
        state = job_state(job.job_id, timeout_s)
        if not state.states and job.cluster is not None:
            from r1hpc.slurm.probe import cluster_name  # few calls get here

            if cluster_name(timeout_s) != job.cluster:
                return JobReport(detail=f"job {job.job_id} is of cluster {job.cluster}: ask there")
        return _report_of(job, state)
    except SlurmError as error:
        return JobReport(detail="Slurm did not answer" if error.unreachable else "Slurm is not here")


def _naming_events(run: RunDir) -> list[dict[str, Any]]:
    return [e for e in read_run_events(run)[0] if e["event"] in NAMING and e.get("job_id")]


def _job_ref(event: dict[str, Any]) -> JobRef:
    job_id, name, at = str(event["job_id"]), event["event"], float(event["time"])
    return JobRef(job_id, event.get("executor", ""), name, event.get("host"), at, event.get("cluster"))


def _report_of(job: JobRef, state: JobState) -> JobReport:
    if not state.states:
        return JobReport(False, detail=f"Slurm no longer knows job {job.job_id}")
    detail = f"job {job.job_id} is {'+'.join(sorted(state.states))}"
    reason = f" ({state.reason})" if state.pending and state.reason not in ("", "None") else ""
    if state.pending and state.reason == "BadConstraints":
        why = "no nodes fit what it asks for"
        if both := sorted(set(expand_nodelist(state.required)) & set(expand_nodelist(state.excluded))):
            why = f"it asks for {', '.join(both)} and excludes {'them' if both[1:] else 'it'} too"
        reason += f": it will never start, since {why}: cancel it, and resume it with other nodes"
    if state.reason.startswith("JobHeld") and state.comment.startswith(HELD):
        reason += f": {state.comment.removeprefix(HELD)}"
    return JobReport(
        alive=state.live,
        pending=state.pending,
        cancelled="CANCELLED" in state.states,
        detail=detail + reason,
        leaving="COMPLETING" in state.states,
        states=state.states,
    )


def _ask_sacct(run: RunDir, job: JobRef, history: History, timeout_s: float) -> JobReport | None:
    """Return what accounting says about a job that slurmctld has forgotten; None if it says nothing."""
    try:
        answer = sacct_records(job.job_id, max(1e6, submitted_at(history)), timeout_s)
        records = own_records(answer, [job.job_id], history)
        learn(run, records, time.time())
    except (SlurmError, StateError):  # use what any command learnt before
        records = own_records(kept_records(run).records, [job.job_id], history)
    if not records:
        return None
    newest, last = records[-1], history.last
    began_in = record_of_attempt(records, last) if last is not None and last.cause is None else None
    return JobReport(
        alive=False,
        cancelled=newest.ending == "CANCELLED",
        detail=f"job {job.job_id} was {newest.ending} (sacct)",
        states=frozenset({(began_in or newest).ending}),
    )


def _of_job(run: RunDir, report: JobReport, waiting: State, never_began: bool) -> tuple[State, str]:
    """Judge a job that was submitted and has not begun an attempt since."""
    if report.alive is None:
        return waiting, _as_of_folder(report)
    if report.alive:
        begins = ", ".join(filter(None, (report.detail, "its attempt begins")))
        return waiting, report.detail if report.pending else begins
    if report.cancelled:
        return State.cancelled, report.detail
    if never_began:
        return State.failed, f"{report.detail}; it never began"
    how = "" if is_chain_or_sweep(run.path.parent) else f": submit --run-name {run.run_id} --resume"
    return State.failed, f"{report.detail}; the next attempt never began{how}"


def _of_attempt(run: RunDir, last: Attempt, report: JobReport) -> tuple[State, str]:
    if report.alive is None:
        return State.running, _as_of_folder(report)
    if report.pending:
        return State.requeued, report.detail
    if report.alive:
        return State.running, report.detail
    if report.cancelled:
        return State.cancelled, report.detail
    cause, detail = judge_unended(run, last, SchedulerView(report.states))
    if cause in (Cause.finished, Cause.stopped, Cause.cancelled):
        return State(cause.value), detail
    said = detail if cause is Cause.unknown else f"{cause.value}: {detail}"
    return State.failed, f"{said}; {report.detail}"


def _as_of_folder(report: JobReport) -> str:
    return "as of the run folder" + (f" ({report.detail})" if report.detail else "")


def wait(run: RunDir, timeout_s: float | None = None) -> Situation:
    """Wait until a run is over and return its situation.

    Raise R1hpcError if it is not over after `timeout_s`.
    """
    ending, began = Ending(), time.monotonic()
    while True:
        situation = read_situation(run)
        if ending.is_here(situation):
            return situation
        if timeout_s is not None and time.monotonic() - began >= timeout_s:
            raise R1hpcError(f"{run.run_id} is {situation.state} after {timeout_s:g} s; it goes on")
        time.sleep(ask_every(situation.job.job_id if situation.job is not None else ""))


@dataclass
class Ending:
    """Decide whether a run is over and its end recorded. A killed run has no end: wait a while for it."""

    over_since: float | None = None

    def is_here(self, situation: Situation) -> bool:
        if not situation.state.is_over:
            self.over_since = None
            return False
        self.over_since = self.over_since or time.monotonic()
        last = situation.history.last  # its end is recorded a moment after the ranks have left FINISHED
        is_closed = last is None or last.cause is not None
        return is_closed or time.monotonic() - self.over_since > _PATIENCE_S


def ask_every(job_id: str) -> float:
    """Return the seconds between questions to Slurm if the run folder has nothing new."""
    return POLL_S if job_id.startswith("local-") else _ASK_SLURM_EVERY_S
