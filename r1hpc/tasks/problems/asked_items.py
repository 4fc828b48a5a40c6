"""Find the items that a stage asks, and from which item on another task asks none of the same questions.

The questions of a task follow from its settings: the file and its column, the digest of custom code, a
generator with its options; not the template or the judge. No file of questions is read for it.

`demonstrate` makes the worked answers that stage traces writes, in the form that will be counted as right.
"""

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from r1hpc.base.errors import ConfigError, UsageError
from r1hpc.config.paths import FILES, is_own
from r1hpc.config.plugins import locate
from r1hpc.config.schema.rl import TaskConfig
from r1hpc.config.schema.run import RunConfig
from r1hpc.plan.topology.batch import updates_per_rollout
from r1hpc.tasks.problems.file import QuestionFile
from r1hpc.tasks.problems.gym import PREFIX
from r1hpc.tasks.problems.registry import Mixture, counts_of, make_task, parts_of, weights_of
from r1hpc.tasks.problems.task import Draws, Item, Task, members
from r1hpc.tasks.problems.user_task import UserTask
from r1hpc.tasks.text.format import out_of_box, take_apart

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
    """Return the items of the training part that the stage asks or shows."""
    items, held_out = asked(config)
    return range(0) if held_out else items


def repeated(config: RunConfig, task: Task) -> list[str]:
    """Return a sentence for each task of which a stage asks questions again."""
    items, held_out = asked(config)
    most = "at most " if config.rl.max_resamples else ""
    notes = []
    for label, each in members(task).items():
        own = task.items_of(label, items) if isinstance(task, Mixture) else items
        if own and (again := _again(each, own, held_out, is_rl=config.stage == "rl")):
            name = f"{label} is asked its" if label else f"{task.name} is asked"
            notes.append(f"task {name} items {own.start:,} to {most}{own.stop - 1:,}, and has {again}")
    return notes


def _again(task: Task, items: range, held_out: bool, is_rl: bool) -> str:
    """Return how many questions there are and when they come again; empty if they do not."""
    there = task.num_questions(held_out)
    if not there:
        return ""
    has = f"{there:,} different {'held-out ' * held_out}questions"
    if not isinstance(task, QuestionFile | UserTask):  # drawn: some come again before all were asked
        end = items.start + there
        again = f"at most {has}: from item {end:,} on at the latest they come again"
        return again if end < items.stop else ""
    a_pass = task.items_per_pass(held_out) or there
    again_at = (items.start // a_pass + 1) * a_pass
    if again_at < items.stop:
        return f"{has}: from item {again_at:,} on they come again"
    if is_rl and items.start >= a_pass:
        return f"{has}: all of them are among the earlier items, which earlier stages may have shown"
    return ""


@dataclass(frozen=True)
class _Part:
    questions: tuple[object, ...]
    """The settings that decide the set of questions."""
    order: Mapping[str, object]
    """The settings that decide which of them an item is."""
    share: int
    """Its items in a block of the mixture; 1 for a single task."""
    label: str = field(compare=False)
    config: TaskConfig = field(compare=False)

    def is_listed(self) -> bool:
        """True if its questions are a list, so that `order` gives the same ones in another order."""
        name = self.config.name
        return name in FILES or (is_own(name) and make_task(self.config).num_questions() is not None)


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
    none in common. A drawn question can still repeat by chance, and so does a list once it is finished. Raise
    UsageError if there is no such task, option or weight.
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
    """Return the settings by which `task` asks a list of `shown` in another order, so that its questions can
    come anywhere: {key: (its value in `task`, in `shown`)}; empty if there is no such list. Raise UsageError
    if there is no such task, option or weight, or custom code fails."""
    pairs = list(_pairs(_layout(task), _layout(shown)))
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
    counts, parts = counts_of(weights_of(task)), parts_of(task)
    return _Layout(
        task.seed if task.mix else None,
        tuple(_Part(*_questions(part), counts[label], label, part) for label, part in parts.items()),
    )


def _questions(config: TaskConfig) -> tuple[tuple[object, ...], Mapping[str, object]]:
    """Return the settings that decide the set of questions, and those that decide their order."""
    name, options = config.name, dict(config.options)
    if isinstance(options.get("path"), str):
        options["path"] = str(Path(options["path"]).resolve())
    if name in FILES:
        order = {"seed": config.seed, "choices": config.choices, "drop_longer": config.drop_longer}
        return ("file", options.get("path"), config.question), order
    if is_own(name):
        return (*_named_by_content(name), _text(options)), {"seed": config.seed}
    if name.startswith(PREFIX):
        return (name, config.seed, _text({k: v for k, v in options.items() if k not in _NO_QUESTIONS})), {}
    return (make_task(config).id,), {}


def _named_by_content(spec: str) -> tuple[str, ...]:
    try:
        plugin = locate(spec)
    except ConfigError:  # moved away since it was frozen
        return (spec,)
    return plugin.module, plugin.name, plugin.digest


def _text(options: Mapping[str, Any]) -> str:
    return json.dumps(options, sort_keys=True, default=str)


_FINE = 10**6
_MOST_TRIED = 20_000
_TRIED_OF_OWN, _OWN_S = 500, 10.0
"""As many as that time allows."""
_TRIED_OF_OTHERS = 16
"""For tasks that make their questions: these are alike, and may be slow."""


@dataclass(frozen=True)
class Demonstration:
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
    return _TRIED_OF_OWN if isinstance(task, UserTask) and time.monotonic() < until else _TRIED_OF_OTHERS
