"""Follow a run for `submit --follow`: attempts, evaluations and warnings as lines, and a bar on a terminal.

follow(run, "1234", sys.stdout)      # -> 0 finished, 1 ended otherwise, 130 interrupted by Ctrl-C
"""

import time
from collections import deque
from contextlib import suppress
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from r1hpc.attempt.state.state import POLL_S, Ending, Situation, State, ask_every, read_situation
from r1hpc.attempt.state.unended import corrected_history
from r1hpc.base.errors import R1hpcError
from r1hpc.base.files import GrowingFile
from r1hpc.base.run_dir import RunDir
from r1hpc.base.tables import wrap
from r1hpc.base.units import format_duration
from r1hpc.config import load
from r1hpc.config.stages import counts_of
from r1hpc.reporting.progress import eta_s, planned_steps
from r1hpc.telemetry.diagnosis.rl_health import health_warnings, held_out_warnings
from r1hpc.telemetry.records.attempts import Cause, in_order, parse_event
from r1hpc.telemetry.records.evaluations import figures, read_evaluations, results
from r1hpc.telemetry.records.metrics import Step, follow_steps

INTERRUPTED = 130
"""Returned by follow after Ctrl-C; the run goes on."""
_WINDOW = 200
"""Steps that are judged, as in the training loop."""
_EVERY_S = 1.0
_EVERY_WITH_BAR_S = 10.0
"""Seconds between two lines of progress; a bar shows it meanwhile."""


def follow(run: RunDir, job_id: str, out: TextIO) -> int:
    """Follow until the run is over; return 0 if it finished, else 1. Ctrl-C only stops following."""
    history, ending = corrected_history(run), Ending()
    earlier = history.attempts[: history.num_earlier]
    asked = time.monotonic()
    try:
        with _Screen(out) as screen:
            follower = _Follower(run, screen, earlier[-1].attempt if earlier else 0)
            while True:
                news = follower.print_news()
                if news or time.monotonic() - asked >= ask_every(job_id):
                    asked = time.monotonic()
                    situation = read_situation(run)
                    if ending.is_here(situation):
                        follower.print_news()
                        return _report_end(run, situation, screen)
                time.sleep(POLL_S)
    except KeyboardInterrupt:
        print(
            f"\nno longer following; {run.run_id} goes on as {job_id}. Come back with: "
            f"python -m r1hpc.logs {run.path} -f",
            file=out,
        )
        return INTERRUPTED


class _Screen:
    """Lines, and below them a bar if they go to a terminal."""

    def __init__(self, out: TextIO) -> None:
        self._console = Console(file=out, highlight=False, markup=False, emoji=False, soft_wrap=True)
        self.has_bar = self._console.is_terminal and not self._console.is_dumb_terminal
        columns = (BarColumn(30), TextColumn("{task.description}"))
        self._bar = Progress(
            *columns, console=self._console, transient=True, auto_refresh=False, disable=not self.has_bar
        )
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> "_Screen":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def print(self, line: str, style: str = "") -> None:
        self._console.print(wrap(line), style=style)
        self._console.file.flush()

    def show(self, done: int, of: int | None, unit: str, left_s: float | None) -> None:
        text = f"{unit} {done}" + (f" of {of}" if of else "") + _left(left_s)
        self._bar.update(self._task, completed=done, total=of, description=text, refresh=True)


