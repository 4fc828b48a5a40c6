"""Make a custom task's questions in a separate process. Started by user_task.py, not by people.

    python -P -m r1hpc.tasks.problems.user_worker PARENT_PID SETTINGS_JSON

First it sends {"size", "judge", "thinks"}: the number of questions (null: any index has one), the judge, and
whether it can show its thinking. The reply to an index is {"prompt", "answer", "metadata"}, the reply to
[prompt, answer, metadata] is {"thinking"}; either is {"error"} if the custom code fails.
"""

import json
import sys
from collections.abc import Mapping
from typing import Any

from r1hpc.tasks.grading.judges import JUDGES, OWN_VERDICT
from r1hpc.tasks.sandbox.process import Handler, serve
from r1hpc.tasks.sandbox.user_code import OwnCodeError, call, make_task


def ready(settings: Mapping[str, Any]) -> tuple[Handler, dict[str, Any]]:
    task, spec = make_task(settings), settings["spec"]
    size = call(spec, task.__len__) if hasattr(task, "__len__") else None
    if size == 0:
        raise OwnCodeError(f"{spec} has no question: its len() is 0")

    def handler(request: Any) -> dict[str, Any]:
        try:
            if isinstance(request, int):
                return _question(spec, call(spec, task.question, request))
            return {"thinking": _text(spec, "the thinking", call(spec, task.thinking, *request))}
        except OwnCodeError as error:
            return {"error": str(error)}

    return handler, {"size": size, "judge": _judge(spec, task), "thinks": hasattr(task, "thinking")}


def _judge(spec: str, task: Any) -> str:
    if hasattr(task, "verdict"):
        return OWN_VERDICT
    name = getattr(task, "judge", "exact")
    usable = ("exact", "math", "choice")
    if name not in usable or name not in JUDGES:
        raise OwnCodeError(f"{spec}: judge is {name!r}; without a verdict of its own it is one of {usable}")
    return str(name)


def _question(spec: str, made: Any) -> dict[str, Any]:
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        raise OwnCodeError(
            f"{spec}: question gave {made!r:.60}, not (prompt, answer) or (prompt, answer, metadata)"
        )
    prompt, answer, metadata = (*made, {})[:3]
    if not isinstance(metadata, dict) or not _is_json(metadata):
        raise OwnCodeError(f"{spec}: the metadata of a question must be a dict of plain JSON values")
    return {
        "prompt": _text(spec, "the prompt", prompt),
        "answer": _text(spec, "the answer", answer),
        "metadata": metadata,
    }


def _text(spec: str, what: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise OwnCodeError(f"{spec}: {what} is {value!r:.60}, not text")
    return value


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


if __name__ == "__main__":
    sys.exit(serve(int(sys.argv[1]), lambda: ready(json.loads(sys.argv[2]))))
