"""Define the built-in tasks chain_sum and countdown.

chain_sum: the last digit of a sum of digits. `224538=` -> thinking `248364`, answer `4`. The thinking is the
running total modulo 10: one table look-up a digit. Without it the sum must be done in one step, which a small
model does not learn; so thinking visibly pays.

countdown: reach a target with each of some numbers exactly once. `3,7,12:33?` -> `3*7+12`. The rules are
those of reasoning-gym and TinyZero: + - * / and parentheses, every number used, none twice. Questions are
made from a solution, so each has one; the intermediate results of that solution are positive integers.
"""

from collections.abc import Mapping
from itertools import accumulate
from typing import Any

from r1hpc.base.errors import UsageError
from r1hpc.tasks.grading.completion import compose
from r1hpc.tasks.problems.task import (
    Draws,
    Item,
    check_options,
    check_range,
    draw_until,
    is_held_out,
    task_id,
)

_COUNTED_TERMS = 4
"""Up to 10,000 questions are counted one by one; above that there are plenty."""
_DEFAULTS = {"num_numbers": 3, "max_number": 20, "max_target": 100}
_MAX_INTERMEDIATE = 10_000
_MAX_TRIES = 10_000
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}


class ChainSum:
    """Running sums of num_terms digits (default 6), modulo 10: 10^num_terms questions, a tenth held out."""

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
    """Return the totals modulo 10 after each digit: `224538` -> `248364`."""
    totals = accumulate(map(int, digits), lambda total, digit: (total + digit) % 10)
    return "".join(map(str, totals))


class Countdown:
    """Held out by sorted numbers and target: another order of the same numbers is no new question."""

    name = "countdown"
    judge = "countdown"

    def __init__(self, seed: int, options: Mapping[str, Any]) -> None:
        options = check_options(self.name, options, _DEFAULTS)
        self._num_numbers = check_range(self.name, "num_numbers", options["num_numbers"], 2, 8)
        self._max_number = check_range(self.name, "max_number", options["max_number"], 5, 999)
        self._max_target = check_range(self.name, "max_target", options["max_target"], 10, _MAX_INTERMEDIATE)
        self._seed = seed
        self.judge_settings: dict[str, Any] = {}
        self.id = task_id(self.name, seed, options)

    def item(self, index: int, held_out: bool = False) -> Item:
        made = draw_until(self._draw, (self.id, index), held_out)
        numbers, target = made["numbers"], made["target"]
        return Item(index, f"{','.join(map(str, numbers))}:{target}?", made["solution"], made)

    def num_questions(self, held_out: bool = False) -> None:
        """Return None: questions are made from drawn solutions, not listed."""
        return

    def demonstration(self, item: Item, thinking: bool) -> str:
        return compose(item.metadata["steps"] if thinking else "", item.answer)

    def _draw(self, draws: Draws) -> tuple[str, dict[str, Any]]:
        for _ in range(_MAX_TRIES):
            numbers = [1 + draws.below(self._max_number) for _ in range(self._num_numbers)]
            target, solution, steps = _combine(draws, numbers)
            if target <= self._max_target:
                made = {"numbers": numbers, "target": target, "solution": solution, "steps": ",".join(steps)}
                return f"{sorted(numbers)}:{target}", made
        raise UsageError(f"countdown finds no target up to {self._max_target}: raise task.options.max_target")


def _combine(draws: Draws, numbers: list[int]) -> tuple[int, str, list[str]]:
    """Make one number of all at random; return its value, its expression, and its steps."""
    pool = [(number, str(number), 3) for number in numbers]
    steps = []
    while len(pool) > 1:
        left, right = pool.pop(draws.below(len(pool))), pool.pop(draws.below(len(pool)))
        if left[0] < right[0]:
            left, right = right, left
        operator = _operators(left[0], right[0])[draws.below(len(_operators(left[0], right[0])))]
        a, b = left[0], right[0]
        result = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[operator]
        steps.append(f"{a}{operator}{b}={result}")
        pool.append((result, _write(operator, left, right), _PRECEDENCE[operator]))
    value, text, _ = pool[0]
    return value, text, steps


def _operators(left: int, right: int) -> str:
    """Return the operators that keep the result a positive integer of few digits."""
    usable = "+" + ("-" if left > right else "") + ("*" if left * right <= _MAX_INTERMEDIATE else "")
    return usable + ("/" if left % right == 0 else "")


def _write(operator: str, left: tuple[int, str, int], right: tuple[int, str, int]) -> str:
    own = _PRECEDENCE[operator]
    before = f"({left[1]})" if left[2] < own else left[1]
    tight = right[2] < own or (right[2] == own and operator in "-/")
    after = f"({right[1]})" if tight else right[1]
    return f"{before}{operator}{after}"
