"""Summarise a run from its folder: how much time of each attempt was useful.

An attempt that has not ended counts until `now` if it is known to run, else until its last sign of life, a
lower bound. summary.json keeps the results of ended attempts: their steps are read once, and again only if
they count differently, as after a later attempt repeated some of them.
"""

import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from typing import Any

from r1hpc.base.run_dir import RunDir
from r1hpc.config.stages import counts_of, is_server
from r1hpc.telemetry.diagnosis.timeline import Part, Span, Split, milliseconds, spans_of, split_time
from r1hpc.telemetry.gpu.history import GpuHistory, read_gpus
from r1hpc.telemetry.records.attempts import Attempt, Cause, History
from r1hpc.telemetry.records.metrics import (
    Step,
    Steps,
    fold_steps,
    read_events,
    read_steps,
    steps_from,
)
from r1hpc.telemetry.records.ranks import finish_times
from r1hpc.telemetry.records.summary_file import (
    Mark,
    StoredAttempt,
    StoredSummary,
    mark_of,
    read_summary,
    write_summary,
)

_Events = defaultdict[int, list[dict[str, Any]]]


@dataclass(frozen=True)
class AttemptSummary:
    """One attempt: its facts, its real end, and the use of its time by the run's own clock."""

    attempt: Attempt
    end: float
    split: Split
    num_steps: int = 0
    num_lost: int = 0
    last_useful: int | None = None
    mfu_s: float = 0.0
    """MFU x seconds, summed over its useful steps with an MFU, and those seconds."""
    mfu_time_s: float = 0.0
    has_steps: bool = True
    """False: its stage takes none."""
    is_alive: bool = False

    @property
    def cause(self) -> str:
        """Return why it ended; `running` while it has not, `unknown` if that was not recorded."""
        if self.attempt.cause is not None:
            return self.attempt.cause.value
        return "running" if self.is_alive else Cause.unknown.value


@dataclass(frozen=True)
class RunSummary:
    run: RunDir
    history: History
    attempts: tuple[AttemptSummary, ...]
    stage: str = ""
    job_name: str = ""
    num_bad_lines: int = 0
    """Lines of metrics/train.jsonl without a valid step."""

    @property
    def num_useful(self) -> int:
        return sum(a.num_steps - a.num_lost for a in self.attempts)

    @property
    def num_lost(self) -> int:
        return sum(a.num_lost for a in self.attempts)

    @property
    def last_step(self) -> int | None:
        """Return the last step behind the weights."""
        return max((a.last_useful for a in self.attempts if a.last_useful is not None), default=None)

    @property
    def mfu(self) -> float | None:
        """Return the mean over the lasting steps, weighted by their time."""
        seconds = sum(a.mfu_time_s for a in self.attempts)
        return sum(a.mfu_s for a in self.attempts) / seconds if seconds else None

    @cached_property
    def steps(self) -> Steps:
        """Return every step, read from the file: for step-by-step plots."""
        return read_steps(self.run)

    @cached_property
    def gpus(self) -> list[GpuHistory]:
        """Return each node's GPU readings, for reports and pictures."""
        return read_gpus(self.run)

    @cached_property
    def _spans(self) -> dict[int, list[Span]]:
        events = _events_by_attempt(self.run)
        taken = self._lasting_and_lost(events)
        return {
            each.attempt.attempt: list(
                _spans(self.run, self.stage, each, *taken[each.attempt.attempt], events)
            )
            for each in self.attempts
        }

    def useful_steps(self) -> dict[int, list[Step]]:
        """Return the lasting steps of each attempt, read from the file."""
        return {k: useful for k, (useful, _) in self._lasting_and_lost(_events_by_attempt(self.run)).items()}

    def _lasting_and_lost(self, events: _Events) -> dict[int, tuple[list[Step], list[Step]]]:
        alive = next((each.attempt for each in self.attempts if each.is_alive), None)
        return _taken_by_attempt(self.history, self.steps, events, alive)

    def split_between(self, inside: Sequence[AttemptSummary], start: float, begin: int, end: int) -> Split:
        """Split the time from `begin` to `end` (ms), which may cut through the attempts `inside` it; the
        first one's start-up began at `start`, Unix seconds."""
        spans = [span for each in inside for span in self._spans[each.attempt.attempt]]
        if inside:
            spans.append(Span(Part.startup, milliseconds(start), milliseconds(inside[0].attempt.start)))
        return split_time(spans, begin, end)


