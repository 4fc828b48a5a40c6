"""Keep a bounded share of the completions that RL trains on, for people: `r1hpc samples` shows them.

A rollout leaves metrics/samples-<step>.jsonl, at most 64 KiB. The newest rollout is always there, of earlier
ones at most 256, evenly over the run: 16 MiB in all. A step that is taken again replaces its file.
"""

import json
from itertools import zip_longest
from typing import Any

import numpy as np

from r1hpc.base.files import write_atomic
from r1hpc.plan.topology.batch import updates_per_rollout
from r1hpc.tasks.rewards import Completion
from r1hpc.telemetry.records.samples import sampled_steps, samples_path
from r1hpc.train.loop.session import Job
from r1hpc.train.rollout.groups import Groups
from r1hpc.train.rollout.judge import Judge
from r1hpc.train.rollout.torch_engine import Samples

_MOST_STEPS = 256
_MOST_BYTES = 2**16
"""The limit of one step."""
_MOST_COMPLETIONS = 8
_LONGEST_COMPLETION = 4000
_LONGEST_PROMPT = 2000
"""Characters; longer texts lose their middle."""


def keep_samples(job: Job, judge: Judge, step: int, groups: Groups) -> None:
    """Write a share of the rollout whose first update is `step`; remove the files that are over the limit.

    On rank 0. A full disk costs the samples, not the run.
    """
    config = job.config
    every = max(-(-config.train.num_steps // _MOST_STEPS), updates_per_rollout(config))

    def is_lasting(number: int) -> bool:
        return (number - 1) % every < updates_per_rollout(config)

    lines, size = [], 0
    for record in _records(judge, groups):
        line = json.dumps({"attempt": job.attempt, "is_lasting": is_lasting(step), **record}) + "\n"
        size += len(line)
        if size > _MOST_BYTES:
            break
        lines.append(line)
    try:
        write_atomic(samples_path(job.run, step), "".join(lines))
        for other in sampled_steps(job.run):
            # Later steps are of an attempt that went further and was lost.
            if other > step or (other < step and not is_lasting(other)):
                samples_path(job.run, other).unlink(missing_ok=True)
    except OSError as error:
        print(f"warning: the completions of step {step} are not kept: {error}", flush=True)


def _records(judge: Judge, groups: Groups) -> list[dict[str, Any]]:
    rows = _chosen(groups)
    samples = Samples(groups.tokens[rows], groups.logprobs[rows], groups.lengths[rows], groups.ended[rows])
    completions = [one for (one,) in judge.read(samples, len(rows))]
    return [_record(judge, groups, row, one) for row, one in zip(rows, completions, strict=True)]


def _record(judge: Judge, groups: Groups, row: int, completion: Completion) -> dict[str, Any]:
    item = judge.task.item(int(groups.items[row // groups.num_members]))
    return {
        "item": item.index,
        "prompt": _without_middle(item.prompt, _LONGEST_PROMPT),
        "expected": _without_middle(item.answer, _LONGEST_PROMPT),
        "completion": _without_middle(completion.text, _LONGEST_COMPLETION),
        "correct": bool(groups.correct[row]),
        "reward": float(groups.rewards[row]),
        "terms": {name: float(values[row]) for name, values in groups.terms.items()},
        "tokens": completion.num_tokens,
        "is_cut": completion.truncated,
    }


def _chosen(groups: Groups) -> list[int]:
    """Return a few rows: correct and wrong in turn, of as many different groups as possible."""
    by_member = np.arange(len(groups.lengths)).reshape(-1, groups.num_members).T.ravel().tolist()
    correct = [row for row in by_member if groups.correct[row]]
    wrong = [row for row in by_member if not groups.correct[row]]
    pairs = zip_longest(correct, wrong)
    return [row for pair in pairs for row in pair if row is not None][:_MOST_COMPLETIONS]


def _without_middle(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    left_out = len(text) - most
    return f"{text[: most // 2]}\n[... {left_out:,} characters left out ...]\n{text[-(most // 2) :]}"
