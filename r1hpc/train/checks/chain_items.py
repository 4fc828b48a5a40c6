"""Keep the stages of a chain from reusing each other's questions.

Stage rl begins after the items that earlier stages have shown, unless task.first_item is set. An evaluation
of test files gets the list of what those stages trained on, for its contamination report.
"""

from collections.abc import Mapping
from dataclasses import replace

from r1hpc.base.errors import UsageError
from r1hpc.config.paths import FILES, is_own
from r1hpc.config.schema.rl import TaskConfig
from r1hpc.config.schema.run import RunConfig
from r1hpc.tasks.problems.asked_items import asked_items, first_beyond, reordered
from r1hpc.tasks.problems.registry import parts_of


def connected(name: str, config: RunConfig, earlier: Mapping[str, RunConfig]) -> RunConfig:
    """Return a stage's configuration with the values that follow from the stages before it. Raise UsageError
    if the task does not exist, or RL asks a list of an earlier stage in another order."""
    if config.stage == "rl" and config.task.first_item is None:
        for before, each in earlier.items():
            if asked_items(each) and (settings := reordered(config.task, each.task)):
                ours = " ".join(f"{key}={value}" for key, (value, _) in settings.items())
                theirs = " ".join(f"{name}:{key}={value}" for key, (_, value) in settings.items())
                raise UsageError(
                    f"{ours} asks the questions of the earlier stage {before} in another order, so some come "
                    f"again. Set {theirs} to begin after them, or choose {name}:task.first_item yourself"
                )
        shown = [(each.task, items.stop) for each in earlier.values() if (items := asked_items(each))]
        first = max((first_beyond(config.task, task, end) for task, end in shown), default=0)
        return replace(config, task=replace(config.task, first_item=first)) if first else config
    if config.stage == "evaluate" and (config.evaluate.path or config.evaluate.sets):
        return _with_trained_on(config, earlier)
    return config


def _with_trained_on(config: RunConfig, earlier: Mapping[str, RunConfig]) -> RunConfig:
    """Return an evaluation of test files with the training data of earlier stages added to its own list."""
    evaluate = config.evaluate
    traces = [path for each in earlier.values() if each.stage == "sft" for path in each.data.traces]
    asked = [path for each in earlier.values() if each.stage == "rl" for path in _question_files(each.task)]
    others = [f"{each} (stage {name})" for name, config in earlier.items() for each in _unread(config)]
    searched = list(dict.fromkeys([*evaluate.trained_on, *traces, *asked]))
    not_searched = list(dict.fromkeys([*evaluate.not_searched, *others]))
    return replace(config, evaluate=replace(evaluate, trained_on=searched, not_searched=not_searched))


def _question_files(task: TaskConfig) -> list[str]:
    """Return the files a task takes its questions from, also as part of a mixture."""
    files = [part.options for part in parts_of(task).values() if part.name in FILES]
    return [str(options["path"]) for options in files if options.get("path")]


def _unread(config: RunConfig) -> list[str]:
    """Return the training data that cannot be searched: datasets (tokens only) and custom code."""
    if config.stage == "rl":
        names = [part.name for part in parts_of(config.task).values()]
        return [f"questions of {name}" for name in names if is_own(name)]
    data = config.data
    if config.stage not in ("pretrain", "sft") or (config.stage == "sft" and data.traces and not data.path):
        return []
    return [f"data.path={data.path}" if data.path else f"data.recipe={data.recipe}"]
