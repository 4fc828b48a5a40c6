"""The process in which reasoning-gym makes its questions, under a fixed hash seed. Started by gym.py.

    python -P -m r1hpc.tasks.problems.gym_worker PARENT_PID GENERATOR SEED OPTIONS_JSON

Some generators walk over sets of strings, so that the same seed and index give another question in every
process. PYTHONHASHSEED cannot be set from inside; this process gets it from its parent. An index is answered
by {"question", "answer"}, `answer` null where the generator has none, or by {"error"} where it fails; "count"
by how many different questions all indices of a finite one have: [in training, held out], or null where they
are too many to count.
"""

import json
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any

from r1hpc.base.errors import UsageError
from r1hpc.base.names import nearest
from r1hpc.tasks.problems.task import held_out_key, is_held_out
from r1hpc.tasks.sandbox.serve import Handler, serve

ENDLESS = 2**31
COUNT = "count"
_MOST_COUNTED = 1000
"""The 500 that a finite generator of the package has where nothing is said take 4 s at most."""


def ready(generator: str, seed: int, options: dict[str, Any]) -> tuple[Handler, int]:
    """The generator, made, and how many indices it has."""
    dataset = make(generator, seed, options)
    size = len(dataset) if "size" in options else num_sources(dataset)

    def handler(request: Any) -> Any:
        return _counts(asked, size) if request == COUNT else asked(request)

    def asked(index: int) -> dict[str, Any]:
        try:
            entry = dataset[index]
        # Other people's code: one index that it cannot make must not end a run.
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
        answer = entry["answer"]
        return {"question": str(entry["question"]), "answer": None if answer is None else str(answer)}

    return handler, size


def make(generator: str, seed: int, options: dict[str, Any]) -> Any:
    """The package's dataset.

    Raises:
        UsageError: no such generator, or options that it refuses.
    """
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if generator not in DATASETS:
        raise UsageError(
            f"task.name=reasoning_gym:{generator}: reasoning-gym {metadata.version('reasoning-gym')} has no "
            f"such generator{nearest(generator, DATASETS)}"
        )
    try:
        return reasoning_gym.create_dataset(generator, seed=seed, **options)
    # Its configs check themselves with assertions.
    except (AssertionError, TypeError, ValueError) as error:
        raise UsageError(f"task.options do not suit reasoning_gym:{generator}: {error}") from None


def num_sources(dataset: Any) -> int:
    """Most generators make an item of any index; some keep a list of `size` items."""
    try:
        dataset[ENDLESS - 1]
    except IndexError:
        return len(dataset)
    return ENDLESS


def _counts(asked: Callable[[int], dict[str, Any]], size: int) -> list[int] | None:
    """Different questions of the two parts, among those of the first `size` indices; None: they are many."""
    if size > _MOST_COUNTED:
        return None
    different: dict[bool, set[str]] = {False: set(), True: set()}
    for index in range(size):
        question = asked(index).get("question")
        if question is not None:
            different[is_held_out(held_out_key(question))].add(question)
    return [len(different[False]), len(different[True])]


if __name__ == "__main__":
    generator, seed, options = sys.argv[2:5]
    sys.exit(serve(int(sys.argv[1]), lambda: ready(generator, int(seed), json.loads(options))))
