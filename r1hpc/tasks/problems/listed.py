"""Divide a list of questions into a task's training and held-out parts, and order each pass over a part.

Used by the tasks of files and of custom code with a len(). The template around a question is here too: files,
test files and reasoning-gym use it.
"""

from collections.abc import Sequence
from functools import lru_cache

from r1hpc.base.errors import UsageError
from r1hpc.tasks.problems.task import Draws, is_held_out

TEMPLATE = (
    "Solve the problem. Write your reasoning inside <think> </think>, then only the final answer inside "
    "<answer> </answer>.\n\nProblem: {question}\n\nSolution: "
)


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
    """A finite list of questions, as the training and the held-out part of a task. Immutable."""

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
