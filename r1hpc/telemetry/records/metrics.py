"""Write and read metrics/train.jsonl (a line per optimizer step), metrics/events.jsonl and ledger/.

The ledger has the samples that each step read. `audit_ledger` checks that each was read exactly once;
`compare` finds steps that differ between two runs.

Floats are written by `repr`, which reads back as the same double. JSON has no NaN and no infinity: these are
written as null, with the value in `"nonfinite": {"grad_norm": "inf"}` on the same line.

After a crash the next attempt repeats some steps. The line of the highest attempt counts, but not if it is
beyond the last step of the newest attempt: the weights never saw it. Every other line is lost work.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TypeVar

from r1hpc.base.files import (
    GrowingFile,
    append_record,
    fsync_dir,
    fsync_file,
    iter_objects,
    iter_records,
    parse_object,
)
from r1hpc.base.run_dir import RunDir
from r1hpc.telemetry.records.lines import MetricEvent, read_plan, read_tail
from r1hpc.telemetry.records.rungs import open_rungs

_FOLLOW_BYTES = 2**22
_MOST_RANGES = 4
_LARGEST = 2**63
_NO_LATER = 7_258_118_400.0
"""2200-01-01, Unix seconds."""


class Step(NamedTuple):
    """One optimizer step. `tokens` is cumulative, `time` Unix seconds at the end of the step."""

    global_step: int
    attempt: int
    loss: float | None = None
    grad_norm: float | None = None
    lr: float | None = None
    tokens: int | None = None
    step_time_s: float | None = None
    data_time_s: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    loss_scale: float | None = None
    skipped: bool = False
    time: float | None = None
    extra: dict[str, Any] | None = None
    """More fields of a stage, for example rewards."""

    def value(self, key: str) -> Any:
        """Return a field by its name in the file; None if the line does not have it."""
        return getattr(self, key) if key in _FIELDS else (self.extra or {}).get(key)

    def number(self, key: str) -> float | None:
        """Return a field if it is a number, including nan and infinities, else None."""
        value = self.value(key)
        return value if value.__class__ is float or _is_small(value) else None


class LedgerRecord(NamedTuple):
    """The data of one step: sample ids first_sample .. first_sample + num_samples - 1.

    `num_samples`, `sample_sum` (of the ids) and `checksum` (of the data) are sums over the ranks' reads.
    """

    global_step: int
    attempt: int
    first_sample: int
    num_samples: int
    sample_sum: int | None = None
    checksum: Any = None

    @property
    def data(self) -> tuple[Any, ...]:
        """Return the values that must be equal when two attempts take the same step."""
        return self[2:]

    @property
    def is_consecutive(self) -> bool:
        """True if the sum of the ids is that of num_samples consecutive ids, or was not recorded."""
        n = self.num_samples
        return self.sample_sum is None or self.sample_sum == n * self.first_sample + n * (n - 1) // 2


@dataclass(frozen=True)
class Steps:
    """metrics/train.jsonl, folded."""

    effective: dict[int, Step]
    """By global_step, ascending."""
    lost: tuple[Step, ...]
    """In the order they were taken."""

    def column(self, key: str) -> list[Any]:
        """Return one field of the effective steps, in order."""
        return [step.value(key) for step in self.effective.values()]


class Difference(NamedTuple):
    """One value that differs between two runs, floats in hexadecimal; `-` if a run lacks the step."""

    global_step: int
    key: str
    a: str
    b: str


@dataclass(frozen=True)
class Audit:
    """The ledger's check of the data. Ranges are (first, last), inclusive."""

    num_steps: int
    num_samples: int
    num_lost_steps: int
    """Repeated steps: their samples count once."""
    missing_steps: tuple[tuple[int, int], ...]
    """Steps before the last one that no attempt recorded."""
    repeated_samples: tuple[tuple[int, int], ...]
    skipped_samples: tuple[tuple[int, int], ...]
    wrong_steps: tuple[int, ...]
    """Steps whose ranks together read other ids than the step's: the sum differs."""
    changed_steps: tuple[int, ...]
    """Steps that consumed other data when repeated."""

    @property
    def exactly_once(self) -> bool:
        spoiled = (self.missing_steps, self.repeated_samples, self.skipped_samples)
        return not (any(spoiled) or self.wrong_steps or self.changed_steps)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "exactly_once": self.exactly_once}


