"""Find which items of its task a stage asks, and from which item another task asks none of them.

The questions of a task follow from its settings: the file and its columns, the digest of custom code, a
generator with its options; not the template or the judge. No file of questions is read for it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1hpc.base.errors import ConfigError
from r1hpc.config.paths import FILES, is_own
from r1hpc.config.plugins import locate
from r1hpc.config.schema.rl import TaskConfig
from r1hpc.config.schema.run import RunConfig
from r1hpc.plan.topology.batch import updates_per_rollout
from r1hpc.tasks.problems.gym import PREFIX
from r1hpc.tasks.problems.registry import counts_of, make_task, parts_of, weights_of
from r1hpc.tasks.problems.task import Task

_NO_QUESTIONS = ("template", "judge")
"""Options that change the form or judging of a question, not the question."""


def asked(config: RunConfig) -> tuple[range, bool]:
    """Return the items that stage traces, generate or rl (at most) asks or shows; True if held out."""
    generate = config.generate
    if config.stage in ("traces", "generate"):
        items = range(generate.first_item, generate.first_item + generate.num_items)
        return items, generate.held_out and config.stage == "generate"
    if config.stage != "rl":
        return range(0), False
    rollouts = -(-config.train.num_steps // updates_per_rollout(config))
    most = config.rollout.num_prompts * (1 + config.rl.max_resamples)
    first = config.task.first_item or 0
    return range(first, first + rollouts * most), False


def asked_items(config: RunConfig) -> range:
    """Return the items of the training part."""
    items, held_out = asked(config)
    return range(0) if held_out else items


def repeated(config: RunConfig, task: Task) -> list[str]:
    """Return a sentence if a stage asks more items than there are questions."""
    items, held_out = asked(config)
    there = task.num_questions(held_out) if items else None
    if there is None or len(items) <= there:
        return []
    most = "up to " if config.rl.max_resamples else ""
    part = "held-out questions" if held_out else "questions"
    return [
        f"task {task.name} is asked {most}{len(items):,} items, and {there:,} {part} come before one comes "
        "again"
    ]


@dataclass(frozen=True)
class _Part:
    questions: tuple[object, ...]
    """The settings that decide which question an item is."""
    share: int
    """Its items in a block of the mixture; 1 for a single task."""


@dataclass(frozen=True)
class _Layout:
    seed: int | None
    """The mixture's; None: a single task."""
    parts: tuple[_Part, ...]

    @property
    def block(self) -> int:
        return sum(part.share for part in self.parts)


def first_beyond(task: TaskConfig, shown: TaskConfig, end: int) -> int:
    """Return the item from which `task` asks no question of the items of `shown` below `end`; 0 if they have
    none in common, or in another order. A drawn question can still repeat by chance, and so does a list once
    it is finished.

    Raises:
        UsageError: there is no such task, option or weight.
    """
    ours, theirs = _layout(task), _layout(shown)
    if ours == theirs:
        return end
    blocks = -(-end // theirs.block)
    return max(
        (
            -(-blocks * their.share // our.share) * ours.block
            for our in ours.parts
            for their in theirs.parts
            if our.questions == their.questions
        ),
        default=0,
    )


def _layout(task: TaskConfig) -> _Layout:
    counts, parts = counts_of(weights_of(task)), parts_of(task)
    return _Layout(
        task.seed if task.mix else None,
        tuple(_Part(_questions(part), counts[label]) for label, part in parts.items()),
    )


def _questions(config: TaskConfig) -> tuple[object, ...]:
    name, options = config.name, dict(config.options)
    if isinstance(options.get("path"), str):
        options["path"] = str(Path(options["path"]).resolve())
    if name in FILES:
        path = options.get("path")
        return "file", path, config.question, config.seed, config.choices, config.drop_longer
    if is_own(name):
        return (*_named_by_content(name), config.seed, _text(options))
    if name.startswith(PREFIX):
        return name, config.seed, _text({k: v for k, v in options.items() if k not in _NO_QUESTIONS})
    return (make_task(config).id,)


def _named_by_content(spec: str) -> tuple[str, ...]:
    try:
        plugin = locate(spec)
    except ConfigError:  # moved away since it was frozen
        return (spec,)
    return plugin.module, plugin.name, plugin.digest


def _text(options: Mapping[str, Any]) -> str:
    return json.dumps(options, sort_keys=True, default=str)
