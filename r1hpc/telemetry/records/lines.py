"""Declare the keys of the files in metrics/, of evaluation.json and of plan.json; read the end of a file.

Keys without a reader are not declared; each writer documents its other keys. Lines of metrics/train.jsonl are
telemetry.records.metrics.Step, those of attempts.jsonl are in telemetry.records.attempts. See base.records.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from r1hpc.base.errors import StateError
from r1hpc.base.files import open_plain, parse_object, read_json
from r1hpc.base.records import Amount, Count, Duration, Finite, Time
from r1hpc.base.run_dir import RunDir


class PlanFacts(TypedDict, total=False):
    """Keys of plan.json that are read from runs of every version."""

    num_steps: Count | None
    time_limit_s: Count | None
    warning_window_s: Count | None
    gpu_hours_ceiling: Amount | None
    node_hours_ceiling: Amount | None
    account: str | None
    first_item: Count | None


class MetricEvent(TypedDict):
    """A line of metrics/events.jsonl: a save, a resume, a warning."""

    event: str
    time: Time
    attempt: Count
    global_step: NotRequired[Count]
    seconds: NotRequired[Duration]
    waited_s: NotRequired[Duration | None]
    copied_at: NotRequired[Time | None]
    write_s: NotRequired[Duration | None]
    bytes: NotRequired[Count | None]
    num_nodes: NotRequired[Count]


class Device(TypedDict):
    """The static fields of a GPU."""

    uuid: str
    index: NotRequired[Count | None]
    name: NotRequired[str | None]
    memory_total_bytes: NotRequired[Count | None]
    power_limit_w: NotRequired[Finite | None]


class Reading(TypedDict):
    """The readings of one GPU at one moment."""

    uuid: str
    gpu_utilization_percent: NotRequired[Finite | None]
    memory_utilization_percent: NotRequired[Finite | None]
    power_w: NotRequired[Finite | None]
    memory_used_bytes: NotRequired[Amount | None]
    temperature_c: NotRequired[Finite | None]
    energy_j: NotRequired[Finite | None]
    throttle_reasons: NotRequired[list[str] | None]
    ecc_corrected_volatile: NotRequired[int | None]
    ecc_uncorrected_volatile: NotRequired[int | None]
    error: NotRequired[str | None]


class _Stamp(TypedDict):
    time: Time
    node: NotRequired[str | None]
    attempt: NotRequired[Count]
    source: NotRequired[str | None]


class Devices(_Stamp):
    """A line of metrics/gpu-<node>.jsonl at each start of a sampler."""

    period_s: NotRequired[Duration]
    driver: NotRequired[str | None]
    gpus: list[Device]


class NoDriver(_Stamp):
    """The line written instead if there is no driver."""

    message: NotRequired[str | None]


class Tick(_Stamp):
    """All GPUs of a node at one moment."""

    gpus: list[Reading]


class RankHead(TypedDict):
    """A line of metrics/ranks.jsonl at the begin of an attempt."""

    attempt: Count
    nodes: NotRequired[list[str]]
    gpu_uuids: NotRequired[list[str | None]]


class RankMeans(TypedDict):
    """Each rank's work and wait; the lists are in order of rank."""

    attempt: Count
    step_time_s: list[Duration]
    wait_s: list[Finite]


class Interval(TypedDict):
    """A share and its 95 % interval."""

    value: Finite
    low: Finite
    high: Finite


class TaskEvaluation(TypedDict):
    """The results of one task or test file."""

    num_questions: Count
    greedy: Interval
    pass_at: dict[str, Interval]
    maj_at: NotRequired[dict[str, Interval] | None]
    response_length: Finite
    truncated_share: Finite


class Overlap(TypedDict):
    """The part of a test file that is in the training data."""

    num_found: Count
    num_questions: Count
    num_too_short: Count
    ngram: Count


class EvaluationSummary(TypedDict):
    """evaluation.json, and a line of metrics/evaluation.jsonl without its step."""

    greedy: Interval
    pass_at: dict[str, Interval]
    maj_at: NotRequired[dict[str, Interval] | None]
    response_length: Finite
    num_items: Count
    num_questions: NotRequired[Count]
    tasks: NotRequired[dict[str, TaskEvaluation]]
    contamination: NotRequired[dict[str, Overlap] | None]
    not_searched: NotRequired[list[str]]


class EvaluatedStep(TypedDict):
    """The keys of metrics/evaluation.jsonl that show an evaluation and its weights."""

    global_step: Count
    policy: NotRequired[str]


class EvaluationLine(EvaluationSummary, EvaluatedStep):
    """The full line."""


class AnswerLine(TypedDict):
    """A question and the model's answer: a line of metrics/answers-<step>.jsonl, or of a part."""

    index: Count
    prompt: str
    expected: str
    greedy: str
    greedy_correct: bool
    greedy_length: Amount
    num_samples: Count
    num_correct: Count
    mean_length: Amount
    task: NotRequired[str]


def read_plan(run: RunDir) -> PlanFacts:
    """Return the keys of plan.json; none if it is missing or damaged, which the report says."""
    try:
        plan: PlanFacts = read_json(run.plan, PlanFacts)
    except (FileNotFoundError, StateError):
        return {}
    return plan


def gpu_line(record: dict[str, Any]) -> Any:
    """Return the shape of a line of metrics/gpu-<node>.jsonl, by its event."""
    return {"devices": Devices, "no_driver": NoDriver}.get(str(record.get("event")), Tick)


@dataclass(frozen=True)
class Tail:
    """Complete JSON objects, oldest first."""

    records: tuple[dict[str, Any], ...] = ()
    first: dict[str, Any] | None = None
    """The first record of the file, even if the rest begins later."""
    is_whole: bool = True


def read_tail(path: Path, max_bytes: int) -> Tail:
    """Return the records in the last `max_bytes` of a file, without torn lines; none if it is missing."""
    try:
        with open_plain(path) as file:
            first = parse_object(file.readline())
            size = file.seek(0, os.SEEK_END)
            start = max(0, size - max_bytes)
            file.seek(start)
            lines = file.read(max_bytes).splitlines()
    except FileNotFoundError:
        return Tail()
    whole = lines[1:] if start else lines  # the first may be half a line
    return Tail(tuple(r for line in whole if (r := parse_object(line)) is not None), first, start == 0)
