"""Stage generate: the model's own completions, filtered by the verifier: rejection sampling.

    outcome = run(job)      # leaves traces.jsonl in the run folder

What is kept of an item: everything, what is correct, or the correct completion of the highest reward
(generate.keep); nothing of an item that the model solves more often than generate.max_pass_rate.
"""

import functools
from collections.abc import Sequence

from r1hpc.plan.parts import num_parts, part_items
from r1hpc.tasks.rewards import Completion, Score
from r1hpc.tasks.task import Item, Task
from r1hpc.train.evaluate import Evaluator
from r1hpc.train.judge import judge
from r1hpc.train.loop import Job, Outcome
from r1hpc.train.parts import Lines, asked_to_stop, read_parts, run_parts, write_lines


def run(job: Job) -> Outcome:
    """Make the parts and put them together."""
    parts = num_parts(job.config)
    with judge(job) as (task, evaluator):
        outcome = run_parts(job, parts, functools.partial(_part, job, task, evaluator))
    if outcome.finished and job.group.rank == 0:
        count = write_lines(job.run.traces, read_parts(job, parts))
        print(f"{count} traces kept of {job.config.generate.num_items} items in {job.run.traces}", flush=True)
    return outcome


def _part(job: Job, task: Task, evaluator: Evaluator, number: int) -> Lines | None:
    config = job.config
    items = [task.item(i, config.generate.held_out) for i in part_items(config, number)]
    completed = evaluator.complete(
        items,
        config.generate.num_samples,
        config.rollout.temperature,
        functools.partial(asked_to_stop, job),
        seed=config.train.seed,
    )
    if completed is None:
        return None
    lines: Lines = []
    for item, answers in zip(items, completed, strict=True):
        rate = sum(score.correct for _, score in answers) / len(answers)
        if rate <= config.generate.max_pass_rate:
            lines += [_line(item, c, s, rate) for c, s in kept(answers, config.generate.keep)]
    return lines


def kept(answers: Sequence[tuple[Completion, Score]], keep: str) -> list[tuple[Completion, Score]]:
    """What rejection sampling keeps of one item's answers; the same text once, never one cut off."""
    different = {c.text: (c, s) for c, s in answers if not c.truncated and c.text}
    chosen = list(different.values())
    if keep == "all":
        return chosen
    correct = [(c, s) for c, s in chosen if s.correct and s.well_formed]
    # The shortest of the best: ties are common where rewards are 0 and 1.
    return (
        correct if keep == "correct" else sorted(correct, key=lambda a: (-a[1].reward, a[0].num_tokens))[:1]
    )


def _line(item: Item, completion: Completion, score: Score, rate: float) -> dict[str, object]:
    return {
        "prompt": item.prompt,
        "completion": completion.text,
        "item": item.index,
        "correct": score.correct,
        "reward": score.reward,
        "pass_rate": rate,
    }
