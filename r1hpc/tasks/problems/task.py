"""Define a task: a pure function from (seed, index) to a question, and a correct answer to show.

The index is therefore the complete state of a run's data. A hash of the question itself, not its position,
decides if it is held out, so that no draw can put it into training.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol, TypeVar

from r1hpc.base.errors import UsageError
from r1hpc.base.names import nearest

_T = TypeVar("_T")
_HELD_OUT_SHARE = 10
_MAX_DRAWS = 500
"""A share of 1/10 is missed 500 times in a row with probability 1e-23: then there is none."""
TEMPLATE = (
    "Solve the problem. Write your reasoning inside <think> </think>, then only the final answer inside "
    "<answer> </answer>.\n\nProblem: {question}\n\nSolution: "
)


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


def check_template(template: str) -> str:
    """Return a template if it has `{question}` exactly once, else raise UsageError; all else is plain."""
    if template.count("{question}") != 1:
        raise UsageError(f"task.options.template must hold {{question}} exactly once; it is {template!r}")
    return template


def fill(template: str, question: str) -> str:
    """Return the prompt. Braces in the question stay unchanged."""
    return template.replace("{question}", question)


def check_asks_for(answer_in: str, prompts: Sequence[str], system_prompt: str) -> None:
    """Refuse prompts that ask only for tags if \\boxed counts, or for a box if tags do: none could be right.

    `answer_in` is reward.answer_in, `boxed` or `tags`; `prompts` are of one task. A single question may
    contain a tag or box; a template puts it into all. Raise UsageError if the template of all or the system
    message does.
    """
    counts, other = ("\\boxed", "<answer>") if answer_in == "boxed" else ("<answer>", "\\boxed")
    asked = [system_prompt + prompt for prompt in prompts]
    if not all(other in text for text in asked) or all(counts in text for text in asked):
        return
    what = "model.system_prompt" if other in system_prompt else "the template of the prompts"
    if answer_in == "boxed":
        raise UsageError(
            f"reward.answer_in=boxed counts what \\boxed{{}} holds, and {what} asks for <answer> tags: ask "
            "for the box, as by task.options.template='{question}\\nReason step by step, and put your final "
            "answer within \\boxed{}.'"
        )
    raise UsageError(
        f"reward.answer_in=tags counts what <answer> </answer> holds, and {what} asks for \\boxed{{}}: set "
        "reward.answer_in=boxed, or ask for the tags"
    )


def held_out_key(question: str) -> str:
    """Return what decides if a question is held out: its words, without case and blanks."""
    return " ".join(question.casefold().split())


class Listed:
    """A finite list of questions as the two parts of a task. Immutable."""

    def __init__(self, key: tuple[object, ...], questions: Sequence[str], what: str) -> None:
        """`key` decides the orders; `what` names the list in errors."""
        self._key, self._what = key, what
        keys = list(map(held_out_key, questions))
        self._parts: dict[bool, list[int]] = {False: [], True: []}
        for position, each in enumerate(keys):
            self._parts[is_held_out(each)].append(position)
        self._different = {part: len({questions[at] for at in own}) for part, own in self._parts.items()}
        self._order = lru_cache(maxsize=4)(self._shuffled)

    def at(self, index: int, held_out: bool) -> tuple[int, int]:
        """Return (position in the list, number of the pass) of an item; UsageError if the part is empty."""
        positions = self._parts[held_out]
        if not positions:
            part = "held-out" if held_out else "training"
            raise UsageError(
                f"{self._what} has no {part} questions (about one in ten is held out): add questions"
            )
        epoch, place = divmod(index, len(positions))
        return positions[self._order(epoch, held_out)[place]], epoch

    def num_questions(self, held_out: bool) -> int:
        """Return the number of different questions in a part."""
        return self._different[held_out]

    def items_per_pass(self, held_out: bool) -> int:
        """Return the items of one pass over the list. A repeated question counts each time."""
        return len(self._parts[held_out])

    def _shuffled(self, epoch: int, held_out: bool) -> list[int]:
        return Draws(*self._key, epoch, int(held_out)).shuffled(len(self._parts[held_out]))
