"""Show a task's own worked answers for stage traces, some with thinking, in the form that will be counted."""

import time
from dataclasses import dataclass

from r1hpc.base.errors import UsageError
from r1hpc.config.schema.run import RunConfig
from r1hpc.tasks.grading.completion import out_of_box, take_apart
from r1hpc.tasks.problems.asked_items import asked_items
from r1hpc.tasks.problems.file import QuestionFile
from r1hpc.tasks.problems.registry import Mixture
from r1hpc.tasks.problems.task import Draws, Item, Task, members
from r1hpc.tasks.problems.user_task import OwnTask

_FINE = 10**6
_MOST_TRIED = 20_000
_TRIED_OF_OWN, _OWN_S = 500, 10.0
"""As many as that time allows."""
_TRIED_OF_OTHERS = 16
"""For tasks that make their questions: these are alike, and may be slow."""


@dataclass(frozen=True)
class Demonstration:
    """One worked answer."""

    item: Item
    completion: str
    thinking: bool
    """It shows its thinking."""


def demonstrate(task: Task, config: RunConfig, index: int) -> Demonstration:
    """Return the worked answer of an item. Seed and index alone decide if it shows its thinking. Raise
    UsageError if the task has no such answer, or no thinking to show."""
    item = task.item(index)
    draw = Draws("thinking", config.task.seed, index).below(_FINE)
    thinking = draw < config.generate.thinking_share * _FINE
    completion = task.demonstration(item, thinking)
    if config.reward.answer_in == "boxed":
        parts = take_apart(completion)
        answer = out_of_box((parts.answer or "").strip())  # of a custom task; files are read that way
        completion = f"<think>{parts.thinking}</think>\\boxed{{{answer}}}"
        if take_apart(completion, boxed=True).answer != answer:
            raise UsageError(
                f"the answer {answer!r:.60} of item {index} cannot be read out of a box: set "
                "reward.answer_in=tags, or leave the question out"
            )
    return Demonstration(item, completion, thinking)


def check_demonstrations(task: Task, config: RunConfig) -> None:
    """Make all demonstrations of files, in which any question may be unusual; for other tasks the first ones.
    Raise UsageError as `demonstrate`."""
    tried, until = dict.fromkeys(members(task), 0), time.monotonic() + _OWN_S
    for index in asked_items(config)[:_MOST_TRIED]:
        label = task.label_of(index) if isinstance(task, Mixture) else ""
        tried[label] += 1
        if tried[label] <= _most_tried(members(task)[label], until):
            demonstrate(task, config, index)


def _most_tried(task: Task, until: float) -> int:
    if isinstance(task, QuestionFile):
        return task.items_per_pass()
    return _TRIED_OF_OWN if isinstance(task, OwnTask) and time.monotonic() < until else _TRIED_OF_OTHERS
