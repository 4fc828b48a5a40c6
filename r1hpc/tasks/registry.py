"""From the `task` section of a configuration to the task."""

from collections.abc import Callable, Mapping
from typing import Any

from r1hpc.base.errors import UsageError
from r1hpc.base.names import nearest
from r1hpc.config.reasoning import TaskConfig
from r1hpc.tasks.chain_sum import ChainSum
from r1hpc.tasks.countdown import Countdown
from r1hpc.tasks.gym import PREFIX, ReasoningGym
from r1hpc.tasks.jsonl import Jsonl
from r1hpc.tasks.task import Task

_TASKS: dict[str, Callable[[int, Mapping[str, Any]], Task]] = {
    "chain_sum": ChainSum,
    "countdown": Countdown,
    "jsonl": Jsonl,
}


def make_task(config: TaskConfig) -> Task:
    """The task a configuration names.

    Raises:
        UsageError: an unknown task or option, a file that cannot be used, or a package that is missing.
    """
    if config.name.startswith(PREFIX):
        return ReasoningGym(config.name, config.seed, config.options)
    if config.name not in _TASKS:
        known = [*_TASKS, f"{PREFIX}NAME"]
        raise UsageError(
            f"task.name={config.name!r} is unknown{nearest(config.name, known)}; known: {', '.join(known)}"
        )
    return _TASKS[config.name](config.seed, config.options)
