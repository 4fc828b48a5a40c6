"""Find which items a stage asks of its task, and warn if their questions come again.

asked(config)               # (range(4000, 20000), False): of the training part
repeated(config, task)      # ["task file is asked items 4,000 to 19,999, and has 6,700 ..."]
pass_rates_unused(config, task)     # ["rl.by_pass_rate=true changes nothing: ..."]
"""

from r1hpc.config.schema.run import RunConfig
from r1hpc.plan.topology.batch import updates_per_rollout
from r1hpc.tasks.problems.curriculum import MOST_PASSED_OVER
from r1hpc.tasks.problems.file import QuestionFile
from r1hpc.tasks.problems.registry import Mixture
from r1hpc.tasks.problems.task import Task
from r1hpc.tasks.problems.user_task import OwnTask


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
    most *= 1 + MOST_PASSED_OVER if config.rl.by_pass_rate else 1
    first = config.task.first_item or 0
    return range(first, first + rollouts * most), False


def asked_items(config: RunConfig) -> range:
    """Return the items of the training part."""
    items, held_out = asked(config)
    return range(0) if held_out else items


def repeated(config: RunConfig, task: Task) -> list[str]:
    """Return a sentence for each task whose questions a stage asks again, perhaps unintentionally."""
    items, held_out = asked(config)
    if not items:
        return []
    if not isinstance(task, Mixture):
        return _repeated(config, task, f"task {task.name} is asked", items, held_out)
    return [
        sentence
        for label, each in task.members.items()
        for sentence in _repeated(
            config, each, f"task {label} is asked its", task.items_of(label, items), held_out
        )
    ]


def pass_rates_unused(config: RunConfig, task: Task) -> list[str]:
    """Return a sentence if rl.by_pass_rate has no effect: no question of a list comes twice."""
    if config.stage != "rl" or not config.rl.by_pass_rate or not isinstance(task, QuestionFile | OwnTask):
        return []
    a_pass, first = task.items_per_pass(False), config.task.first_item or 0
    rollouts = -(-config.train.num_steps // updates_per_rollout(config))
    num = rollouts * config.rollout.num_prompts
    if a_pass is None or first % a_pass + num > a_pass or task.num_questions() != a_pass:
        return []
    return [
        f"rl.by_pass_rate=true changes nothing: this run asks {num:,} questions of {a_pass:,}, each for the "
        "first time, and how often one is solved is known when it comes again"
    ]


def _repeated(config: RunConfig, task: Task, asks: str, items: range, held_out: bool) -> list[str]:
    there = task.num_questions(held_out) if items else None
    if not there:
        return []
    most = "at most " if config.rl.max_resamples or config.rl.by_pass_rate else ""
    said = f"{asks} items {items.start:,} to {most}{items.stop - 1:,}, and has "
    part = "held-out questions" if held_out else "questions"
    if not isinstance(task, QuestionFile | OwnTask):  # drawn: some come again before all were asked
        last = items.start + there
        again = (
            f"{said}at most {there:,} different {part}: from item {last:,} on at the latest they come again"
        )
        return [again] if len(items) > there else []
    a_pass = task.items_per_pass(held_out) or there
    again_at = (items.start // a_pass + 1) * a_pass
    said += f"{there:,} different {part}"
    if again_at < items.stop:
        return [f"{said}: from item {again_at:,} on they come again{_what_then(config, items, again_at)}"]
    if config.stage == "rl" and items.start >= a_pass:
        return [f"{said}: all of them are among the earlier items, which earlier stages may have shown"]
    return []


def _what_then(config: RunConfig, items: range, again_at: int) -> str:
    """Return what follows a repetition: a pass has each question of a list once, in any order."""
    if config.stage == "rl":
        return ", also those that stages before it showed" if items.start else ""
    return "" if config.task.mix else f"; generate.num_items={again_at - items.start} begins no second pass"
