"""Try out a run's questions and rewards at every submission and resume, before anything is queued.

Questions are made as the run will ask them: all of a test file, up to 20,000 of a list, a few drawn ones.
Custom terms and verdicts are called once. The caller (train/workload.py) then checks the longest prompts with
the model's tokenizer.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

from r1hpc.config.paths import FILES, is_own, names_in
from r1hpc.config.schema.run import RunConfig
from r1hpc.plan.topology.parts import num_items
from r1hpc.tasks.problems.asked_items import asked, check_demonstrations, repeated
from r1hpc.tasks.problems.benchmark import Benchmarks, named_sets
from r1hpc.tasks.problems.file import QuestionFile, check_one_split
from r1hpc.tasks.problems.listed import check_asks_for
from r1hpc.tasks.problems.registry import Mixture, check_weights, make_task, parts_of, weights_of
from r1hpc.tasks.problems.task import Item, Task, check_num_held_out, members
from r1hpc.tasks.problems.user_task import UserTask
from r1hpc.tasks.rewards import TERMS, Scorer, term_named

_MOST_ASKED = 20_000
_TRIED_OF_DRAWN = 64


def check_questions(
    config: RunConfig,
    code: Path | None = None,
    note: Callable[[str], object] = lambda sentence: None,
    fits: Callable[[str, str], bool] | None = None,
) -> list[Item]:
    """Make the run's questions and return them; call custom terms and verdicts once each.

    Args:
        code: the frozen code of a resumed run, else None; see registry.make_task.
        fits: True if a prompt keeps to rollout.max_prompt_length; others are left out, as in the run.
        note: called with warnings about a new run, such as questions that it asks again.

    Raises:
        UsageError: an unknown task, option or term, a missing file or package, more questions than there
            are, or custom code that fails or whose questions are no function of their index.
    """
    asks_benchmarks = config.stage in ("rl", "evaluate")
    benchmarks = Benchmarks.of(config) if asks_benchmarks else None
    tasks: list[Task] = []
    items: list[Item] = []
    if benchmarks is None or config.stage == "rl":
        tasks.append(make_task(config.task, code, fits))
        items += _one_of_each(tasks[0], config)
        items += _asked(tasks[0], config)
        if code is None:  # a resumed run goes on as it was begun
            check_weights(weights_of(config.task))
            for each in parts_of(config.task).values():
                if each.name in FILES:
                    check_one_split(Path(each.options["path"]))
            for sentence in repeated(config, tasks[0]):
                note(sentence)
            for task in members(tasks[0]).values():
                if isinstance(task, UserTask):
                    task.check_pure()
                for sentence in task.notes() if isinstance(task, QuestionFile) else ():
                    note(sentence)
    if benchmarks is not None:
        if code is None:
            for part in named_sets(config).values():
                check_one_split(Path(part["path"]))
            for benchmark in benchmarks.members.values():
                for sentence in benchmark.notes:
                    note(sentence)
        tasks.append(benchmarks)
        items += map(benchmarks.item, range(benchmarks.num_items))
    elif asks_benchmarks and code is None:  # the stage of a resumed run refuses that by itself
        check_num_held_out(tasks[0], num_items(config))
    if code is None and (config.reward.answer_in == "boxed" or _counts_tags(config)):
        for label in {item.task for item in items}:
            prompts = [item.prompt for item in items if item.task == label]
            check_asks_for(config.reward.answer_in, prompts, config.model.system_prompt or "")
    if config.stage != "traces":
        _try_rewards(config, tasks, items, code)
    elif code is None:
        check_demonstrations(tasks[0], config)
    return items


def _counts_tags(config: RunConfig) -> bool:
    """True if an answer outside the tags is worth nothing; custom rewards get complete completions."""
    if config.stage == "rl":
        return config.rl.algorithm != "distill" and not all(map(is_own, config.reward.terms))
    return config.stage != "traces"


def _asked(task: Task, config: RunConfig) -> Iterator[Item]:
    """Yield what the run will ask, if questions come from a list, in which any one may be unusual."""
    items, held_out = asked(config)
    if config.stage in ("rl", "generate"):
        yield from _listed(task, items, held_out)
    if config.stage in ("rl", "evaluate") and not named_sets(config):
        yield from _listed(task, range(num_items(config)), held_out=True)


def _listed(task: Task, items: range, held_out: bool) -> Iterator[Item]:
    """Yield the questions of each list until it repeats itself, and a few of the drawn ones."""
    left = {label: _num_tried(each, held_out) for label, each in members(task).items()}
    for index in items:
        label = task.label_of(index) if isinstance(task, Mixture) else ""
        if left[label]:
            left[label] -= 1
            yield task.item(index, held_out)
        if not any(left.values()):
            return


def _num_tried(task: Task, held_out: bool) -> int:
    """Return how many questions to try. Drawn ones are much alike and may be slow, held-out ones most."""
    if isinstance(task, QuestionFile | UserTask):
        return min(task.items_per_pass(held_out) or 0, _MOST_ASKED)
    return 0 if held_out else _TRIED_OF_DRAWN


def _one_of_each(task: Task, config: RunConfig) -> Iterator[Item]:
    missing = set(members(task))
    for index in count(asked(config)[0].start):
        item = task.item(index)
        if item.task in missing:
            missing.remove(item.task)
            yield item
        if not missing:
            return


def _try_rewards(config: RunConfig, tasks: list[Task], items: list[Item], code: Path | None) -> None:
    if code is None:
        for name in config.reward.terms:
            if not is_own(name):
                term_named(name)
    else:  # the frozen code of a resumed run may have terms that are gone here
        given = config.reward.terms.items()
        known = {name: weight for name, weight in given if is_own(name) or name in TERMS}
        config = replace(config, reward=replace(config.reward, terms=known))
    if not names_in(config):  # built-in terms are tested: no process is started
        return
    longest = config.rollout.max_completion_length
    with Scorer(config.reward, *tasks, max_completion_length=longest, code=code) as scorer:
        own = {label for task in tasks for label, each in members(task).items() if isinstance(each, UserTask)}
        tried: set[str] = set()
        for item in items:
            if item.task not in tried:
                tried.add(item.task)
                scorer.try_out(item, of_own_task=item.task in own)
