"""What the stages of a chain know of each other's questions.

Stage rl begins with the item after those that the stages before it have shown, unless task.first_item says
another; an evaluation of test files is told what those stages trained on, for its report of contamination.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from r1hpc.base.errors import UsageError
from r1hpc.config.reasoning import TaskConfig
from r1hpc.config.schema import RunConfig
from r1hpc.plan.batch import updates_per_rollout
from r1hpc.tasks.file import FILES
from r1hpc.tasks.pass_rates import MOST_PASSED_OVER


def connected(configs: Mapping[str, RunConfig], needs: Mapping[str, Sequence[str]]) -> dict[str, RunConfig]:
    """The configurations of a chain's stages, in their order, with what earlier stages decide filled in."""
    done: dict[str, RunConfig] = {}
    for name, config in configs.items():
        earlier = [done[each] for each in _all_before(name, needs)]
        _refuse_reordered(name, config, earlier)
        done[name] = _with_training_files(_with_first_item(config, earlier), earlier)
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


def _with_first_item(config: RunConfig, earlier: Sequence[RunConfig]) -> RunConfig:
    if config.stage != "rl" or config.task.first_item is not None:
        return config
    first = _end_of_shown(config, earlier)
    return replace(config, task=replace(config.task, first_item=first)) if first else config


def _refuse_reordered(name: str, config: RunConfig, earlier: Sequence[RunConfig]) -> None:
    """Refuse RL on the questions of a file that a stage before it shows in another order, some of them again:
    of a file the seed decides nothing else.

    Raises:
        UsageError: names the seed to give.
    """
    task = config.task
    if config.stage != "rl" or task.first_item is not None or task.name not in FILES:
        return
    for each in earlier:
        is_same = replace(each.task, first_item=None, seed=task.seed) == task
        if is_same and each.task.seed != task.seed and _end_of_items(each):
            raise UsageError(
                f"stage {name}: task.seed={task.seed} asks the questions of the stage {each.stage} before it "
                f"in another order, and so some of them again: give {name}:task.seed={each.task.seed}, with "
                f"which it begins after them, or say where by {name}:task.first_item"
            )


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


def _apart(config: RunConfig, earlier: Sequence[RunConfig]) -> tuple[int, bool]:
    """One more than the last of its items that earlier stages show, and whether it begins beyond."""
    end = _end_of_shown(config, earlier)
    return end, (config.task.first_item or 0) >= end


def _end_of_shown(config: RunConfig, earlier: Sequence[RunConfig]) -> int:
    same = [each for each in earlier if _questions(each) == _questions(config)]
    return max(map(_end_of_items, same), default=0)


def _questions(config: RunConfig) -> object:
    return replace(config.task, first_item=None)


def _end_of_items(config: RunConfig) -> int:
    """One more than the last training item that a stage may show; 0: it shows none."""
    if config.stage in ("traces", "generate") and not config.generate.held_out:
        return config.generate.first_item + config.generate.num_items
    if config.stage == "rl":
        rollouts = -(-config.train.num_steps // updates_per_rollout(config))
        most = config.rollout.num_prompts * (1 + config.rl.max_resamples)
        most *= 1 + MOST_PASSED_OVER if config.rl.by_pass_rate else 1
        return (config.task.first_item or 0) + rollouts * most
    return 0


def _with_training_files(config: RunConfig, earlier: Sequence[RunConfig]) -> RunConfig:
    evaluate = config.evaluate
    if config.stage != "evaluate" or evaluate.trained_on or not (evaluate.path or evaluate.sets):
        return config
    traces = [path for each in earlier if each.stage == "sft" for path in each.data.traces]
    asked = [path for each in earlier if each.stage == "rl" for path in _question_files(each.task)]
    files = dict.fromkeys([*traces, *asked])
    return replace(config, evaluate=replace(evaluate, trained_on=list(files)))


def _question_files(task: TaskConfig) -> list[str]:
    """The files that a task asks out of, also as one of several."""
    parts = [{"name": task.name, "options": task.options}, *task.mix.values()]
    return [str(part["options"]["path"]) for part in parts if _is_file(part) and part["options"].get("path")]


def _is_file(task: Mapping[str, Any]) -> bool:
    return task.get("name") in FILES and isinstance(task.get("options"), Mapping)