def summarise_run(run: RunDir, history: History, now: float, running: bool) -> RunSummary:
    """Fold attempts, steps and events of a run. `running`: its last attempt is known to be alive."""
    alive = history.last if running else None
    stored = read_summary(run)
    if stored is not None and not _still_holds(run, stored, history, alive):
        stored = None
    lines = list(steps_from(run, stored.train.size if stored else 0))
    if stored is not None and _count_otherwise(stored, [step for _, step in lines if step is not None]):
        stored, lines = None, list(steps_from(run, 0))
    known = {each.attempt: each for each in stored.attempts} if stored else {}
    steps = fold_steps(step for _, step in lines if step is not None)
    events = _events_by_attempt(run, len(known) < len(history.attempts))
    taken = _taken_by_attempt(history, steps, events, alive)
    stage, job_name, config = _names(run, stored)
    attempts = []
    for attempt in history.attempts:
        k = attempt.attempt
        if k in known:
            split = Split(*known[k].split)
            attempts.append(AttemptSummary(attempt=attempt, split=split, **_shared(known[k])))
        else:
            until = now if attempt is alive else None
            attempts.append(_summarise(run, attempt, *taken[k], events, until, stage))
    num_bad = sum(step is None for _, step in lines) + (stored.num_bad_lines if stored else 0)
    summary = RunSummary(run, history, tuple(attempts), stage, job_name, num_bad)
    _store(summary, stored, alive, config, lines)
    return summary


def names_of(run: RunDir) -> tuple[str, str]:
    """Return (stage, job name) from a run's configuration; the default if it is damaged."""
    stage, job_name, _ = _names(run, read_summary(run))
    return stage, job_name


def split_seconds(split: Split) -> dict[str, float]:
    """Return wall seconds under the names of the JSON output: `wall_s` is the sum of the others."""
    return {
        "wall_s": split.allocated / 1000,
        "startup_s": split.startup / 1000,
        "useful_s": split.useful / 1000,
        "lost_s": split.lost / 1000,
        "save_s": split.save / 1000,
        "other_s": split.idle / 1000,
    }


def store_split(summary: RunSummary, begin: int, end: int, split: Split) -> None:
    """Store the split of a time that cuts through ended attempts: Slurm's clock and the run's own differ."""
    stored = read_summary(summary.run)
    if stored is not None:
        cuts = {**stored.cuts, f"{begin}-{end}": astuple(split)}
        write_summary(summary.run, replace(stored, cuts=cuts))


def stored_split(summary: RunSummary, begin: int, end: int) -> Split | None:
    """Return the result of store_split, if it is still valid."""
    stored = read_summary(summary.run)
    parts = stored.cuts.get(f"{begin}-{end}") if stored else None
    return None if parts is None else Split(*parts)


def _still_holds(run: RunDir, stored: StoredSummary, history: History, alive: Attempt | None) -> bool:
    """True if the stored values come from the same begins and ends, and the files only grew since."""
    facts = {a.attempt: _facts(a) for a in history.attempts if a is not alive}
    if any(facts.get(each.attempt) != each.facts for each in stored.attempts):
        return False
    events = run.events
    as_was = stored.events.offset(events) is not None if alive else stored.events == mark_of(events)
    return as_was and stored.train.offset(run.train_metrics) is not None


def _facts(attempt: Attempt) -> str:
    cause = attempt.cause.value if attempt.cause else ""
    return f"{attempt.start!r} {attempt.end!r} {cause} {attempt.last_committed_step} {attempt.resumed_from}"


def _count_otherwise(stored: StoredSummary, newer: Sequence[Step]) -> bool:
    """True if newer steps belong to a known attempt, or repeat its useful steps."""
    known = {each.attempt for each in stored.attempts}
    last = max((each.last_useful or 0 for each in stored.attempts), default=0)
    return any(step.attempt in known or step.global_step <= last for step in newer)


def _names(run: RunDir, stored: StoredSummary | None) -> tuple[str, str, Mark]:
    mark = mark_of(run.config) or Mark()
    if stored is not None and stored.config == mark:
        return stored.stage, stored.job_name, mark
    # Line by line: we wrote the file as resolved YAML, and if it was damaged since, the reports of other runs
    # must go on. Read once: the result is stored.
    text = run.config.read_text(errors="replace") if mark.size else ""
    stage = re.search(r"^stage: *(\w+)", text, re.M)
    job_name = re.search(r"^  job_name: (?!null)['\"]?([^'\"\n]+)", text, re.M)
    return stage[1] if stage else "pretrain", job_name[1] if job_name else run.run_id, mark


def _taken_by_attempt(
    history: History, steps: Steps, events: _Events, alive: Attempt | None
) -> dict[int, tuple[list[Step], list[Step]]]:
    """Return (lasting steps, lost steps) of each attempt.

    Steps whose attempt ended before a checkpoint had them are lost too.
    """
    effective, lost = _by_attempt(steps.effective.values()), _by_attempt(steps.lost)
    found = {}
    for attempt in history.attempts:
        mine = effective[attempt.attempt]
        last = math.inf if attempt is alive else _last_kept(attempt, events[attempt.attempt])
        undone = [step for step in mine if step.global_step > last]
        kept = [step for step in mine if step.global_step <= last]
        found[attempt.attempt] = (kept, lost[attempt.attempt] + undone)
    return found


