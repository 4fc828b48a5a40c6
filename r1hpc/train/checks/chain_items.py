"""What the stages of a chain know of each other's questions.

Stage rl begins with the item after those that the stages before it have shown, unless task.first_item says
another; an evaluation of test files is told what those stages trained on, for its report of contamination.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from r1hpc.base.errors import UsageError
from r1hpc.config.plugins import FILES, is_own
from r1hpc.config.schema.rl import TaskConfig
from r1hpc.config.schema.run import RunConfig
from r1hpc.tasks.problems.item_counts import asked_items
from r1hpc.tasks.problems.overlap import first_beyond, reordered
from r1hpc.tasks.problems.registry import parts_of


def connected(configs: Mapping[str, RunConfig], needs: Mapping[str, Sequence[str]]) -> dict[str, RunConfig]:
    """The configurations of a chain's stages, in their order, with what earlier stages decide filled in.

    Raises:
        UsageError: RL would ask the questions of an earlier stage in another order, or there is no such task.
    """
    done: dict[str, RunConfig] = {}
    for name, config in configs.items():
        earlier = {each: done[each] for each in _all_before(name, needs)}
        try:
            done[name] = _with_trained_on(_with_first_item(name, config, earlier), earlier)
        except UsageError as error:
            raise UsageError(f"stage {name}: {error}") from None
    return done


def _all_before(name: str, needs: Mapping[str, Sequence[str]]) -> list[str]:
    """The stages it needs, and those that they need; each once."""
    found: list[str] = []
    open_ = list(needs[name])
    while open_:
        each = open_.pop(0)
        if each not in found:
            found.append(each)
            open_ += needs[each]
    return found


def _with_first_item(name: str, config: RunConfig, earlier: Mapping[str, RunConfig]) -> RunConfig:
    if config.stage != "rl" or config.task.first_item is not None:
        return config
    for before, each in earlier.items():
        if asked_items(each) and (settings := reordered(config.task, each.task)):
            now = " ".join(f"{key}={ours}" for key, (ours, _) in settings.items())
            given = " ".join(f"{name}:{key}={theirs}" for key, (_, theirs) in settings.items())
            raise UsageError(
                f"{now} asks the questions of the stage {before} before it in another order, and so some of "
                f"them again: give {given}, with which it begins after them, or say where by "
                f"{name}:task.first_item"
            )
    first = _first_unseen(config, earlier.values())
    return replace(config, task=replace(config.task, first_item=first)) if first else config


def refuse_shown_again(
    before: Mapping[str, RunConfig],
    after: Mapping[str, RunConfig],
    needs: Mapping[str, Sequence[str]],
    begun: Collection[str],
    queued: Collection[str],
) -> None:
    """Refuse a change of a chain by which stage rl comes upon items that a stage before it shows now.

    Args:
        begun: stages whose items cannot change any more.
        queued: stages whose job is there, which must be cancelled ahead of a change.

    Raises:
        UsageError: names the item to begin with. Who gives the stage another first item knows what that one
            shows, and who shows items twice already is not asked again.
    """
    for name in (each for each in after if after[each].stage == "rl" and each not in begun):
        if after[name].task.first_item != before[name].task.first_item:
            continue
        earlier = _all_before(name, needs)
        (_, was_apart), (end, is_apart) = (
            _apart(configs[name], [configs[each] for each in earlier]) for configs in (before, after)
        )
        if was_apart and not is_apart:
            first = f"cancel {name}, then " if name in queued else ""
            raise UsageError(
                f"stage {name} would begin with item {after[name].task.first_item or 0} of its task, and the "
                f"stages before it show all up to {end - 1} now: {first}give {name}:task.first_item={end} "
                "as well"
            )


def _apart(config: RunConfig, earlier: Iterable[RunConfig]) -> tuple[int, bool]:
    """The item from which on it asks none that earlier stages show, and whether it begins there or beyond."""
    end = _first_unseen(config, earlier)
    return end, (config.task.first_item or 0) >= end


def _first_unseen(config: RunConfig, earlier: Iterable[RunConfig]) -> int:
    shown = [(each.task, items.stop) for each in earlier if (items := asked_items(each))]
    return max((first_beyond(config.task, task, end) for task, end in shown), default=0)


def _with_trained_on(config: RunConfig, earlier: Mapping[str, RunConfig]) -> RunConfig:
    """An evaluation of test files, told what the stages before it trained on beside what it was told."""
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
    """The files that a task asks out of, also as one of several."""
    files = [part.options for part in parts_of(task).values() if part.name in FILES]
    return [str(options["path"]) for options in files if options.get("path")]


def _unread(config: RunConfig) -> list[str]:
    """What a stage trains on beside files that can be searched: a dataset lies in tokens, own code makes its
    questions."""
    if config.stage == "rl":
        names = [part.name for part in parts_of(config.task).values()]
        return [f"questions of {name}" for name in names if is_own(name)]
    data = config.data
    if config.stage not in ("pretrain", "sft") or (config.stage == "sft" and data.traces and not data.path):
        return []
    return [f"data.path={data.path}" if data.path else f"data.recipe={data.recipe}"]


def _once(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))
