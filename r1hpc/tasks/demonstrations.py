"""Stage traces: a task's own worked answers, some with their thinking, in the form that will be counted.

shown = demonstrate(task, config, index)
check_demonstrations(task, config)          # before the stage is submitted
"""

from dataclasses import dataclass

from r1hpc.config.schema import RunConfig
from r1hpc.tasks.completion import take_apart
from r1hpc.tasks.task import Draws, Item, Task

_FINE = 10**6
_MOST_TRIED = 20_000
_TRIED_OF_DRAWN = 16
"""Of a task that draws its questions: one is as good as another."""


@dataclass(frozen=True)
class Demonstration:
    """One worked answer."""

    item: Item
    completion: str
    thinking: bool
    """It shows its thinking."""


def demonstrate(task: Task, config: RunConfig, index: int) -> Demonstration:
    """The worked answer of an item. Whether it shows its thinking depends on seed and index alone.

    Raises:
        UsageError: the task has no such answer, or no thinking to show.
    """
    item = task.item(index)
    draw = Draws("thinking", config.task.seed, index).below(_FINE)
    thinking = draw < config.generate.thinking_share * _FINE
    completion = task.demonstration(item, thinking)
    if config.reward.answer_in == "boxed":
        parts = take_apart(completion)
        completion = f"<think>{parts.thinking}</think>\\boxed{{{parts.answer}}}"
    return Demonstration(item, completion, thinking)


def check_demonstrations(task: Task, config: RunConfig) -> None:
    """Make those of questions that come from a list, in which one may be like no other; else the first few.

    Raises:
        UsageError: as `demonstrate`.
    """
    first, asked = config.generate.first_item, config.generate.num_items
    known = task.num_questions()
    most = _TRIED_OF_DRAWN if known is None else min(known, _MOST_TRIED)
    for index in range(first, first + min(asked, most)):
        demonstrate(task, config, index)