def _last_kept(attempt: Attempt, events: Sequence[dict[str, Any]]) -> float:
    """Return the last step that an ended attempt left in a checkpoint."""
    if attempt.cause is Cause.finished:
        return math.inf
    if attempt.cause is not None:
        return attempt.last_committed_step or 0
    saved = [event.get("global_step") for event in events if event["event"] == "save"]
    return max((step for step in saved if isinstance(step, int)), default=attempt.resumed_from or 0)


def _by_attempt(steps: Iterable[Step]) -> defaultdict[int, list[Step]]:
    found: defaultdict[int, list[Step]] = defaultdict(list)
    for step in steps:
        found[step.attempt].append(step)
    return found


def _events_by_attempt(run: RunDir, is_needed: bool = True) -> _Events:
    found: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
    for event in read_events(run) if is_needed else ():
        found[event.get("attempt", 0)].append(event)
    return found


def _summarise(
    run: RunDir,
    attempt: Attempt,
    useful: list[Step],
    lost: list[Step],
    all_events: _Events,
    now: float | None,
    stage: str,
) -> AttemptSummary:
    taken = sorted([*useful, *lost], key=lambda step: step.global_step)
    end = attempt.end or now
    if not end:
        signs = [step.time for step in taken[-1:]]
        signs += [event.get("time") for event in all_events[attempt.attempt][-1:]]
        end = max(attempt.start, *(float(time) for time in signs if time is not None), 0.0)
    timed = [(s.mfu, s.step_time_s) for s in useful if s.mfu is not None and s.step_time_s]
    summary = AttemptSummary(
        attempt=attempt,
        end=end,
        split=Split(),
        num_steps=len(taken),
        num_lost=len(lost),
        last_useful=max((s.global_step for s in useful), default=None),
        mfu_s=sum(mfu * seconds for mfu, seconds in timed),
        mfu_time_s=sum(seconds for _, seconds in timed),
        has_steps=bool(taken) or counts_of(stage) == "steps" or is_server(stage),
        is_alive=now is not None,
    )
    begin = milliseconds(attempt.start)
    spans = _spans(run, stage, summary, useful, lost, all_events)
    return replace(summary, split=split_time(spans, begin, max(begin, milliseconds(end))))


def _spans(
    run: RunDir, stage: str, each: AttemptSummary, useful: list[Step], lost: list[Step], all_events: _Events
) -> Iterable[Span]:
    attempt = each.attempt
    if each.has_steps:
        return spans_of(attempt, each.end, useful, lost, all_events[attempt.attempt])
    made_at = each.end
    is_over = not each.is_alive and attempt.cause not in (Cause.finished, Cause.stopped)
    if is_over and counts_of(stage) == "parts":
        # The next attempt repeats what came after the last lasting part.
        made_at = max(finish_times(run.all_parts, attempt.start, each.end), default=attempt.start)
    begin, made, end = map(milliseconds, (attempt.start, made_at, each.end))
    return [Span(Part.useful, begin, made), Span(Part.lost, made, end)]


def _store(
    summary: RunSummary,
    stored: StoredSummary | None,
    alive: Attempt | None,
    config: Mark,
    lines: Sequence[tuple[int, Step | None]],
) -> None:
    """Write the facts of ended attempts, if they add to or change the stored ones."""
    over = [each for each in summary.attempts if each.attempt is not alive]
    numbers = {each.attempt.attempt for each in over}
    known = {each.attempt for each in stored.attempts} if stored else set()
    if stored is not None and known == numbers and stored.config == config:
        return
    size, num_bad = _read_until(numbers, lines)
    train = mark_of(summary.run.train_metrics, size or (stored.train.size if stored else 0))
    events = mark_of(summary.run.events)
    if train is None or events is None:
        return
    fresh = StoredSummary(
        stage=summary.stage,
        job_name=summary.job_name,
        config=config,
        train=train,
        events=events,
        attempts=tuple(
            StoredAttempt(
                attempt=each.attempt.attempt,
                facts=_facts(each.attempt),
                split=astuple(each.split),
                first_step=each.attempt.first_step,
                last_step=each.attempt.last_step,
                **_shared(each),
            )
            for each in over
        ),
        num_bad_lines=num_bad + (stored.num_bad_lines if stored else 0),
        cuts=stored.cuts if stored else {},
    )
    write_summary(summary.run, fresh)


def _read_until(numbers: Collection[int], lines: Sequence[tuple[int, Step | None]]) -> tuple[int, int]:
    """Return the end of these attempts' last step that follows none of another attempt, and bad lines before.

    Reading starts there next time: a line without a step may be half written.
    """
    size = num_bad = bad_since = 0
    for end, step in lines:
        if step is None:
            bad_since += 1
        elif step.attempt not in numbers:
            break
        else:
            size, num_bad, bad_since = end, num_bad + bad_since, 0
    return size, num_bad


def _shared(each: AttemptSummary | StoredAttempt) -> dict[str, Any]:
    """Return the fields of an attempt that are stored unchanged."""
    names = ("end", "num_steps", "num_lost", "last_useful", "mfu_s", "mfu_time_s", "has_steps")
    return {name: getattr(each, name) for name in names}
