"""Make the task reasoning_gym:NAME: any generator of the reasoning-gym package, judged by its own scorer.

    task: {name: "reasoning_gym:gcd", seed: 1, options: {min_numbers: 2, template: "{question} "}}

gym_worker.py runs the generator in a process. An item depends only on seed + index, so the index is the
complete state here too. The package's version is part of the task's identity: another version may ask other
questions.
"""

import json
from collections.abc import Mapping
from functools import cached_property
from importlib import util
from typing import Any

from r1hpc.base.errors import R1hpcError, UsageError
from r1hpc.tasks.problems.gym_worker import COUNT, ENDLESS
from r1hpc.tasks.problems.listed import TEMPLATE, check_template, fill, held_out_key
from r1hpc.tasks.problems.task import Draws, Item, draw_until, task_id
from r1hpc.tasks.sandbox.process import DiedError, TimedOutError, WorkerProcess
from r1hpc.tasks.text.format import TAGS, compose

PREFIX = "reasoning_gym:"
_MAX_FAILURES = 20
"""Sources that the generator may fail on before an item is given up."""
_LIMIT_S = 120.0
"""For starting the process, and for one question: a few generators search for seconds."""


class ReasoningGym:
    """Options are the generator's own, and `template`. `size` is the number of items of a finite one."""

    judge = "reasoning_gym"

    def __init__(self, name: str, seed: int, options: Mapping[str, Any]) -> None:
        if util.find_spec("reasoning_gym") is None:
            raise UsageError(f"task.name={name} needs reasoning-gym: pip install 'r1hpc[gym]'")
        from importlib import metadata  # deferred: only runs with this task need it

        own = dict(options)
        generator = name.removeprefix(PREFIX)
        self.name = name
        self._template = check_template(str(own.pop("template", TEMPLATE)))
        self.judge_settings: dict[str, Any] = {"generator": generator, "seed": seed, "options": own}
        self.id = task_id(f"{name} {metadata.version('reasoning-gym')}", seed, options)
        arguments = [generator, str(seed), json.dumps(own)]
        self._source = WorkerProcess("r1hpc.tasks.problems.gym_worker", arguments)
        self._num_sources: int = self._source.wait_ready(_LIMIT_S)

    def item(self, index: int, held_out: bool = False) -> Item:
        source, entry = draw_until(self._draw, (self.id, index), held_out)
        prompt = fill(self._template, entry["question"])
        return Item(index, prompt, entry["answer"] or "", {"source_index": source})

    def num_questions(self, held_out: bool = False) -> int | None:
        """Count by asking every index if the generator has few; with more, return the number of indices."""
        if self._num_sources >= ENDLESS:
            return None
        return self._num_sources if self._counts is None else self._counts[held_out]

    @cached_property
    def _counts(self) -> list[int] | None:
        """Return the different questions in training, and held out; None if unknown."""
        counts: list[int] | None = self._ask(COUNT)
        return counts

    def demonstration(self, item: Item, thinking: bool) -> str:
        """Return the generator's answer, without thinking: the package has none."""
        if thinking:
            raise UsageError(f"{self.name} has no thinking to show: set generate.thinking_share=0")
        if not item.answer.strip() or any(tag in item.answer for tag in TAGS):
            raise UsageError(f"{self.name} has no demonstration of item {item.index}: it names no answer")
        return compose("", item.answer)

    def _draw(self, draws: Draws) -> tuple[str, tuple[int, dict[str, Any]]]:
        """Return the first source, of a few draws, from which the generator can make an item."""
        for _ in range(_MAX_FAILURES):
            source = draws.below(self._num_sources)
            entry: dict[str, Any] = self._ask(source)
            if "error" not in entry:
                return held_out_key(entry["question"]), (source, entry)
        raise UsageError(f"{self.name} cannot make items (last error: {entry['error']}): change its options")

    def _ask(self, request: int | str) -> Any:
        try:
            return self._source.ask(request, _LIMIT_S)
        except (DiedError, TimedOutError) as error:
            what = "count its items" if request == COUNT else f"make item {request}"
            raise R1hpcError(f"{self.name} failed to {what}: {error}; change its options") from None
