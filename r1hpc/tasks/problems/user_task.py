"""Run a custom task, FILE.py:NAME or package.module:NAME. The protocol and an example: docs/tasks.md.

    class MyTask:
        def __init__(self, largest=99): ...                        # task.options
        def question(self, index): return "2+3=", "5"              # a pure function of the index
        def verdict(self, text, answer, metadata): return text.strip() == answer

Its code runs in processes that can be killed: user_worker.py makes the questions, grading/worker.py judges.
The identity holds the digest of its files, so that a run does not resume with other code.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from r1hpc.base.errors import UsageError
from r1hpc.config.plugins import locate
from r1hpc.tasks.problems.listed import Listed, held_out_key
from r1hpc.tasks.problems.task import Draws, Item, draw_until, task_id
from r1hpc.tasks.sandbox.process import DiedError, TimedOutError, WorkerProcess, wait_for_own
from r1hpc.tasks.text.format import TAGS, compose

_ENDLESS = 2**31
_LIMIT_S = 60.0
"""For one question."""
_MOST_LISTED = 1_000_000
"""Questions of a task with a len(), which are all kept in memory."""


class UserTask:
    """With a len(), each pass asks every question once; without, they are drawn from indices below 2^31."""

    def __init__(self, spec: str, seed: int, options: Mapping[str, Any], code: Path | None) -> None:
        plugin = locate(spec, code)
        self.name = plugin.name
        self._spec = spec
        settings = {"spec": spec, "code": str(code) if code else None, "options": dict(options)}
        self._source = WorkerProcess("r1hpc.tasks.problems.user_worker", [json.dumps(settings)])
        about = wait_for_own(self._source, spec)
        self.judge: str = about["judge"]
        self.judge_settings: dict[str, Any] = settings
        self._thinks: bool = about["thinks"]
        self.id = task_id(f"{plugin.module}:{plugin.name} {plugin.digest}", seed, options)
        size: int = about["size"] or 0
        if size > _MOST_LISTED:
            raise UsageError(
                f"{spec} has {size:,} questions by its len(), and at most {_MOST_LISTED:,} are listed: "
                "leave __len__ out, and let question(index) make one of any index"
            )
        self._questions = [self._ask(index) for index in range(size)]
        prompts = [each["prompt"] for each in self._questions]
        self._listed = Listed((self.id,), prompts, spec) if prompts else None

    def item(self, index: int, held_out: bool = False) -> Item:
        if self._listed is None:
            made = draw_until(self._draw, (self.id, index), held_out)
        else:
            made = self._questions[self._listed.at(index, held_out)[0]]
        return Item(index, made["prompt"], made["answer"], made["metadata"])

    def num_questions(self, held_out: bool = False) -> int | None:
        return None if self._listed is None else self._listed.num_questions(held_out)

    def items_per_pass(self, held_out: bool = False) -> int | None:
        """Return None if its questions are drawn."""
        return None if self._listed is None else self._listed.items_per_pass(held_out)

    def check_pure(self) -> None:
        """Ask some questions again in another process; UsageError if they differ: no resume could go on."""
        last = len(self._questions) - 1 if self._questions else _ENDLESS - 1
        again = WorkerProcess("r1hpc.tasks.problems.user_worker", [json.dumps(self.judge_settings)])
        try:
            wait_for_own(again, self._spec)
            for index in dict.fromkeys((last, min(1, last), 0)):
                first = self._questions[index] if self._questions else self._ask(index)
                second = self._ask(index, again)
                if first != second:
                    raise UsageError(
                        f"{self._spec}: question({index}) is not a function of its index: in two processes "
                        f"it gave {first!r:.100}, then {second!r:.100}. Draw from random.Random(index), and "
                        "leave out what changes by itself (time, a counter, a global random state)"
                    )
        finally:
            again.stop()

    def demonstration(self, item: Item, thinking: bool) -> str:
        """Return the answer after the custom task's `thinking(prompt, answer, metadata)`."""
        if not thinking:
            return compose("", item.answer)
        if not self._thinks:
            raise UsageError(f"{self._spec} has no method thinking: set generate.thinking_share=0")
        said: str = self._ask([item.prompt, item.answer, dict(item.metadata)])["thinking"]
        if any(tag in said + item.answer for tag in TAGS):
            raise UsageError(f"{self._spec}: the thinking of item {item.index} holds one of {' '.join(TAGS)}")
        return compose(said, item.answer)

    def _draw(self, draws: Draws) -> tuple[str, dict[str, Any]]:
        made = self._ask(draws.below(_ENDLESS))
        return held_out_key(made["prompt"]), made

    def _ask(self, request: Any, source: WorkerProcess | None = None) -> dict[str, Any]:
        try:
            reply: dict[str, Any] = (source or self._source).ask(request, _LIMIT_S)
        except TimedOutError:
            raise UsageError(f"{self._spec}: question {request!r:.60} takes over {_LIMIT_S:g} s") from None
        except DiedError:
            raise UsageError(
                f"{self._spec}: question {request!r:.60} ended the process (os._exit, or out of memory)"
            ) from None
        if "error" in reply:
            raise UsageError(f"{reply['error']}; asked for question {request!r:.60}")
        return reply
