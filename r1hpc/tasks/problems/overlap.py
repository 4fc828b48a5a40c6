"""Tell from their settings if two tasks ask the same questions; no file of questions is read.

    first_beyond(task, shown, end)   # the item from which `task` asks none of the items of `shown` below
    `end` reordered(task, shown)           # settings by which it asks a list of `shown` in another order

The questions depend on the file and its column, the digest of custom code, a generator with its options; not
on the template or the judge. The tasks of a mixture are compared one by one.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from r1hpc.base.errors import ConfigError
from r1hpc.config.paths import FILES, is_own
from r1hpc.config.plugins import locate
from r1hpc.config.schema.rl import TaskConfig
from r1hpc.tasks.problems.gym import PREFIX
from r1hpc.tasks.problems.registry import counts_of, make_task, parts_of, weights_of

_NO_QUESTIONS = ("template", "judge")
"""Options of built-in tasks that change the form or judging of a question, not the question."""


@dataclass(frozen=True)
class _Part:
    """A task, or one of a mixture."""

    questions: tuple[object, ...]
    """Settings that decide the set of questions."""
    order: Mapping[str, object]
    """Settings that decide which of them an item is."""
    share: int
    """Its items in a block of the mixture; 1 for a single task."""
    config: TaskConfig = field(compare=False)
    label: str = field(compare=False)

    def is_listed(self) -> bool:
        """True if its questions are a list, and its settings decide only the order; others are drawn."""
        name = self.config.name
        return name in FILES or (is_own(name) and make_task(self.config).num_questions() is not None)


@dataclass(frozen=True)
class _Layout:
    """Deal the items of a configuration to its parts."""

    seed: int | None
    """The mixture's seed; None: a single task."""
    parts: tuple[_Part, ...]

    @property
    def block(self) -> int:
        return sum(part.share for part in self.parts)


def first_beyond(task: TaskConfig, shown: TaskConfig, end: int) -> int:
    """Return the item from which `task` asks no question of the items of `shown` below `end`; 0 if they have
    none in common. A drawn question can still repeat by chance, and so does a list once it is finished.

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
            for our, their in _pairs(ours, theirs)
            if our.order == their.order
        ),
        default=0,
    )


def reordered(task: TaskConfig, shown: TaskConfig) -> dict[str, tuple[object, object]]:
    """Return the settings that give `task` another order for a list of `shown`, so that its questions can
    come anywhere: {key: (its value in `task`, in `shown`)}; empty if there is no such list.

    Raises:
        UsageError: there is no such task, option or weight, or custom code fails.
    """
    ours, theirs = _layout(task), _layout(shown)
    pairs = list(_pairs(ours, theirs))
    in_order = [our.label for our, their in pairs if our.order == their.order]
    return {
        f"task.{f'mix.{our.label}.' if our.label else ''}{name}": (value, their.order[name])
        for our, their in pairs
        if our.label not in in_order and our.is_listed()
        for name, value in our.order.items()
        if value != their.order[name]
    }


def _pairs(ours: _Layout, theirs: _Layout) -> Iterator[tuple[_Part, _Part]]:
    """Yield the pairs of parts of both that have the same questions."""
    for our in ours.parts:
        yield from ((our, their) for their in theirs.parts if our.questions == their.questions)


def _layout(task: TaskConfig) -> _Layout:
    counts = counts_of(weights_of(task))
    parts = parts_of(task).items()
    return _Layout(
        task.seed if task.mix else None, tuple(_part(label, part, counts[label]) for label, part in parts)
    )


def _part(label: str, config: TaskConfig, share: int) -> _Part:
    name, options = config.name, _with_whole_path(config.options)
    order: dict[str, object] = {}
    if name in FILES:
        questions: tuple[object, ...] = ("file", options.get("path"), config.question)
        order = {"seed": config.seed, "choices": config.choices, "drop_longer": config.drop_longer}
    elif is_own(name):
        questions, order = (*_named_by_content(name), _text(options)), {"seed": config.seed}
    elif name.startswith(PREFIX):
        questions = (name, config.seed, _text({k: v for k, v in options.items() if k not in _NO_QUESTIONS}))
    else:
        questions = (make_task(config).id,)
    return _Part(questions, order, share, config, label)


def _named_by_content(spec: str) -> tuple[str, ...]:
    try:
        plugin = locate(spec)
    except ConfigError:  # moved away since it was frozen
        return (spec,)
    return plugin.module, plugin.name, plugin.digest


def _with_whole_path(options: Mapping[str, Any]) -> dict[str, Any]:
    path = options.get("path")
    return {**options, "path": str(Path(path).resolve())} if isinstance(path, str) else dict(options)


def _text(options: Mapping[str, Any]) -> str:
    return json.dumps(options, sort_keys=True, default=str)
