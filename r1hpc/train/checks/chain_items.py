"""Keep the stages of a chain from reusing each other's questions.

Stage rl begins after the items that earlier stages have shown, unless task.first_item is set. An evaluation
of test files gets the list of what those stages trained on, for its contamination report.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from r1hpc.base.errors import UsageError
from r1hpc.config.paths import FILES, is_own
from r1hpc.config.schema.rl import TaskConfig
from r1hpc.config.schema.run import RunConfig
from r1hpc.tasks.problems.asked import asked_items, first_beyond
from r1hpc.tasks.problems.registry import parts_of


def connected(name: str, config: RunConfig, earlier: Mapping[str, RunConfig]) -> RunConfig:
    """Return a stage's configuration with the values that follow from the stages before it.

    Raises:
        UsageError: the task does not exist.
    """
    return _with_trained_on(_with_first_item(config, earlier), earlier)


def _with_first_item(config: RunConfig, earlier: Mapping[str, RunConfig]) -> RunConfig:
    if config.stage != "rl" or config.task.first_item is not None:
        return config
    first = _first_unseen(config, earlier.values())
    return replace(config, task=replace(config.task, first_item=first)) if first else config


def refuse_shown_again(
    name: str,
    before: Mapping[str, RunConfig],
    after: Mapping[str, RunConfig],
    earlier: Sequence[str],
    is_queued: bool,
) -> None:
    """Refuse a change by which stage rl would use items again that an earlier stage now shows.

    Args:
        earlier: the stages before this one.
        is_queued: it has a job, which must be cancelled before the change.

    Raises:
        UsageError: names the item to begin with. A stage that is given another first item is not checked, nor
            one that used items twice before.
    """
    if after[name].stage != "rl" or after[name].task.first_item != before[name].task.first_item:
        return
    (_, was_apart), (end, is_apart) = (
        _apart(configs[name], [configs[each] for each in earlier]) for configs in (before, after)
    )
    if was_apart and not is_apart:
        first = f"cancel {name}, then " if is_queued else ""
        raise UsageError(
            f"stage {name} would begin with item {after[name].task.first_item or 0} of its task, and the "
            f"stages before it show all up to {end - 1} now: {first}give {name}:task.first_item={end} "
            "as well"
        )


def _apart(config: RunConfig, earlier: Iterable[RunConfig]) -> tuple[int, bool]:
    """Return the first item that earlier stages do not show, and whether this stage begins there or later."""
    end = _first_unseen(config, earlier)
    return end, (config.task.first_item or 0) >= end


def _first_unseen(config: RunConfig, earlier: Iterable[RunConfig]) -> int:
    shown = [(each.task, items.stop) for each in earlier if (items := asked_items(each))]
    return max((first_beyond(config.task, task, end) for task, end in shown), default=0)


def _with_trained_on(config: RunConfig, earlier: Mapping[str, RunConfig]) -> RunConfig:
    """Return an evaluation of test files with the training data of earlier stages added to its own list."""
    evaluate = config.evaluate
    if config.stage != "evaluate" or not (evaluate.path or evaluate.sets):
        return config
    traces = [path for each in earlier.values() if each.stage == "sft" for path in each.data.traces]
    asked = [path for each in earlier.values() if each.stage == "rl" for path in _question_files(each.task)]
    others = [f"{each} (stage {name})" for name, config in earlier.items() for each in _unread(config)]
    return replace(
        config,
        evaluate=replace(
            evaluate,
            trained_on=_once([*evaluate.trained_on, *traces, *asked]),
            not_searched=_once([*evaluate.not_searched, *others]),
        ),
    )


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


def _once(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))
