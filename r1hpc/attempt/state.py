"""What a run is doing now: from its folder, and from Slurm or the local supervisor where they can be asked.

    situation = look(run)
    situation.state, situation.detail

Loads no torch. Without an answer of Slurm's it is what the run folder says, and `detail` says so.
"""

import os
import re
import socket
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from r1hpc.base.rundir import RunDir
from r1hpc.slurm.client import SlurmError
from r1hpc.slurm.requeue import JobState, job_state
from r1hpc.telemetry.attempts import Cause, History, read_history, read_run_events


class State(StrEnum):
    """What a run is doing."""

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
        """A job of it waits or runs."""
        return self in (State.queued, State.running, State.requeued)


@dataclass(frozen=True)
class JobRef:
    """The newest job of a run."""

    job_id: str
    executor: str
    event: str
    """The event of attempts.jsonl that named it: submitted, resubmitted or begin."""
    host: str | None = None
    time: float = 0.0

    @property
    def pid(self) -> int | None:
        """Process id of the local supervisor; None for a job of Slurm."""
        found = re.fullmatch(r"local-(\d+)", self.job_id)
        return int(found[1]) if found else None

    @property
    def is_slurm(self) -> bool:
        return re.fullmatch(r"\d+(_\d+)?", self.job_id) is not None


@dataclass(frozen=True)
class Situation:
    """The state of a run, with what it was judged by."""

    state: State
    detail: str
    history: History
    job: JobRef | None


@dataclass(frozen=True)
class Word:
    """What was said of the newest job. `alive` None: nobody could be asked."""

    alive: bool | None = None
    pending: bool = False
    cancelled: bool = False
    said: str = ""


def look(run: RunDir, timeout_s: float = 5.0) -> Situation:
    """The situation of a run. Asks Slurm for at most `timeout_s`, and only when the folder leaves it open."""
    history = read_history(run)
    job = newest_job(run)
    if run.finished.exists():
        return Situation(State.finished, "", history, job)
    state, detail = judge(history, job, Word())
    if state in (State.queued, State.running, State.requeued):
        state, detail = judge(history, job, ask(run, job, timeout_s))
    return Situation(state, detail, history, job)


def judge(history: History, job: JobRef | None, word: Word) -> tuple[State, str]:
    """State and detail of a run that has no FINISHED file."""
    last = history.last
    if job is not None and (history.cancel_requested_at or 0.0) > job.time:
        word = replace(word, cancelled=True)
    if job is None and last is None:
        return State.unknown, "never submitted"
    between = State.requeued if last else State.queued
    if job is not None and job.event != "begin":
        return _of_job(word, State.queued if job.event == "submitted" else between, last is None)
    assert last is not None, "a begin made the job reference"
    if last.cause is None:
        return _of_attempt(word)
    if last.cause in (Cause.finished, Cause.stopped, Cause.cancelled):
        return State(last.cause.value), last.detail
    if last.requeued:
        return _of_job(word, between, False)
    return State.failed, f"{last.cause.value}: {last.detail}" if last.detail else last.cause.value


def newest_job(run: RunDir) -> JobRef | None:
    """The job that attempts.jsonl named last, by time: a submission may be written after its first begin."""
    named = _naming_events(run)
    return _job_ref(named[-1]) if named else None


def job_named(run: RunDir, job_id: str | None) -> JobRef | None:
    """The job of this id, as attempts.jsonl named it last; None where it does not name it."""
    named = [event for event in _naming_events(run) if str(event["job_id"]) == job_id]
    return _job_ref(named[-1]) if named else None


def all_slurm_jobs(run: RunDir) -> list[str]:
    """Every Slurm job id the run has had, oldest first."""
    return list(dict.fromkeys(job.job_id for job in map(_job_ref, _naming_events(run)) if job.is_slurm))


def ask(run: RunDir, job: JobRef | None, timeout_s: float) -> Word:
    """What Slurm says of the job, or whether the local supervisor lives."""
    if job is None:
        return Word()
    if job.pid is not None:
        if job.host not in (None, socket.gethostname()):
            return Word(said=f"it runs on {job.host}: ask there")
        alive = is_supervisor(job.pid, run.path)
        return Word(alive, said="" if alive else f"its process {job.pid} is gone")
    if not job.is_slurm:
        return Word()
    try:
        return _word_of(job, job_state(job.job_id, timeout_s))
    except SlurmError as error:
        return Word(said="Slurm did not answer" if error.unreachable else "Slurm is not here")


def is_supervisor(pid: int, run_dir: Path) -> bool:
    """Whether `pid` is a process of this user that was started with this run folder as an argument."""
    process = Path(f"/proc/{pid}")
    try:
        if process.stat().st_uid != os.getuid():
            return False
        folder = (process / "cwd").readlink()
        arguments = (process / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    paths = (Path(os.fsdecode(argument)) for argument in arguments)
    return any((folder / p).resolve() == run_dir.resolve() for p in paths if p.name == run_dir.name)


_NAMING = ("submitted", "resubmitted", "begin")


def _naming_events(run: RunDir) -> list[dict[str, Any]]:
    named = [e for e in read_run_events(run)[0] if e.get("event") in _NAMING and e.get("job_id")]
    return sorted(named, key=_time)


def _time(event: dict[str, Any]) -> float:
    return float(event.get("time", 0.0))


def _job_ref(event: dict[str, Any]) -> JobRef:
    return JobRef(
        str(event["job_id"]), event.get("executor", ""), event["event"], event.get("host"), _time(event)
    )


def _word_of(job: JobRef, state: JobState) -> Word:
    if not state.states:
        return Word(False, said=f"Slurm no longer knows job {job.job_id}")
    said = f"job {job.job_id} is {'+'.join(sorted(state.states))}"
    reason = f" ({state.reason})" if state.pending and state.reason not in ("", "None") else ""
    return Word(state.live, state.pending, "CANCELLED" in state.states, said + reason)


def _of_job(word: Word, waiting: State, never_began: bool) -> tuple[State, str]:
    """A job that has been asked for and has not begun an attempt since."""
    if word.alive is None:
        return waiting, _as_of_folder(word)
    if word.alive:
        return waiting, word.said
    if word.cancelled:
        return State.cancelled, word.said
    return State.failed, word.said + ("; it never began" if never_began else "; the next attempt never began")


def _of_attempt(word: Word) -> tuple[State, str]:
    """An attempt without an end on record."""
    if word.alive is None:
        return State.running, _as_of_folder(word)
    if word.pending:
        return State.requeued, word.said
    if word.alive:
        return State.running, word.said
    if word.cancelled:
        return State.cancelled, word.said
    return State.failed, f"ended without a word: {word.said}"


def _as_of_folder(word: Word) -> str:
    return "as of the run folder" + (f" ({word.said})" if word.said else "")