class MetricWriter:
    """Appends the records of one attempt; only rank 0 has one. Each record is one write(2).

    Not fsynced: a record survives the death of the process; a power cut takes only steps that are repeated.
    """

    def __init__(self, run: RunDir, attempt: int) -> None:
        run.metrics.mkdir(mode=0o700, exist_ok=True)
        self._steps = run.train_metrics
        self._events, self._logged = run.events, run.logged
        self._ledger = run.ledger / f"attempt_{attempt}.jsonl"
        self._attempt = attempt
        self._rungs = open_rungs(run, read_logged)

    def step(self, *, global_step: int, **fields: Any) -> None:
        """Write one optimizer step; `global_step` counts finished steps, from 1. See Step for the fields."""
        head = {"global_step": global_step, "attempt": self._attempt}
        append_record(self._steps, _finite({**head, "time": time.time(), **fields}), durable=False)
        if self._rungs is not None:
            self._rungs.reached(global_step, fields)

    def event(self, name: str, **fields: Any) -> None:
        """Write any other event, for example save(global_step, seconds, bytes), start, resume."""
        record = {"event": name, "time": time.time(), "attempt": self._attempt, **fields}
        append_record(self._events, _finite(record), durable=False)

    def logged(self, global_step: int, values: dict[str, Any]) -> None:
        """Write the numbers among what a library logs; tensors of one element count."""
        items = {name: value.item() if hasattr(value, "item") else value for name, value in values.items()}
        numbers = {name: value for name, value in items.items() if is_number(value)}
        if numbers:
            record = {"global_step": global_step, "attempt": self._attempt, "time": time.time()}
            append_record(self._logged, _finite({**numbers, **record}), durable=False)

    def used(self, *, global_step: int, **data: Any) -> None:
        """Write the data that a step used to the ledger. See LedgerRecord for the fields."""
        head = {"global_step": global_step, "attempt": self._attempt}
        append_record(self._ledger, {**head, **data}, durable=False)

    def make_durable(self) -> None:
        """Sync steps and ledger: a checkpoint must not know of steps that they lack."""
        for path in (self._steps, self._ledger):
            if path.exists():  # a run that stops before its first step has neither
                fsync_file(path)
                fsync_dir(path.parent)


def read_logged(run: RunDir) -> dict[str, dict[int, float]]:
    """Return name -> step -> number of what a script logged, evaluations too, ascending by step.

    The newest value of a step counts. Steps that a later attempt did not resume from are left out.
    """
    begins = {
        int(event.get("attempt") or 0): int(event.get("global_step") or 0)
        for event in read_events(run)
        if event["event"] in ("resume", "fresh")
    }
    found: dict[str, dict[int, float]] = {}
    lines = _steps_of(record for _, record in iter_objects(run.logged))
    for line in sorted(lines, key=lambda step: step.attempt):
        if any(line.attempt < attempt and line.global_step > step for attempt, step in begins.items()):
            continue
        for name in ("loss", "grad_norm", "lr", *(line.extra or {})):
            if (number := line.number(name)) is not None:
                found.setdefault(name, {})[line.global_step] = number
    return {name: dict(sorted(by_step.items())) for name, by_step in found.items()}


def read_events(run: RunDir) -> list[dict[str, Any]]:
    """Return the events of all attempts, in the order they were written."""
    return list(iter_records(run.events, MetricEvent))


def loaded_step(run: RunDir, attempt: int) -> int | None:
    """Return the checkpoint that an attempt resumed from; None if it loaded none, or none yet."""
    events = (e for e in read_events(run) if (e.get("event"), e.get("attempt")) == ("resume", attempt))
    return max((event["global_step"] for event in events if "global_step" in event), default=None)