class _Follower:
    """Remember what was printed of a run so far."""

    def __init__(self, run: RunDir, screen: _Screen, since: int) -> None:
        """`since`: attempts up to this one belong to earlier submissions and are no news of a resumed run."""
        self._run, self._screen, self._since = run, screen, since
        self._new_steps, self._events = follow_steps(run), GrowingFile(run.attempts)
        self._recent: deque[Step] = deque(maxlen=_WINDOW)
        self._has_unprinted = False
        self._last_print = 0.0
        self._evaluated = {s for s, e in read_evaluations(run).items() if e.get("attempt", 0) <= since}
        self._warned: set[str] = set()
        self._causes: dict[int, Cause] = {}
        self._num: int | None = None
        self._is_in_parts = False
        with suppress(R1hpcError, OSError):  # of another version
            config = load.read(run.config)
            self._num, self._is_in_parts = planned_steps(config), counts_of(config.stage) == "parts"

    def print_news(self) -> bool:
        """Print what is new; True when an attempt began or ended."""
        events = in_order(filter(None, map(parse_event, self._events.lines())))
        submitted = [place for place, event in enumerate(events) if event["event"] == "submitted"]
        if submitted:
            events = events[submitted[-1] + 1 :]
        begins = [event for event in events if event["event"] == "begin"]
        for event in begins:
            self._print_event(event)
        new = [step for step in self._new_steps() if step.attempt > self._since]
        for each in new:
            if self._recent and each.global_step <= self._recent[-1].global_step:
                self._recent.clear()  # taken again: a warning should not judge both
            self._recent.append(each)
        self._has_unprinted |= bool(new)
        every = _EVERY_WITH_BAR_S if self._screen.has_bar else _EVERY_S
        if self._has_unprinted and (events or time.monotonic() - self._last_print >= every):
            self._screen.print(_step_line(self._recent[-1], self._left_s()))
            self._has_unprinted, self._last_print = False, time.monotonic()
        evaluations = read_evaluations(self._run)
        is_evaluated = evaluations.keys() - self._evaluated
        findings = health_warnings(list(self._recent)) if new else []
        findings += held_out_warnings(evaluations) if is_evaluated else []
        for found in findings:
            if found.code not in self._warned:
                self._warned.add(found.code)
                self._screen.print(f"{found.severity.value}: {found.sentence}. Try: {found.advice}", "yellow")
        for step, summary in evaluations.items():
            if step not in self._evaluated:
                self._evaluated.add(step)
                shown = ", ".join(f"{name} {value}" for name, value in figures(summary))
                self._screen.print(f"step {step} evaluated: {shown}", "cyan")
        for event in (each for each in events if each not in begins):
            self._print_event(event)
        if self._screen.has_bar and self._is_in_parts:
            self._screen.show(len(self._run.all_parts), self._num, "part", None)
        elif self._screen.has_bar and self._recent:
            self._screen.show(self._recent[-1].global_step, self._num, "step", self._left_s())
        return bool(events)

    def _print_event(self, event: dict[str, Any]) -> None:
        kind, detail = event["event"], f": {event['detail']}" if event.get("detail") else ""
        if kind == "begin":
            names = ", ".join(event.get("node_names") or ()) or event.get("host")
            self._screen.print(f"attempt {event['attempt']} begins on {names}")
        elif kind == "end":
            self._print_end(event["attempt"])
        elif kind == "not_begun":
            self._screen.print(f"no attempt begins: {event.get('cause')}{detail}", "red")

    def _print_end(self, number: int) -> None:
        """Print how an attempt ended, and again only if accounting corrects its cause."""
        ended = next((a for a in corrected_history(self._run).attempts if a.attempt == number), None)
        if ended is None or ended.cause is None or self._causes.get(number) == ended.cause:
            return
        self._causes[number] = ended.cause
        detail, again = f": {ended.detail}" if ended.detail else "", ", goes on by itself" * ended.requeued
        style = "green" if ended.cause is Cause.finished else "yellow"
        self._screen.print(f"attempt {number} ended: {ended.cause}{detail}{again}", style)

    def _left_s(self) -> float | None:
        recent = list(self._recent)[-20:]
        return eta_s(recent, recent[-1].global_step, self._num)


def _report_end(run: RunDir, situation: Situation, screen: _Screen) -> int:
    detail = f" ({situation.detail})" if situation.detail else ""
    finished = situation.state is State.finished
    if finished and run.evaluation.exists():
        screen.print("evaluated: " + ", ".join(f"{name} {value}" for name, value in results(run)), "cyan")
    screen.print(f"{run.run_id}: {situation.state}{detail}", "bold green" if finished else "bold red")
    if not finished:
        screen.print(f"see {run.logs}")
    return 0 if finished else 1


def _step_line(step: Step, left_s: float | None) -> str:
    # A policy gradient's loss stays near zero; its reward shows progress.
    names = ("loss", "lr") if step.number("reward") is None else ("reward", "accuracy", "entropy")
    parts = [f"step {step.global_step}"]
    parts += [f"{name} {value:.4g}" for name in names if (value := step.number(name)) is not None]
    if (seconds := step.step_time_s) is not None:
        parts.append(f"{format_duration(seconds) if seconds >= 10 else f'{seconds:.2g} s'} a step")
    return "  ".join(parts) + _left(left_s)


def _left(seconds: float | None) -> str:
    return f"  {format_duration(seconds)} left" if seconds else ""
