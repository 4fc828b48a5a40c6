"""Stage traces: correct demonstrations of a task, some with their thinking, for a cold start.

    outcome = run(job)      # leaves traces.jsonl in the run folder

Needs no model and no GPU: the task itself knows the answers. Only items of the training part are shown.
"""

import functools

from r1hpc.plan.parts import num_parts, part_items
from r1hpc.tasks.registry import make_task
from r1hpc.tasks.task import Draws, Task
from r1hpc.train.loop import Job, Outcome
from r1hpc.train.parts import Lines, read_parts, run_parts, write_lines

_FINE = 10**6


def run(job: Job) -> Outcome:
    """Make the parts and put them together."""
    task = make_task(job.config.task)
    parts = num_parts(job.config)
    outcome = run_parts(job, parts, functools.partial(_part, job, task))
    if outcome.finished and job.group.rank == 0:
        count = write_lines(job.run.traces, read_parts(job, parts))
        print(f"{count} traces of {task.name} in {job.run.traces}", flush=True)
    return outcome


def _part(job: Job, task: Task, number: int) -> Lines:
    lines = []
    for index in part_items(job.config, number):
        item = task.item(index)
        # Whether an item is shown with its thinking depends on the item alone.
        draw = Draws("thinking", job.config.task.seed, index).below(_FINE)
        thinking = draw < job.config.generate.thinking_share * _FINE
        completion = task.demonstration(item, thinking)
        lines.append({"prompt": item.prompt, "completion": completion, "item": index, "thinking": thinking})
    return lines