def read_steps(run: RunDir) -> Steps:
    """Fold metrics/train.jsonl. A missing file is a run without steps; torn lines are left out."""
    return fold_steps(step for _, step in steps_from(run, 0) if step is not None)


def steps_from(run: RunDir, offset: int) -> Iterator[tuple[int, Step | None]]:
    """Yield (line end, step) of each line of metrics/train.jsonl from byte `offset` on.

    None is a line without a step: a kill tore it, or it is not ours.
    """
    for end, record in iter_objects(run.train_metrics, offset):
        yield end, None if record is None else _to_step(record)


def fold_steps(steps: Iterable[Step]) -> Steps:
    """Fold steps in writing order into the lasting and the lost ones."""
    effective, lost = _fold(steps)
    return Steps(effective, tuple(lost))


def last_steps(run: RunDir, count: int, tail_bytes: int = 65536) -> list[Step]:
    """Return the newest lines without reading the whole file: the run's position and speed."""
    return list(_steps_of(read_tail(run.train_metrics, tail_bytes).records))[-count:]


def follow_steps(run: RunDir) -> Callable[[], list[Step]]:
    """Return a function that returns the steps written since its last call, in order."""
    file = GrowingFile(run.train_metrics)
    return lambda: list(_steps_of(map(parse_object, file.lines(_FOLLOW_BYTES))))


COMPARED = ("loss", "grad_norm", "lr")


def compare(run_a: RunDir, run_b: RunDir, keys: Sequence[str] = COMPARED) -> list[Difference]:
    """Return every effective step whose `keys` differ between two runs, or that only one of them took.

    Doubles are equal if their bits are. A run that was killed and resumed must not differ from one that was
    not.
    """
    a, b = read_steps(run_a).effective, read_steps(run_b).effective
    found = []
    for step in sorted(a.keys() | b.keys()):
        if step not in a or step not in b:
            texts = (f"attempt {taken[step].attempt}" if step in taken else "-" for taken in (a, b))
            found.append(Difference(step, "global_step", *texts))
            continue
        for key in keys:
            text_a, text_b = _hex(a[step].value(key)), _hex(b[step].value(key))
            if text_a != text_b:
                found.append(Difference(step, key, text_a, text_b))
    return found


def read_ledger(run: RunDir) -> dict[int, LedgerRecord]:
    """Return the data of each effective step, by global_step, ascending."""
    return _fold(_iter_ledger(run))[0]


def audit_ledger(run: RunDir) -> Audit:
    """Check that every sample was consumed exactly once, over all attempts.

    The first step must begin at the run's first item (in a chain, reinforcement learning continues after the
    questions of earlier stages) or at sample 0, and every other one where the step before it ended; the ids
    read by the ranks must add up to those of the step; and a repeated step must have consumed the same data
    again.
    """
    effective, lost = _fold(_iter_ledger(run))
    missing, repeated, skipped = [], [], []
    previous, position = 0, read_plan(run).get("first_item") or 0
    for record in effective.values():
        end = record.first_sample + record.num_samples
        if record.global_step > previous + 1:
            missing.append((previous + 1, record.global_step - 1))
        elif record.first_sample > position:
            skipped.append((position, record.first_sample - 1))
        if record.first_sample < position:
            repeated.append((record.first_sample, min(position, end) - 1))
        previous, position = record.global_step, max(position, end)
    redone = [(record, effective[record.global_step]) for record in lost if record.global_step in effective]
    return Audit(
        num_steps=len(effective),
        num_samples=sum(record.num_samples for record in effective.values()),
        num_lost_steps=len(lost),
        missing_steps=tuple(missing),
        repeated_samples=tuple(repeated),
        skipped_samples=tuple(skipped),
        wrong_steps=tuple(n for n, record in effective.items() if not record.is_consecutive),
        changed_steps=tuple(sorted({new.global_step for old, new in redone if old.data != new.data})),
    )


