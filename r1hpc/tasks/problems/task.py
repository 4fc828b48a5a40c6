"""Define a task: a pure function from (seed, index) to a question, and a correct answer to show.

The index is therefore the complete state of a run's data. A hash of the question itself, not its position,
decides if it is held out, so that no draw can put it into training.

Two tasks are here. chain_sum: the last digit of a sum of digits. `224538=` -> thinking `248364`, answer `4`.
The thinking is the running total modulo 10: one table look-up a digit. Without it the sum must be done in one
step, which a small model does not learn; so thinking visibly pays.

countdown: reach a target with each of some numbers exactly once. `3,7,12:33?` -> `3*7+12`. The rules are
those of reasoning-gym and TinyZero: + - * / and parentheses, every number used, none twice. Questions are
made from a solution, so each has one; the intermediate results of that solution are positive integers.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Protocol, TypeVar

from r1hpc.base.errors import UsageError
from r1hpc.base.names import nearest
from r1hpc.tasks.text.format import compose

_T = TypeVar("_T")
_HELD_OUT_SHARE = 10
_MAX_DRAWS = 500
"""A share of 1/10 is missed 500 times in a row with probability 1e-23: then there is none."""
_COUNTED_TERMS = 4
"""Up to 10,000 questions are counted one by one; above that there are plenty."""
_DEFAULTS = {"num_numbers": 3, "max_number": 20, "max_target": 100}
_MAX_INTERMEDIATE = 10_000
_MAX_TRIES = 10_000
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}


@dataclass(frozen=True)
class Item:
    """One question. `metadata` is plain JSON: it is sent to the verifier's process."""

    index: int
    prompt: str
    answer: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    task: str = ""
    """Label of its task, if a run has several (`members`)."""
    where: str = field(default="", compare=False)
    """The line of the file that it was read from."""


class Verifiable(Protocol):
    """The judge of one kind of questions."""

    @property
    def judge(self) -> str: ...

    @property
    def judge_settings(self) -> Mapping[str, Any]:
        """Return what that judge must know about the task in addition to each item; plain JSON."""
        ...


class Task(Verifiable, Protocol):
    """Questions of one kind. Implementations are immutable."""

    @property
    def name(self) -> str: ...

    @property
    def id(self) -> str:
        """Return the name of the content (kind, seed, options, digest of a file); equal IDs ask the same."""
        ...

    def item(self, index: int, held_out: bool = False) -> Item: ...

    def num_questions(self, held_out: bool = False) -> int | None:
        """Return an upper bound of a part's different questions; None: too many to count."""
        ...

    def demonstration(self, item: Item, thinking: bool) -> str:
        """Return a correct completion; raise UsageError if this task cannot show one."""
        ...


class Draws:
    """Integers that depend only on the key: BLAKE2b in counter mode, the same in every Python."""

    def __init__(self, *key: object) -> None:
        self._key = "/".join(map(str, key)).encode()
        self._count = 0

    def below(self, limit: int) -> int:
        """Return 0 <= value < limit. It reduces 128 bits: the bias is below 1e-18 for limits up to 1e20."""
        message = self._key + b"#%d" % self._count
        self._count += 1
        return int.from_bytes(hashlib.blake2b(message, digest_size=16).digest()) % limit

    def shuffled(self, count: int) -> list[int]:
        """Return a permutation of range(count), by Fisher and Yates."""
        order = list(range(count))
        for last in range(count - 1, 0, -1):
            other = self.below(last + 1)
            order[last], order[other] = order[other], order[last]
        return order


def is_held_out(question: str) -> bool:
    """True for one question in ten, by its own text."""
    digest = hashlib.md5(question.encode("utf-8", "surrogatepass"), usedforsecurity=False).digest()
    return int.from_bytes(digest) % _HELD_OUT_SHARE == 0


def draw_until(make: Callable[[Draws], tuple[str, _T]], key: tuple[object, ...], held_out: bool) -> _T:
    """Return the first draw whose question lies in the wanted part; UsageError if there are too few."""
    for attempt in range(_MAX_DRAWS):
        question, made = make(Draws(*key, int(held_out), attempt))
        if is_held_out(question) == held_out:
            return made
    part = "held-out" if held_out else "training"
    raise UsageError(
        f"task {key[0]} has too few different questions: none is in the {part} part; widen its options"
    )


VerifiableT = TypeVar("VerifiableT", bound=Verifiable)


def members(task: VerifiableT) -> Mapping[str, VerifiableT]:
    """Return the tasks of a mixture by label; a single task under the empty label."""
    inner: Mapping[str, VerifiableT] | None = getattr(task, "members", None)
    return {"": task} if inner is None else inner


def check_num_held_out(task: Task, num_items: int) -> None:
    """Raise UsageError for more held-out questions than there are: repeats only look like evidence."""
    there = task.num_questions(held_out=True)
    if there is not None and num_items > there:
        fix = f"set evaluate.num_items={there}" if there else "ask test files (evaluate.sets)"
        raise UsageError(
            f"evaluate.num_items is {num_items}, but task {task.name} has no more than {there} held-out "
            f"questions (one in ten, by a hash of the question): {fix}, or give it more questions"
        )


def check_options(task: str, given: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Return `known`, the defaults, updated with `given`; UsageError for another option or type."""
    for name, value in given.items():
        if name not in known:
            names = ", ".join(known) or "none"
            raise UsageError(
                f"task.options.{name} is not an option of {task}{nearest(name, known)}; it has: {names}"
            )
        wanted = type(known[name])
        if type(value) is not wanted:
            raise UsageError(f"task.options.{name} is {value!r}: {task} wants {wanted.__name__}")
    return {**known, **given}


def check_range(task: str, name: str, value: int, low: int, high: int) -> int:
    """Return `value` if low <= value <= high, else raise UsageError."""
    if not low <= value <= high:
        raise UsageError(f"task.options.{name} is {value}: {task} takes {low} to {high}")
    return value


def task_id(name: str, seed: int, options: Mapping[str, Any]) -> str:
    """Return a readable name of the content; options in alphabetical order."""
    return f"{name} seed={seed} {json.dumps(dict(options), sort_keys=True)}"


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
