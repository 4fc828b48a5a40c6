"""Make reasoning-gym's questions in a process with a fixed hash seed. Started by gym.py.

    python -P -m r1hpc.tasks.problems.gym_worker PARENT_PID GENERATOR SEED OPTIONS_JSON

Some generators iterate over sets of strings, so that the same seed and index give another question in every
process. PYTHONHASHSEED cannot be set from inside; the parent sets it. The reply to an index is {"question",
"answer"}, with a null answer if the generator has none, or {"error"} if it fails. The reply to "count" is the
number of different questions over all indices of a finite one, [in training, held out], or null if too many.
"""

import json
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any

from r1hpc.base.errors import UsageError
from r1hpc.base.names import nearest
from r1hpc.tasks.problems.listed import held_out_key
from r1hpc.tasks.problems.task import is_held_out
from r1hpc.tasks.sandbox.process import Handler, serve

ENDLESS = 2**31
COUNT = "count"
_MOST_COUNTED = 1000
"""Counting the 500 of a finite generator without a size takes 4 s at most."""


def ready(generator: str, seed: int, options: dict[str, Any]) -> tuple[Handler, int]:
    """Make the generator; return its handler and its number of indices."""
    dataset = make(generator, seed, options)
    size = len(dataset) if "size" in options else num_sources(dataset)

    def handler(request: Any) -> Any:
        return _counts(asked, size) if request == COUNT else asked(request)

    def asked(index: int) -> dict[str, Any]:
        try:
            entry = dataset[index]
        # Third-party code: one index that fails must not end a run.
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
        answer = entry["answer"]
        return {"question": str(entry["question"]), "answer": None if answer is None else str(answer)}

    return handler, size


def make(generator: str, seed: int, options: dict[str, Any]) -> Any:
    """Return the package's dataset; raise UsageError for an unknown generator, or options that it refuses."""
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
    """Return the number of indices: most generators take any; some keep a list of `size` items."""
    try:
        dataset[ENDLESS - 1]
    except IndexError:
        return len(dataset)
    return ENDLESS


def _counts(asked: Callable[[int], dict[str, Any]], size: int) -> list[int] | None:
    """Count different questions of both parts among the first `size` indices; None if they are many."""
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
