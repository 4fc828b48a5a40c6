"""chain_sum: the last digit of a sum of digits. `224538=` -> thinking `248364`, answer `4`.

The thinking is the running total modulo 10: one table look-up a digit. Without it the whole sum must be
done in one step, which a small model does not learn; so it is a task where thinking visibly pays.
"""

from collections.abc import Mapping
from itertools import accumulate
from typing import Any

from r1hpc.tasks.completion import compose
from r1hpc.tasks.task import Draws, Item, check_options, check_range, draw_until, is_held_out, task_id

_COUNTED_TERMS = 4
"""Up to 10,000 questions are counted one by one; of more there are plenty."""


class ChainSum:
    """10^num_terms questions (num_terms=6), a tenth of them held out."""

    name = "chain_sum"
    judge = "exact"

    def __init__(self, seed: int, options: Mapping[str, Any]) -> None:
        options = check_options(self.name, options, {"num_terms": 6})
        self._num_terms = check_range(self.name, "num_terms", options["num_terms"], 2, 64)
        self._seed = seed
        self.judge_settings: dict[str, Any] = {}
        self.id = task_id(self.name, seed, options)

    def item(self, index: int, held_out: bool = False) -> Item:
        digits = draw_until(self._draw, (self.name, self._seed, self._num_terms, index), held_out)
        return Item(index, f"{digits}=", running_totals(digits)[-1])

    def num_questions(self, held_out: bool = False) -> int | None:
        if self._num_terms > _COUNTED_TERMS:
            return None
        questions = (f"{number:0{self._num_terms}}=" for number in range(10**self._num_terms))
        return sum(is_held_out(question) == held_out for question in questions)

    def demonstration(self, item: Item, thinking: bool) -> str:
        totals = running_totals(item.prompt[:-1])
        return compose(totals if thinking else "", totals[-1])

    def _draw(self, draws: Draws) -> tuple[str, str]:
        digits = "".join(str(draws.below(10)) for _ in range(self._num_terms))
        return f"{digits}=", digits


def running_totals(digits: str) -> str:
    """Totals modulo 10 after each digit: `224538` -> `248364`."""
    totals = accumulate(map(int, digits), lambda total, digit: (total + digit) % 10)
    return "".join(map(str, totals))
