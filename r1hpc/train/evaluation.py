"""Stage evaluate: judge a model on held-out items as a job of its own.

outcome = run(job)      # leaves evaluation.json and transcripts.txt in the run folder
"""

import functools

from r1hpc.base.files import write_atomic, write_json
from r1hpc.plan.parts import num_parts, part_items
from r1hpc.telemetry.evaluations import sentence
from r1hpc.train.evaluate import Answer, Evaluator, summarise, transcripts
from r1hpc.train.judge import judge
from r1hpc.train.loop import Job, Outcome
from r1hpc.train.parts import Lines, asked_to_stop, read_parts, run_parts


def run(job: Job) -> Outcome:
    """Answer the parts, then say how good the answers are."""
    parts = num_parts(job.config)
    with judge(job) as (task, evaluator):
        outcome = run_parts(job, parts, functools.partial(_part, job, evaluator))
    if outcome.finished and job.group.rank == 0:
        answers = [Answer(**line) for line in read_parts(job, parts)]
        summary = {"task": task.id, "model": job.config.model.path, **summarise(answers)}
        write_json(job.run.evaluation, summary)
        write_atomic(job.run.transcripts, transcripts(answers))
        print(sentence(summary), flush=True)
    return outcome


def _part(job: Job, evaluator: Evaluator, number: int) -> Lines | None:
    items = part_items(job.config, number)
    answers = evaluator.answer(items, job.config.evaluate.num_samples, functools.partial(asked_to_stop, job))
    return None if answers is None else [answer.to_json() for answer in answers]
