"""Make the task of a configuration's `task` section: one task, or several with weights and labels.

    task.mix: {sums: {name: chain_sum, weight: 2}, game: {name: countdown}}

A mixture deals items in blocks. In each block every task has exactly its share, in the block's own order, so
that any stretch of items keeps the weights to within a block. The index remains the complete state.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

from r1hpc.base.errors import UsageError
from r1hpc.base.names import nearest
from r1hpc.config.paths import FILES, is_own
from r1hpc.config.schema.rl import TaskConfig
from r1hpc.tasks.problems.file import QuestionFile
from r1hpc.tasks.problems.gym import PREFIX, ReasoningGym
from r1hpc.tasks.problems.task import ChainSum, Countdown, Draws, Item, Task, task_id
from r1hpc.tasks.problems.user_task import UserTask

_FINEST = 100
"""Denominator to which weights are rounded."""
_TOLERANCE = 0.01
"""Relative change of a weight that rounding may cause."""
_MOST_IN_A_BLOCK = 1000
_Maker = Callable[[int, Mapping[str, Any]], Task]
_MADE_UP: dict[str, _Maker] = {"chain_sum": ChainSum, "countdown": Countdown}


class Mixture:
    """Its items carry the label of their task; each task is judged by its own judge."""

    judge = ""
    judge_settings: Mapping[str, Any] = {}

    def __init__(self, seed: int, tasks: Mapping[str, Task], weights: Mapping[str, float]) -> None:
        self.members = dict(tasks)
        self.name = " + ".join(tasks)
        self._seed = seed
        self._counts = counts_of(weights)
        self._size = sum(self._counts.values())
        inner = {label: [task.id, self._counts[label]] for label, task in tasks.items()}
        self.id = task_id("mix", seed, inner)
        self._block = lru_cache(maxsize=64)(self._dealt)

    def item(self, index: int, held_out: bool = False) -> Item:
        block, place = divmod(index, self._size)
        label, number = self._block(block)[place]
        own = self.members[label].item(block * self._counts[label] + number, held_out)
        return replace(own, index=index, task=label)

    def label_of(self, index: int) -> str:
        """Return the task of an item, without making the item."""
        block, place = divmod(index, self._size)
        return self._block(block)[place][0]

    def items_of(self, label: str, items: range) -> range:
        """Return a task's own items in the blocks that lie completely in these items."""
        count = self._counts[label]
        return range(-(-items.start // self._size) * count, items.stop // self._size * count)

    def num_questions(self, held_out: bool = False) -> int | None:
        """Return how many items can be asked before one of the tasks repeats itself."""
        known = {label: task.num_questions(held_out) for label, task in self.members.items()}
        blocks = [there // self._counts[label] for label, there in known.items() if there is not None]
        return min(blocks) * self._size if blocks else None

    def demonstration(self, item: Item, thinking: bool) -> str:
        return self.members[item.task].demonstration(item, thinking)

    def _dealt(self, block: int) -> list[tuple[str, int]]:
        """Return (label, number of that task's item in this block) for each position."""
        cards = [(label, number) for label, count in self._counts.items() for number in range(count)]
        return [cards[at] for at in Draws("mix", self._seed, block).shuffled(self._size)]


def counts_of(weights: Mapping[str, float]) -> dict[str, int]:
    """Return each task's items in a block: the smallest whole numbers in the proportion of the weights. Raise
    UsageError if the weights are too far apart or too fine."""
    total = sum(weights.values())
    shares = {label: Fraction(w / total).limit_denominator(_FINEST) for label, w in weights.items()}
    whole = math.lcm(*(share.denominator for share in shares.values()))
    counts = {label: int(share * whole) for label, share in shares.items()}
    common = math.gcd(*counts.values())
    if not all(counts.values()) or sum(counts.values()) // max(1, common) > _MOST_IN_A_BLOCK:
        raise UsageError(
            f"task.mix: the weights {dict(weights)} are too far apart or too fine: take simple proportions, "
            f"none below one in {_FINEST}"
        )
    return {label: count // common for label, count in counts.items()}


def check_weights(weights: Mapping[str, float]) -> None:
    """Refuse weights of a new run that rounding would change; an older run keeps its rounded weights. Raise
    UsageError with the rounded weights."""
    counts = counts_of(weights)
    for label, weight in weights.items():
        exact = weight / sum(weights.values())
        if abs(counts[label] / sum(counts.values()) - exact) > _TOLERANCE * exact:
            proportion = ", ".join(f"{label}: {count}" for label, count in counts.items())
            raise UsageError(
                f"task.mix: the weights {dict(weights)} are too fine, and would become {proportion}: give "
                f"these, or others of which none is below one in {_FINEST}"
            )


def make_task(
    config: TaskConfig, code: Path | None = None, fits: Callable[[str, str], bool] | None = None
) -> Task:
    """Return the task, or the mixture of tasks, that a configuration names.

    Args:
        code: the frozen code of a run inspected from outside; None: custom code is found by its name, in a
            job beside this package.
        fits: decides by prompt and file line if a row is kept (tokenizer.fitting); None: every row is.

    Raises:
        UsageError: an unknown task or option, an unusable file, a missing package, or custom code that fails.
    """
    if not config.mix:
        return _single(config, code, fits)
    tasks = {label: _single(part, code, fits) for label, part in parts_of(config).items()}
    return Mixture(config.seed, tasks, weights_of(config))


def parts_of(config: TaskConfig) -> dict[str, TaskConfig]:
    """Return by label each entry of task.mix as a task; a single task under the empty label."""
    return {label: _part(config, part) for label, part in config.mix.items()} or {"": config}


def weights_of(config: TaskConfig) -> dict[str, float]:
    """Return the weights of task.mix by label; a single task has one."""
    return {label: float(part.get("weight", 1)) for label, part in config.mix.items()} or {"": 1.0}


def _part(config: TaskConfig, part: Mapping[str, Any]) -> TaskConfig:
    own = {name: value for name, value in part.items() if name != "weight"}
    return replace(config, mix={}, **{"options": {}, **own})


def _single(config: TaskConfig, code: Path | None, fits: Callable[[str, str], bool] | None) -> Task:
    if config.name.startswith(PREFIX):
        return ReasoningGym(config.name, config.seed, config.options)
    if is_own(config.name):
        return UserTask(config.name, config.seed, config.options, code)
    if config.name in FILES:
        return QuestionFile(config, fits)
    if config.name not in _MADE_UP:
        known = ["file", *_MADE_UP, f"{PREFIX}NAME", "FILE.py:NAME"]
        raise UsageError(
            f"task.name={config.name!r} is unknown{nearest(config.name, known)}; known: {', '.join(known)}"
        )
    return _MADE_UP[config.name](config.seed, config.options)
