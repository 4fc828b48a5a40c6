"""The verifier's process: reads answers, says which are right. Started by verifier.py, not by people.

    python -P -m r1hpc.tasks.grading.worker PARENT_PID JUDGE SETTINGS_JSON

Each list of [text, answer, metadata] is answered by a list of true (right), false (wrong), null (refused), a
number (a user's reward term) or {"error": sentence} (a user's code failed); {"prepare": metadata} by true.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from r1hpc.tasks.grading.arithmetic import RefusedError
from r1hpc.tasks.grading.judges import JUDGES, Judge
from r1hpc.tasks.sandbox import guard
from r1hpc.tasks.sandbox.serve import Handler, serve
from r1hpc.tasks.sandbox.user_code import OwnCodeError


def ready(judge_name: str, settings: Mapping[str, Any]) -> tuple[Handler, bool]:
    """The judge, loaded, behind the guard."""
    judge = JUDGES[judge_name].load(settings)
    guard.install()

    def handler(request: Any) -> Any:
        if isinstance(request, dict):
            judge.prepare(request["prepare"])  # type: ignore[attr-defined]
            return True
        return [verdict(judge, question) for question in request]

    return handler, True


def verdict(judge: Judge, question: Sequence[Any]) -> bool | float | dict[str, str] | None:
    """Right, wrong, or None where the answer could not be read; a number or a sentence from a user's code."""
    text, answer, metadata = question
    try:
        with guard.armed():
            said = judge(text, answer, metadata)
            return said if isinstance(said, float) else bool(said)
    except RefusedError:
        return None
    except OwnCodeError as error:
        return {"error": str(error)}
    except MemoryError:  # what filled it may stay; the parent starts a fresh process
        raise
    # Other people's parsers raise whatever they like at hostile text; this process is where that ends.
    except Exception:
        return None


if __name__ == "__main__":
    sys.exit(serve(int(sys.argv[1]), lambda: ready(sys.argv[2], json.loads(sys.argv[3]))))