def format_ranges(ranges: Iterable[tuple[int, int]]) -> str:
    """Return `3-5, 9` for a person; beyond four ranges `and 7 more`."""
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in ranges]
    more = f" and {len(texts) - _MOST_RANGES} more" if len(texts) > _MOST_RANGES else ""
    return ", ".join(texts[:_MOST_RANGES]) + more


def is_number(value: Any) -> bool:
    """True for an int or a float, including nan; False for a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


_NUMBERS = tuple(key for key in Step._fields if key not in ("global_step", "attempt", "skipped", "extra"))
_FIELDS = frozenset(Step._fields) - {"extra"}
_RecordT = TypeVar("_RecordT", Step, LedgerRecord)


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    """Return the record with NaN and infinities moved into `nonfinite`, as text."""
    odd = {k: repr(v) for k, v in record.items() if isinstance(v, float) and not math.isfinite(v)}
    return {**record, **dict.fromkeys(odd), "nonfinite": odd} if odd else record


def _steps_of(records: Iterable[dict[str, Any] | None]) -> Iterator[Step]:
    """Yield the records that are steps; None is a torn line."""
    for record in records:
        if record is not None and (step := _to_step(record)) is not None:
            yield step


def _to_step(record: dict[str, Any]) -> Step | None:
    if not _is_index(record.get("global_step")) or not _is_index(record.get("attempt")):
        return None
    try:
        if "nonfinite" in record:
            odd = record.pop("nonfinite")
            record |= {key: float(text) for key, text in odd.items()}
    except (AttributeError, TypeError, ValueError):
        return None
    if not _has_numbers(record):
        return None
    if _FIELDS.issuperset(record):
        return Step(**record)
    known = {key: record.pop(key) for key in list(record) if key in _FIELDS}
    return Step(**known, extra=record)


def _has_numbers(record: dict[str, Any]) -> bool:
    """True if the values that are added up and drawn are numbers, whatever else the file holds.

    By hand, not by a shape: there is a line for every step of years.
    """
    for key in _NUMBERS:
        value = record.get(key)
        if value.__class__ is not float and value is not None and not _is_small(value):
            return False
    time, seconds, mfu = record.get("time"), record.get("step_time_s"), record.get("mfu")
    is_time = time is None or 0 <= time < _NO_LATER
    return is_time and (seconds is None or 0 <= seconds < _NO_LATER) and (mfu is None or abs(mfu) < _LARGEST)


def _is_small(value: Any) -> bool:
    """True for an integer that fits in a float."""
    return value.__class__ is int and -_LARGEST <= value < _LARGEST


def _is_index(value: Any) -> bool:
    return _is_small(value) and value >= 0


def _iter_ledger(run: RunDir) -> Iterator[LedgerRecord]:
    # attempt_10 after attempt_9: the fold needs attempts in order.
    for path in sorted(run.ledger.glob("attempt_*.jsonl"), key=lambda path: (len(path.name), path.name)):
        for record in (found for _, found in iter_objects(path) if found is not None):
            known: dict[str, Any] = {key: record.get(key) for key in LedgerRecord._fields}
            if all(map(_is_index, list(known.values())[:4])) and (
                known["sample_sum"] is None or _is_index(known["sample_sum"])
            ):
                yield LedgerRecord(**known)


def _fold(records: Iterable[_RecordT]) -> tuple[dict[int, _RecordT], list[_RecordT]]:
    """Return effective records by ascending step, and the lost ones. Records come attempt after attempt."""
    effective: dict[int, _RecordT] = {}
    lost: list[_RecordT] = []
    newest: _RecordT | None = None
    for record in records:
        old = effective.get(record.global_step)
        if old is not None and old.attempt > record.attempt:
            lost.append(record)
            continue
        if old is not None:
            lost.append(old)
        effective[record.global_step] = record
        if newest is None or record.attempt >= newest.attempt:
            newest = record
    if newest is not None:
        beyond = sorted(step for step in effective if step > newest.global_step)
        lost += [effective.pop(step) for step in beyond]
    return dict(sorted(effective.items())), lost


def _hex(value: Any) -> str:
    return value.hex() if isinstance(value, float) else json.dumps(value)
