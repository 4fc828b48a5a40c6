"""Track how often each question was solved, and choose the items to ask by it.

    rates = PassRates(seed)
    items = islice(rates.chosen(task, first_item), 32)
    rates.add(prompt, share_correct)        # after a rollout
    rates.state(), rates.restore(state)     # for a checkpoint

The items of a task come in order. With a pass rate p of its question, each is asked with probability

    max(1/10, 4 p (1 - p)),

proportional to the variance of a reward that is 1 with probability p: completions of a question that is
always or never solved cannot be told apart (learnability: Rutherford et al. 2024, arXiv 2408.15099, eq. 2). A
question without a rate is asked. The choice is a function of seed, index and rates, so a resumed run asks the
same.
"""

from collections.abc import Iterator, Mapping
from itertools import count

from r1hpc.base.errors import UsageError
from r1hpc.tasks.problems.task import Draws, Task, held_out_key

MOST_PASSED_OVER = 9
"""In a row; the next item is asked whatever its rate."""
_LEAST_SHARE = 1 / (MOST_PASSED_OVER + 1)
_KEPT = 0.5
"""Share of the old rate that is kept when a question is asked again: the policy has changed since."""
_FINEST = 2**53


def check_comes_again(task: Task) -> None:
    """Refuse pass rates for questions that never come again.

    Raises:
        UsageError: the task has more questions than can be counted.
    """
    if task.num_questions() is None:
        raise UsageError(
            f"rl.by_pass_rate=true asks questions again by how often they were solved, and task {task.name} "
            "asks new ones without end: take task.name=file, or rl.by_pass_rate=false"
        )


class PassRates:
    """Pass rates by question, independent of item and task."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._rates: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._rates)

    @property
    def mean(self) -> float | None:
        """Return the mean over the questions asked; None before the first."""
        return sum(self._rates.values()) / len(self._rates) if self._rates else None

    def add(self, question: str, share: float) -> None:
        """Record that `share` of the answers to a question were right."""
        key = held_out_key(question)
        known = self._rates.get(key)
        self._rates[key] = share if known is None else _KEPT * known + (1 - _KEPT) * share

    def chosen(self, task: Task, first: int) -> Iterator[int]:
        """Yield the items to ask, from `first` on, without end."""
        passed_over = 0
        for index in count(first):
            if passed_over == MOST_PASSED_OVER or self._is_asked(index, task.item(index).prompt):
                passed_over = 0
                yield index
            else:
                passed_over += 1

    def state(self) -> dict[str, float]:
        """Return the rates as JSON values."""
        return dict(self._rates)

    def restore(self, state: Mapping[str, float]) -> None:
        """Continue from a result of `state`."""
        self._rates = dict(state)

    def _is_asked(self, index: int, question: str) -> bool:
        rate = self._rates.get(held_out_key(question))
        if rate is None:
            return True
        share = max(_LEAST_SHARE, 4 * rate * (1 - rate))
        return Draws("pass rate", self._seed, index).below(_FINEST) < share * _FINEST
