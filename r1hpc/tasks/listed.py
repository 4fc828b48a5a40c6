"""A finite list of questions as the two parts of a task: each pass over a part has its own order.

questions = Listed(("jsonl", seed), prompts)
position, epoch = questions.at(17, held_out=False)      # where in the list item 17 lies, in which pass
"""

from collections.abc import Sequence
from functools import lru_cache

from r1hpc.base.errors import UsageError
from r1hpc.tasks.prompts import held_out_key
from r1hpc.tasks.task import Draws, is_held_out


class Listed:
    """Immutable."""

    def __init__(self, key: tuple[object, ...], questions: Sequence[str], what: str) -> None:
        """`key` decides the orders; `what` names the list in errors."""
        self._key, self._what = key, what
        keys = list(map(held_out_key, questions))
        self._parts: dict[bool, list[int]] = {False: [], True: []}
        for position, each in enumerate(keys):
            self._parts[is_held_out(each)].append(position)
        self._different = {
            part: len({questions[position] for position in positions})
            for part, positions in self._parts.items()
        }
        self._order = lru_cache(maxsize=4)(self._shuffled)

    def at(self, index: int, held_out: bool) -> tuple[int, int]:
        """(position in the list, number of the pass) of an item.

        Raises:
            UsageError: the part is empty.
        """
        positions = self._parts[held_out]
        if not positions:
            part = "held-out" if held_out else "training"
            raise UsageError(
                f"{self._what} has no {part} questions (about one in ten is held out): add questions"
            )
        epoch, place = divmod(index, len(positions))
        return positions[self._order(epoch, held_out)[place]], epoch

    def num_questions(self, held_out: bool) -> int:
        """Different questions of a part."""
        return self._different[held_out]

    def items_per_pass(self, held_out: bool) -> int:
        """More than there are different questions where some stand in the list twice."""
        return len(self._parts[held_out])

    def _shuffled(self, epoch: int, held_out: bool) -> list[int]:
        return Draws(*self._key, epoch, int(held_out)).shuffled(len(self._parts[held_out]))
