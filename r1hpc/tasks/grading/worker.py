"""Run the verifier's process: read answers, return verdicts. Started by verifier.py, not by people.

    python -P -m r1hpc.tasks.grading.worker PARENT_PID JUDGE SETTINGS_JSON

The reply to a list of [text, answer, metadata] is a list of true (right), false (wrong), null (refused), a
number (a custom reward term) or {"error": sentence} (custom code failed). The reply to {"prepare": metadata}
is true.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from r1hpc.tasks.grading.arithmetic import RefusedError
from r1hpc.tasks.grading.judges import JUDGES, Judge
from r1hpc.tasks.sandbox import guard
from r1hpc.tasks.sandbox.process import Handler, serve
from r1hpc.tasks.sandbox.user_code import OwnCodeError


def ready(judge_name: str, settings: Mapping[str, Any]) -> tuple[Handler, bool]:
    judge = JUDGES[judge_name].load(settings)
    guard.install()

    def handler(request: Any) -> Any:
        if isinstance(request, dict):
            judge.prepare(request["prepare"])  # type: ignore[attr-defined]
            return True
        return [verdict(judge, question) for question in request]

    return handler, True


def verdict(judge: Judge, question: Sequence[Any]) -> bool | float | dict[str, str] | None:
    """Return right, wrong, or None for an unreadable answer; a number or a sentence from custom code."""
    found = _verdict(judge, question)
    act = guard.refused_act()
    if act is None or isinstance(found, dict):
        return found
    return {"error": f"a library of the judge was refused what it needs ({act})", "act": act}


def _verdict(judge: Judge, question: Sequence[Any]) -> bool | float | dict[str, str] | None:
    text, answer, metadata = question
    try:
        with guard.armed():
            said = judge(text, answer, metadata)
            return said if isinstance(said, float) else bool(said)
    except RefusedError:
        return None
    except OwnCodeError as error:
        return {"error": str(error)}
    except MemoryError:  # the memory may stay full; the parent starts a fresh process
        raise
    # Third-party parsers raise anything on hostile text; this process stops it here.
    except Exception:
        return None


if __name__ == "__main__":
    sys.exit(serve(int(sys.argv[1]), lambda: ready(sys.argv[2], json.loads(sys.argv[3]))))
