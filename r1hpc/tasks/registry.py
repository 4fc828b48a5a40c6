"""From the `task` section of a configuration to the task."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from r1hpc.base.errors import UsageError
from r1hpc.base.names import nearest
from r1hpc.config.plugins import is_own
from r1hpc.config.question_paths import FILES
from r1hpc.config.reasoning import TaskConfig
from r1hpc.tasks.chain_sum import ChainSum
from r1hpc.tasks.countdown import Countdown
from r1hpc.tasks.file import QuestionFile
from r1hpc.tasks.gym import PREFIX, ReasoningGym
from r1hpc.tasks.mixture import Mixture
from r1hpc.tasks.own import OwnTask
from r1hpc.tasks.task import Task

_MADE_UP: dict[str, Callable[[int, Mapping[str, Any]], Task]] = {
    "chain_sum": ChainSum,
    "countdown": Countdown,
}


def make_task(
    config: TaskConfig, code: Path | None = None, fits: Callable[[str, str], bool] | None = None
) -> Task:
    """The task, or the mixture of tasks, that a configuration names.

    Args:
        code: the frozen code of a run that is looked at from outside; None: own code lies where its name
            says, in a job beside this package.
        fits: tells of a prompt and its file's line whether the row is kept (tokenizer.fitting); None: every
            row is.

    Raises:
        UsageError: an unknown task or option, a file that cannot be used, a package that is missing, or own
            code that fails.
    """
    if not config.mix:
        return _single(config, code, fits)
    tasks = {label: _single(part, code, fits) for label, part in parts_of(config).items()}
    return Mixture(config.seed, tasks, weights_of(config))


def parts_of(config: TaskConfig) -> dict[str, TaskConfig]:
    """By label, each entry of task.mix as a task of its own; a single task itself, under the empty label."""
    return {label: _part(config, part) for label, part in config.mix.items()} or {"": config}


def weights_of(config: TaskConfig) -> dict[str, float]:
    """The weights of task.mix by label; a single task has one."""
    return {label: float(part.get("weight", 1)) for label, part in config.mix.items()} or {"": 1.0}


def _part(config: TaskConfig, part: Mapping[str, Any]) -> TaskConfig:
    own = {name: value for name, value in part.items() if name != "weight"}
    return dataclasses.replace(config, mix={}, **{"options": {}, **own})


def _single(config: TaskConfig, code: Path | None, fits: Callable[[str, str], bool] | None) -> Task:
    if config.name.startswith(PREFIX):
        return ReasoningGym(config.name, config.seed, config.options)
    if is_own(config.name):
        return OwnTask(config.name, config.seed, config.options, code)
    if config.name in FILES:
        return QuestionFile(config, fits)
    if config.name not in _MADE_UP:
        known = ["file", *_MADE_UP, f"{PREFIX}NAME", "FILE.py:NAME"]
        raise UsageError(
            f"task.name={config.name!r} is unknown{nearest(config.name, known)}; known: {', '.join(known)}"
        )
    return _MADE_UP[config.name](config.seed, config.options)
