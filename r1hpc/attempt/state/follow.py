"""Wait until a run is over, silently or printing its attempts and an occasional progress line.

wait(run, timeout_s=3600)            # -> Situation
follow(run, "1234", sys.stdout)      # -> 0 finished, 1 ended otherwise, 130 interrupted by Ctrl-C
"""

import time
from dataclasses import dataclass
from typing import Any, TextIO

from r1hpc.attempt.state.state import Situation, State, read_situation
from r1hpc.base.errors import R1hpcError
from r1hpc.base.files import GrowingFile
from r1hpc.base.run_dir import RunDir
from r1hpc.base.units import format_duration
from r1hpc.telemetry.records.attempts import in_order, parse_event, read_history
from r1hpc.telemetry.records.metrics import Step, follow_steps

INTERRUPTED = 130
"""Returned by follow after Ctrl-C; the run goes on."""
_POLL_S = 0.5
# slurmctld serves everybody: ask it seldom, and only if the run folder has nothing new.
_ASK_SLURM_EVERY_S = 10.0
# How long after the run is over the record of an attempt's end may arrive.
_PATIENCE_S = 15.0


@dataclass
class _Follower:
    run: RunDir
    out: TextIO
    since: int
    """Attempts up to this one belong to earlier submissions and are no news of a resumed run."""
    latest: Step | None = None
    """The newest step not printed yet."""
    last_print: float = 0.0

    def __post_init__(self) -> None:
        self.new_steps, self.events = follow_steps(self.run), GrowingFile(self.run.attempts)

    def print_news(self) -> bool:
        """Print what is new; True when an attempt began or ended."""
        events = self._new_events()
        steps = [step for step in self.new_steps() if step.attempt > self.since]
        self.latest = steps[-1] if steps else self.latest
        if self.latest is not None and (events or time.monotonic() - self.last_print >= 1.0):
            self._print(_step_line(self.latest))
            self.latest, self.last_print = None, time.monotonic()
        for event in events:
            if event.get("event") == "begin":
                self._print(
                    f"attempt {event['attempt']} begins on {', '.join(_names(event)) or event.get('host')}"
                )
            elif event.get("event") == "end":
                again = ", goes on by itself" if event.get("requeued") else ""
                detail = f": {event['detail']}" if event.get("detail") else ""
                self._print(f"attempt {event['attempt']} ended: {event['cause']}{detail}{again}")
            elif event.get("event") == "not_begun":
                self._print(f"no attempt begins: {event.get('cause')}: {event.get('detail')}")
        return bool(events)

    def _new_events(self) -> list[dict[str, Any]]:
        found = in_order(filter(None, map(parse_event, self.events.lines())))
        places = [place for place, event in enumerate(found) if event["event"] == "submitted"]
        return found[places[-1] + 1 :] if places else found

    def _print(self, line: str) -> None:
        print(line, file=self.out, flush=True)


def wait(run: RunDir, timeout_s: float | None = None) -> Situation:
    """Wait until a run is over and return its situation.

    Raises:
        R1hpcError: it is not over after `timeout_s`.
    """
    ending, began = _Ending(), time.monotonic()
    while True:
        situation = read_situation(run)
        if ending.is_here(situation):
            return situation
        if timeout_s is not None and time.monotonic() - began >= timeout_s:
            raise R1hpcError(f"{run.run_id} is {situation.state} after {timeout_s:g} s; it goes on")
        time.sleep(_ask_every(situation.job.job_id if situation.job is not None else ""))


def follow(run: RunDir, job_id: str, out: TextIO) -> int:
    """Follow until the run is over; return 0 if it finished, else 1. Ctrl-C only stops following."""
    history, ending = read_history(run), _Ending()
    earlier = history.attempts[: history.num_earlier]
    follower = _Follower(run, out, earlier[-1].attempt if earlier else 0)
    asked = time.monotonic()
    try:
        while True:
            news = follower.print_news()
            if news or time.monotonic() - asked >= _ask_every(job_id):
                asked = time.monotonic()
                situation = read_situation(run)
                if ending.is_here(situation):
                    follower.print_news()
                    return _report_end(run, situation, out)
            time.sleep(_POLL_S)
    except KeyboardInterrupt:
        print(
            f"\nno longer following; {run.run_id} goes on as {job_id}. Come back with: "
            f"python -m r1hpc.logs {run.path} -f",
            file=out,
        )
        return INTERRUPTED


@dataclass
class _Ending:
    """Decide whether a run is over and its end recorded. A killed run has no end: wait a while for it."""

    over_since: float | None = None

    def is_here(self, situation: Situation) -> bool:
        if not situation.state.is_over:
            self.over_since = None
            return False
        self.over_since = self.over_since or time.monotonic()
        return _is_closed(situation) or time.monotonic() - self.over_since > _PATIENCE_S


def _is_closed(situation: Situation) -> bool:
    """True if the last attempt's end is recorded, a moment after the ranks have left FINISHED."""
    last = situation.history.last
    return last is None or last.cause is not None


def _ask_every(job_id: str) -> float:
    """Return the seconds between questions to Slurm if the run folder has nothing new."""
    return _POLL_S if job_id.startswith("local-") else _ASK_SLURM_EVERY_S


def _report_end(run: RunDir, situation: Situation, out: TextIO) -> int:
    detail = f" ({situation.detail})" if situation.detail else ""
    finished = situation.state is State.finished
    where = "" if finished else f"; see {run.logs}"
    print(f"{run.run_id}: {situation.state}{detail}{where}", file=out, flush=True)
    return 0 if finished else 1


def _step_line(step: Step) -> str:
    # A policy gradient's loss stays near zero; its reward shows progress.
    names = ("loss", "lr") if step.number("reward") is None else ("reward", "accuracy", "entropy")
    parts = [f"step {step.global_step}"]
    parts += [f"{name} {value:.4g}" for name in names if (value := step.number(name)) is not None]
    if (seconds := step.step_time_s) is not None:
        parts.append(f"{format_duration(seconds) if seconds >= 10 else f'{seconds:.2g} s'} a step")
    return "  ".join(parts)


def _names(event: dict[str, object]) -> list[str]:
    names = event.get("node_names")
    return [str(name) for name in names] if isinstance(names, list) else []
