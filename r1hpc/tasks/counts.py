"""How many questions a stage asks of its task, and a sentence where some of them come again.

asked_items(config)         # range(4000, 20000): items of the training part
repeated(config, task)      # ["asks items 4,000 to 19,999 of ..., whose questions come again ..."]
"""

from r1hpc.config.schema import RunConfig
from r1hpc.plan.batch import updates_per_rollout
from r1hpc.tasks.pass_rates import MOST_PASSED_OVER
from r1hpc.tasks.task import Task


def asked_items(config: RunConfig) -> range:
    """The items of the training part that a stage asks or shows, of RL at most; empty: it does neither."""
    generate = config.generate
    if config.stage in ("traces", "generate") and not generate.held_out:
        return range(generate.first_item, generate.first_item + generate.num_items)
    if config.stage != "rl":
        return range(0)
    rollouts = -(-config.train.num_steps // updates_per_rollout(config))
    most = config.rollout.num_prompts * (1 + config.rl.max_resamples)
    most *= 1 + MOST_PASSED_OVER if config.rl.by_pass_rate else 1
    first = config.task.first_item or 0
    return range(first, first + rollouts * most)


def repeated(config: RunConfig, task: Task) -> list[str]:
    """A sentence where stage rl, traces or generate goes on after all questions of its task were asked, as RL
    does in several passes: it may not be meant.
    """
    generate, held_out = config.generate, False
    items = asked_items(config)
    if config.stage in ("traces", "generate"):
        items, held_out = (
            range(generate.first_item, generate.first_item + generate.num_items),
            generate.held_out,
        )
    there = task.num_questions(held_out) if items else None
    if there is None or items.stop <= there:
        return []
    most = "at most " if config.rl.max_resamples or config.rl.by_pass_rate else ""
    part = "held-out " if held_out else ""
    said = (
        f"task {task.name} is asked items {items.start:,} to {most}{items.stop - 1:,}, and has {there:,} "
        f"different {part}questions: from item {there:,} on, at the latest, they come again"
    )
    if config.stage == "rl":
        return [f"{said}{', also those that stages before it showed' if items.start else ''}"]
    fix = f"; generate.num_items={there - items.start} asks none twice" if there > items.start else ""
    return [f"{said}, and one may stand in traces.jsonl several times{fix}"]
