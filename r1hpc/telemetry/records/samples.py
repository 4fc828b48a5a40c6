"""Read what a model wrote: completions of training, answers of evaluations, lines of generated files.

    samples = read_samples(run, step=40)

Training keeps a bounded share in metrics/samples-<step>.jsonl (train/rl/samples.py). A step that was taken
again has only the completions of the attempt that counts.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from r1hpc.base.errors import UsageError
from r1hpc.base.files import iter_records
from r1hpc.base.run_dir import RunDir
from r1hpc.telemetry.records.evaluations import evaluated_policies, read_answers
from r1hpc.telemetry.records.lines import AnswerLine
from r1hpc.telemetry.records.metrics import Step, read_steps

_MOST_NAMED = 12
_MOST_GENERATED = 1000
"""Lines read of a file that may have millions."""


class SampleLine(TypedDict):
    """A completion of training: a line of metrics/samples-<step>.jsonl."""

    attempt: int
    is_lasting: bool
    item: int
    prompt: str
    expected: str
    completion: str
    correct: bool
    reward: float
    terms: dict[str, float]
    tokens: int
    is_cut: bool


class GeneratedLine(TypedDict):
    """A line of traces.jsonl."""

    prompt: str
    completion: str
    item: NotRequired[int]
    correct: NotRequired[bool]
    reward: NotRequired[float]
    tokens: NotRequired[int]


_OF_TRAINING = SampleLine.__annotations__.keys() - {"attempt", "is_lasting"}
_OF_GENERATED = ("item", "prompt", "completion", "correct", "reward", "tokens")


@dataclass(frozen=True)
class Sample:
    kind: str
    """training, evaluation or generated."""
    step: int | None
    """The optimizer step that it was sampled for, or that the evaluation followed."""
    item: int | None
    prompt: str
    completion: str
    """The greedy answer, if it is an evaluation. Long texts of training lack their middle."""
    expected: str | None = None
    correct: bool | None = None
    """None: it was not judged."""
    reward: float | None = None
    terms: dict[str, float] = field(default_factory=dict)
    """Each reward term, unweighted."""
    tokens: float | None = None
    is_cut: bool | None = None
    """True if the limit of tokens ended it; None: not recorded."""
    num_correct: int | None = None
    """Correct ones among the num_samples sampled answers of an evaluation."""
    num_samples: int | None = None


def samples_path(run: RunDir, step: int) -> Path:
    """Return the file with completions that optimizer step `step` was the first to train on."""
    return run.metrics / f"samples-{step:06d}.jsonl"


def sampled_steps(run: RunDir) -> list[int]:
    """Return the steps with a file of completions, ascending."""
    names = (re.fullmatch(r"samples-(\d+)\.jsonl", path.name) for path in run.metrics.glob("samples-*.jsonl"))
    return sorted(int(name[1]) for name in names if name)


def of_step(run: RunDir, step: Step, *, lasting: bool = False) -> list[Sample]:
    """Return the kept completions of a step as its own attempt sampled them.

    `lasting`: only if they are kept to the end of the run; those of other steps go with the next rollout.
    """
    lines = iter_records(samples_path(run, step.global_step), SampleLine)
    chosen = [line for line in lines if line["attempt"] == step.attempt]
    return [
        Sample("training", step.global_step, **{key: line[key] for key in _OF_TRAINING})
        for line in chosen
        if line["is_lasting"] or not lasting
    ]


def has_samples(run: RunDir) -> bool:
    """True if `read_samples` is likely to find some."""
    return bool(sampled_steps(run) or run.rl_evaluations.exists() or run.all_parts)


def read_samples(run: RunDir, step: int | None = None) -> list[Sample]:
    """Return the completions of one step of training, then the answers of the evaluation after it.

    Args:
        step: None: the newest of each; the whole of a run that takes no steps.

    Raises:
        UsageError: there are none, or none of this step.
    """
    steps, evaluated = read_steps(run).effective, sorted(evaluated_policies(run))
    sampled = [steps[each] for each in sampled_steps(run) if each in steps]
    chosen = [each for each in sampled if step in (None, each.global_step)]
    found = next((samples for each in reversed(chosen) if (samples := of_step(run, each))), [])
    if step in evaluated or (step is None and (evaluated or run.evaluation.exists())):
        found += _answers(*read_answers(run, step))
    if step is None and not found:
        found += _of_parts(run)
    if not found:
        there = [each.global_step for each in sampled if of_step(run, each)]
        raise UsageError(_nothing(run, step, there, evaluated))
    return found


def some_wrong_first(samples: Iterable[Sample], most: int) -> list[Sample]:
    """Return some of the samples, up to half of them wrong, those first."""
    known = list(samples)
    wrong = [each for each in known if each.correct is False]
    others = [each for each in known if each.correct is not False]
    num_wrong = max(most // 2, most - len(others))
    return [*wrong[:num_wrong], *others][:most]


def _answers(step: int | None, lines: Iterable[dict[str, Any]]) -> Iterator[Sample]:
    for line in lines:
        yield Sample(
            kind="evaluation",
            step=step,
            item=line["index"],
            prompt=line["prompt"],
            completion=line["greedy"],
            expected=line["expected"],
            correct=line["greedy_correct"],
            tokens=line["greedy_length"],
            num_correct=line["num_correct"],
            num_samples=line["num_samples"],
        )


def _of_parts(run: RunDir) -> Iterator[Sample]:
    """Yield the first lines of stages traces and generate, and of an evaluation that is not finished."""
    for path in [run.traces] if run.traces.exists() else run.all_parts:
        yield from _answers(None, islice(iter_records(path, AnswerLine), _MOST_GENERATED))
        for line in islice(iter_records(path, GeneratedLine), _MOST_GENERATED):
            yield Sample("generated", None, **{key: line.get(key) for key in _OF_GENERATED})  # type: ignore[arg-type]


def _nothing(run: RunDir, step: int | None, sampled: Sequence[int], evaluated: Sequence[int]) -> str:
    if step is None:
        return (
            f"{run.run_id} has kept no completions. Stages rl, generate, traces and evaluate keep some, from "
            "their first rollout, part or evaluation on"
        )
    spans = [
        f"{what} of steps {', '.join(map(str, steps[:_MOST_NAMED]))}{' ...' * (len(steps) > _MOST_NAMED)}"
        for what, steps in (("completions", sampled), ("evaluations", evaluated))
        if steps
    ]
    return f"{run.run_id} has nothing of step {step}; it has {' and '.join(spans) or 'no completions at all'}"
