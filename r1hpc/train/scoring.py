"""From samples to judged completions, with a look at whether somebody asked to stop in between."""

from collections.abc import Callable, Sequence

from r1hpc.tasks.rewards import Completion, Score, Scorer
from r1hpc.tasks.task import Item
from r1hpc.train.prompts import Prompts
from r1hpc.train.sampling import Samples

_GROUPS_AT_ONCE = 16
"""Groups judged between two looks."""

Judged = list[tuple[Completion, Score]]
"""The completions of one item."""


def judge_samples(
    scorer: Scorer,
    prompts: Prompts,
    items: Sequence[Item],
    samples: Samples,
    should_stop: Callable[[], bool],
) -> list[Judged] | None:
    """The completions of each item with their scores; None when asked to leave."""
    num = len(samples.lengths) // len(items)
    texts = prompts.texts(samples.tokens, samples.lengths)
    completions = [
        Completion(text, int(length), not bool(ended))
        for text, length, ended in zip(texts, samples.lengths, samples.ended, strict=True)
    ]
    groups = [(item, completions[i * num : (i + 1) * num]) for i, item in enumerate(items)]
    judged: list[Judged] = []
    for start in range(0, len(groups), _GROUPS_AT_ONCE):
        if should_stop():
            return None
        part = groups[start : start + _GROUPS_AT_ONCE]
        scores = scorer.score_groups(part)
        judged += [list(zip(group[1], score, strict=True)) for group, score in zip(part, scores, strict=True)]
    return judged
